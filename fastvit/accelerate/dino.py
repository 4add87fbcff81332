"""Blocks of DINO's and DINOv2's own repositories (torch.hub and copies of it) on our kernels.

Their packages are on no index, so their classes are known by where they were defined and by how
they are built: `Block` of DINO's ``vision_transformer``, `Block` and `NestedTensorBlock` of a
``dinov2...layers.block``. Another signature or other submodules, as copies for other models have,
leave a block as it was. Lists of images of different sizes take the library's forward.

Shape legend: B batch, N tokens, D width.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvit import layers, ops
from fastvit.accelerate import common
from fastvit.accelerate.common import GLOBAL_HOOK, Obstacle
from fastvit.accelerate.plan import Part

_DINO = "vision_transformer"  # the module's name in torch.hub's folder
_LINEAR = frozenset({nn.Linear})
_NORM = frozenset({nn.LayerNorm})
_IDENTITY = frozenset({nn.Identity})
_DROPOUT = _IDENTITY | {nn.Dropout}
_NOTHING: tuple[frozenset[type], tuple[str, ...]] = (frozenset(), ())
# what each submodule may be, by its name: exact classes, and names of the library's own
_KINDS: dict[str, tuple[frozenset[type], tuple[str, ...]]] = {
    "norm1": (_NORM, ()), "norm2": (_NORM, ()), "qkv": (_LINEAR, ()), "proj": (_LINEAR, ()),
    "attn": (frozenset(), ("Attention", "MemEffAttention")),
    "attn_drop": (_DROPOUT, ()), "proj_drop": (_DROPOUT, ()), "drop": (_DROPOUT, ()),
    "ls1": (_IDENTITY, ("LayerScale",)), "ls2": (_IDENTITY, ("LayerScale",)),
    "drop_path": (_IDENTITY, ("DropPath",)), "drop_path1": (_IDENTITY, ("DropPath",)),
    "drop_path2": (_IDENTITY, ("DropPath",)),
    "mlp": (frozenset(), ("Mlp", "SwiGLUFFN", "SwiGLUFFNFused", "SwiGLUFFNAligned")),
    "fc1": (_LINEAR, ()), "fc2": (_LINEAR, ()), "w12": (_LINEAR, ()), "w3": (_LINEAR, ()),
    "act": (frozenset({nn.GELU, nn.SiLU, nn.ReLU}), ()),
}  # fmt: skip
_FORWARDS = {  # arguments after self
    "Block": (["x"], ["x", "return_attention"]),
    "NestedTensorBlock": (["x_or_x_list"],),
}


def block_obstacle(block: Any) -> Obstacle | None:
    """Why `block`, of a class that `_is_block` knows, runs its library's forward now."""
    if _has_any_global_hook():
        return GLOBAL_HOOK
    kind = ORIGINAL.get(type(block), type(block))
    found = common.layer_obstacle(block, _known_in(_package(kind)))
    if found is not None:
        return found
    missing = {"norm1", "attn", "norm2", "mlp"} - block._modules.keys()
    if missing:
        return Obstacle(f"{kind.__name__} has no {', '.join(sorted(missing))}", lasting=True)
    return common.head_obstacle(block.attn.qkv.in_features // block.attn.num_heads)


def _package(kind: type) -> str:
    """``dinov2.layers.`` of dinov2.layers.block, where the block's submodules come from too."""
    name = kind.__module__
    return name if name == _DINO else name.removesuffix("block")


def _known_in(package: str) -> Any:
    def knows(name: str, kind: type) -> bool:
        exact, own = _KINDS.get(name, _NOTHING)
        return kind in exact or (kind.__module__.startswith(package) and kind.__name__ in own)

    return knows


class FastBlock(nn.Module):
    """The forward of every fast block; each has the library's class beside it."""

    original: ClassVar[Any]

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """[B, N, D] to [B, N, D]."""
        block: Any = self
        plain = isinstance(x, Tensor) and not args and not kwargs
        if not plain or _drops(block) or block_obstacle(block) is not None:
            return self.original.forward(self, x, *args, **kwargs)
        return _fused(block, x)


def _drops(block: Any) -> bool:
    """Whether training drops what DINO's repositories each drop in their own way."""
    if not block.training:
        return False
    attn_drop = block.attn.attn_drop  # a module, or in newer versions its rate
    rate = getattr(attn_drop, "p", 0.0) if isinstance(attn_drop, nn.Module) else attn_drop
    return bool(rate or getattr(block, "sample_drop_ratio", 0.0))


def _fused(block: Any, x: Tensor) -> Tensor:
    attn, mlp = block.attn, block.mlp
    qkv = ops.linear(layers.apply_norm(block.norm1, x), attn.qkv.weight, attn.qkv.bias)
    out = ops.attention_qkv(qkv, attn.num_heads, None, 0.0, float(attn.scale))
    x = common.add_branch(
        x, out, attn.proj, dropout=attn.proj_drop, scale=_gamma(block, "ls1"),
        drop_path=_drop_path(block, 1),
    )  # fmt: skip
    h = layers.apply_norm(block.norm2, x)
    rest: dict[str, Any] = {"scale": _gamma(block, "ls2"), "drop_path": _drop_path(block, 2)}
    if "w12" in mlp._modules:
        gate, value = ops.linear(h, mlp.w12.weight, mlp.w12.bias).chunk(2, dim=-1)
        return common.add_branch(x, ops.ACTIVATIONS["silu"](gate) * value, mlp.w3, **rest)
    return common.add_mlp(
        x, h, mlp.fc1, layers.activation_name(mlp.act), mlp.fc2,
        hidden_dropout=mlp.drop, dropout=mlp.drop, **rest,
    )  # fmt: skip


def _gamma(block: Any, name: str) -> Tensor | None:
    return getattr(block._modules.get(name), "gamma", None)


def _drop_path(block: Any, half: int) -> nn.Module | None:
    modules = block._modules
    return modules.get(f"drop_path{half}", modules.get("drop_path"))


FAST: dict[type[nn.Module], type[nn.Module]] = {}  # filled as classes are met
ORIGINAL: dict[type[nn.Module], type[nn.Module]] = dict(common.ORIGINAL)


def _is_block(kind: type) -> bool:
    if kind.__name__ not in _FORWARDS:
        return False
    module = kind.__module__
    return module == _DINO or ("dinov2" in module and module.endswith("layers.block"))


def _fast_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The fast subclass of a block's class, made once; its name in this module tells unpickling
    where the library's class is."""
    if kind not in FAST:
        name = f"Fast_{kind.__module__.replace('.', '__')}__{kind.__name__}"
        doc = f"`{kind.__module__}.{kind.__name__}` on our kernels."
        members = {"__module__": __name__, "__doc__": doc, "original": kind}
        FAST[kind] = type(name, (FastBlock, kind), members)
        ORIGINAL[FAST[kind]] = kind
        globals()[name] = FAST[kind]
    return FAST[kind]


def __getattr__(name: str) -> Any:
    path = name.removeprefix("Fast_").replace("__", ".")
    module, _, kind = path.rpartition(".")
    library = sys.modules.get(module)  # its repository has to be there, as for its own pickles
    if name.startswith("Fast_") and library is not None:
        return _fast_class(getattr(library, kind))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find(model: nn.Module) -> list[Part]:
    """The blocks of DINO's and DINOv2's repositories inside `model`, and the patch projection and
    last norm of the model that they are in."""
    parts: list[Part] = []
    single: list[Any] = []
    for name, module in model.named_modules():
        kind = ORIGINAL.get(type(module), type(module))
        if kind.__name__.endswith("VisionTransformer") and any(
            _is_block(ORIGINAL.get(type(below), type(below))) for below in module.modules()
        ):
            embed = getattr(module, "patch_embed", None)
            single += [getattr(embed, "proj", None), getattr(module, "norm", None)]
        if module in single:
            part = common.find_single(name, module, "DINO")
            parts += [] if part is None else [part]
        if _is_block(kind):
            parts.append(_block_part(name, module, kind))
    return parts


def _block_part(name: str, block: nn.Module, kind: type[nn.Module]) -> Part:
    arguments = list(inspect.signature(kind.forward).parameters)[1:]
    if arguments in _FORWARDS[kind.__name__]:
        obstacle = block_obstacle(block)
    else:
        obstacle = Obstacle(f"its forward takes {', '.join(arguments)}", lasting=True)
    gated = obstacle is None and "w12" in block.get_submodule("mlp")._modules
    runs = f"layer_norm, linear, attention_qkv, {'linear' if gated else 'mlp'}"
    row = common.make_row(name, kind, runs, "DINO", obstacle, block=True)
    stays = obstacle is not None and obstacle.lasting
    return Part(block, None if stays else _fast_class(kind), row)
