"""Blocks of DINO's and DINOv2's own repositories (torch.hub and copies of it) on our kernels.

Their packages are on no index, so their classes are known by where they were defined and by how
they are built: `Block` of DINO's ``vision_transformer``, `Block` and `NestedTensorBlock` of a
``dinov2...layers.block``. Another signature or other submodules, as copies for other models have,
leave a block as it was. Lists of images of different sizes take the library's forward.

Shape legend: B batch, N tokens, D width.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fastvit.accelerate.block import (
    FastBlock,
    block_part,
    fast_class,
    library_class,
    original_named,
    original_of,
)
from fastvit.accelerate.plan import Part
from fastvit.accelerate.single import find_single
from fastvit.obstacles import Obstacle, head_obstacle, layer_obstacle, wanted_by
from fastvit.parts import Parts, activation_name, drop_or_none, scale_of

_DINO = "vision_transformer"  # the module's name in torch.hub's folder
_OWN = {
    "ATTENTION": ("Attention",), "LAYER_SCALE": ("LayerScale",), "DROP_PATH": ("DropPath",),
    "MLP": ("Mlp", "SwiGLUFFN", "SwiGLUFFNFused", "SwiGLUFFNAligned"),
}  # fmt: skip
_FORWARDS = {  # arguments after self
    "Block": (["x"], ["x", "return_attention"]),
    "NestedTensorBlock": (["x_or_x_list"],),
}


def take_apart(block: Any) -> Parts | Obstacle:
    """Of a class that `_is_block` knows."""
    kind = library_class(block)
    arguments = list(inspect.signature(kind.forward).parameters)[1:]
    if arguments not in _FORWARDS[kind.__name__]:
        return Obstacle(f"its forward takes {', '.join(arguments)}", lasting=True)
    found = layer_obstacle(block, wanted_by({}, _OWN, _package(kind)))
    if found is not None:
        return found
    layers = block._modules
    missing = {"norm1", "attn", "norm2", "mlp"} - layers.keys()
    if missing:
        return Obstacle(f"{kind.__name__} has no {', '.join(sorted(missing))}", lasting=True)
    attn, mlp = block.attn, block.mlp._modules
    wide = head_obstacle(attn.qkv.in_features // attn.num_heads)
    drop_paths = [layers.get(f"drop_path{i}", layers.get("drop_path")) for i in (1, 2)]
    parts = Parts(
        block.norm1, attn, (attn.qkv,), attn.num_heads, attn.proj, block.norm2, None, None, None,
        scale=float(attn.scale), drop1=drop_or_none(attn.proj_drop),
        scale1=scale_of(layers.get("ls1")), drop_path1=drop_or_none(drop_paths[0]),
        scale2=scale_of(layers.get("ls2")), drop_path2=drop_or_none(drop_paths[1]),
    )  # fmt: skip
    if "w12" in mlp:
        return wide or parts._replace(fc1=mlp["w12"], gate_half=0, activation="silu", fc2=mlp["w3"])
    drop = drop_or_none(mlp["drop"])
    return wide or parts._replace(
        fc1=mlp["fc1"], activation=activation_name(mlp["act"]), fc2=mlp["fc2"],
        hidden_drop=drop, drop2=drop,
    )  # fmt: skip


def _package(kind: type) -> str:
    """``dinov2.layers.`` of dinov2.layers.block, where the block's submodules come from too."""
    name = kind.__module__
    return name if name == _DINO else name.removesuffix("block")


class FastDinoBlock(FastBlock):
    """The forward of every fast block."""

    take_apart = take_apart

    def spells_attention_out(self) -> bool:
        return True

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """[B, N, D] to [B, N, D]."""
        parts = None if args or kwargs or _drops(self) else self.examine(x)
        if parts is None:
            return self.fastvit_original.forward(self, x, *args, **kwargs)
        return self.run(parts, x)


def _drops(block: Any) -> bool:
    """Whether training drops what DINO's repositories each drop in their own way."""
    if not block.training:
        return False
    attn_drop = block.attn.attn_drop  # a module, or in newer versions its rate
    rate = getattr(attn_drop, "p", 0.0) if isinstance(attn_drop, nn.Module) else attn_drop
    return bool(rate or getattr(block, "sample_drop_ratio", 0.0))


FAST: dict[type[nn.Module], type[nn.Module]] = {}  # filled as classes are met


def _is_block(kind: type) -> bool:
    if kind.__name__ not in _FORWARDS:
        return False
    module = kind.__module__
    return module == _DINO or ("dinov2" in module and module.endswith("layers.block"))


def _fast_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The fast subclass of a block's class, made once."""
    if kind not in FAST:
        FAST[kind] = fast_class(kind, FastDinoBlock, globals())
    return FAST[kind]


def __getattr__(name: str) -> Any:
    library = original_named(name)  # its repository has to be there, as for its own pickles
    if library is not None:
        return _fast_class(library)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find(model: nn.Module) -> list[Part]:
    """The blocks of DINO's and DINOv2's repositories inside `model`, and the patch projection and
    last norm of the model that they are in."""
    parts: list[Part] = []
    single: list[Any] = []
    for name, module in model.named_modules():
        kind = original_of(type(module))
        if kind.__name__.endswith("VisionTransformer") and any(
            _is_block(original_of(type(below))) for below in module.modules()
        ):
            embed = getattr(module, "patch_embed", None)
            single += [getattr(embed, "proj", None), getattr(module, "norm", None)]
        if module in single:
            part = find_single(name, module, "DINO")
            parts += [] if part is None else [part]
        if _is_block(kind):
            parts.append(block_part(name, module, _fast_class(kind), None, "DINO"))
    return parts
