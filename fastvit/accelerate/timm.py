# pyright: reportPrivateImportUsage=false
# (timm's versions agree on what vision_transformer.py uses, not on the files it comes from)
"""timm's Vision Transformers: which of their modules run on our kernels, and how.

Each fast class is a subclass of the timm class whose place it takes. It looks at its submodules at
every forward, and leaves the call to timm's forward where they carry hooks or have been replaced,
so that nothing a user adds later is ignored.

Shape legend: B batch, C channels, N patch tokens, P prefix tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvit import layers, ops
from fastvit._compat import import_timm
from fastvit.accelerate import graphs
from fastvit.accelerate.plan import PRECISION, Part, PlanRow

import_timm()  # before all else of timm; unpickling an accelerated model comes here first

from timm import layers as timm_layers  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    Attention,
    Block,
    DropPath,
    LayerScale,
    Mlp,
    PatchEmbed,
    VisionTransformer,
    checkpoint_seq,
    resample_abs_pos_embed,
)

MAX_HEAD_DIM = 256
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# The exact classes each submodule may have in the fused form.
Expected = dict[str, frozenset[type]]
_NORM = frozenset({nn.LayerNorm, timm_layers.LayerNorm})
_ANY_NORM = _NORM | {nn.Identity}
_LINEAR = frozenset({nn.Linear})
_DROPOUT = frozenset({nn.Dropout, nn.Identity})
_DROP_PATH = frozenset({DropPath, nn.Identity})
_LAYER_SCALE = frozenset({LayerScale, nn.Identity})
_ACTIVATION = frozenset(
    {nn.GELU, nn.ReLU, nn.SiLU, timm_layers.GELU, timm_layers.GELUTanh, timm_layers.QuickGELU}
)
_BLOCK: Expected = {
    "norm1": _NORM, "attn": frozenset({Attention}), "ls1": _LAYER_SCALE, "drop_path1": _DROP_PATH,
    "norm2": _NORM, "mlp": frozenset({Mlp}), "ls2": _LAYER_SCALE, "drop_path2": _DROP_PATH,
}  # fmt: skip
_ATTENTION: Expected = {
    "qkv": _LINEAR, "q_norm": _ANY_NORM, "k_norm": _ANY_NORM, "attn_drop": frozenset({nn.Dropout}),
    "norm": _ANY_NORM, "proj": _LINEAR, "proj_drop": _DROPOUT,
}  # fmt: skip
_MLP: Expected = {
    "fc1": _LINEAR, "act": _ACTIVATION, "drop1": _DROPOUT, "norm": _ANY_NORM,
    "fc2": _LINEAR, "drop2": _DROPOUT,
}  # fmt: skip
_CONV = frozenset({nn.Conv2d})
_IDENTITY = frozenset({nn.Identity})
_PLAIN_WEIGHT = frozenset({nn.Parameter, Tensor, type(None)})  # not quantised, not sharded


class Obstacle(NamedTuple):
    """Why a module runs timm's forward."""

    reason: str
    lasting: bool  # False for a hook, which can be taken away again


# --------------------------------------------------------------------------- what can be fused


def _obstacle(module: nn.Module, kinds: Collection[type]) -> Obstacle | None:
    """Why an op may not stand in for calling `module`, which should be of one of `kinds`."""
    if type(module) not in kinds:
        fused = " or ".join(sorted({kind.__name__ for kind in kinds})) or "nothing of that name"
        return Obstacle(f"is {type(module).__name__}; fused is {fused}", lasting=True)
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    ):
        return Obstacle("has a hook or a forward of its own", lasting=False)
    weight = type(state["_parameters"].get("weight"))
    # torch.export puts fake tensors in the place of parameters
    if weight not in _PLAIN_WEIGHT and not torch.compiler.is_exporting():
        return Obstacle(f"has a weight of class {weight.__name__}", lasting=True)
    return None


def _child_obstacle(parent: nn.Module, expected: Expected, prefix: str = "") -> Obstacle | None:
    for name, child in parent._modules.items():
        found = None if child is None else _obstacle(child, expected.get(name, ()))
        if found is not None:
            return Obstacle(f"{prefix}{name} {found.reason}", found.lasting)
    return None


def block_obstacle(block: Any) -> Obstacle | None:
    """Why `block`, of timm's exact class `Block`, runs timm's forward now; None if it need not."""
    if _has_any_global_hook():
        return Obstacle("a hook on every module is registered", lasting=False)
    obstacle = _child_obstacle(block, _BLOCK)
    if obstacle is not None:
        return obstacle
    attn = block.attn
    if attn.head_dim > MAX_HEAD_DIM:
        return Obstacle(f"head dimension {attn.head_dim} is above {MAX_HEAD_DIM}", lasting=True)
    if not attn.fused_attn and attn.scale != attn.head_dim**-0.5:
        return Obstacle(f"attn.scale is {attn.scale}, not head_dim**-0.5", lasting=True)
    return _child_obstacle(attn, _ATTENTION, "attn.") or _child_obstacle(block.mlp, _MLP, "mlp.")


def patch_obstacle(embed: Any) -> Obstacle | None:
    """As `block_obstacle`, for timm's exact class `PatchEmbed`; its norm may be any."""
    if _has_any_global_hook():
        return Obstacle("a hook on every module is registered", lasting=False)
    proj = embed.proj
    found = _obstacle(proj, _CONV)
    if found is not None:
        return Obstacle(f"proj {found.reason}", found.lasting)
    tiles = proj.stride == proj.kernel_size and proj.padding == (0, 0) and proj.dilation == (1, 1)
    if not tiles or proj.groups != 1:
        return Obstacle(f"{proj} does not cut patches side by side", lasting=True)
    if not embed.flatten and embed.output_fmt != "NHWC":
        return Obstacle(f"output format is {embed.output_fmt.value}", lasting=True)
    return None


def embeds_positions(vit: Any) -> bool:
    """Whether one kernel can do all of `patch_embed` and `_pos_embed` now, exactly."""
    embed = vit.patch_embed
    return (
        _obstacle(embed, (PatchEmbed, FastPatchEmbed)) is None
        and _obstacle(embed.norm, _IDENTITY) is None
        and "_pos_embed" not in vit.__dict__
        and vit.pos_embed is not None
        and embed.flatten != vit.dynamic_img_size  # else timm's own path objects
        and patch_obstacle(embed) is None
    )


# --------------------------------------------------------------------------- what runs


def _pixels(embed: Any, images: Tensor) -> Tensor | None:
    """What to cut into patches, or None where timm's own forward is to pad, crop or object."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4:
        return None
    height, width = images.shape[2:]
    if embed.img_size is not None and embed.strict_img_size and (height, width) != embed.img_size:
        return None
    patch_h, patch_w = embed.patch_size
    if embed.dynamic_img_pad:
        return F.pad(images, (0, -width % patch_w, 0, -height % patch_h))
    return None if height % patch_h or width % patch_w else images


class FastBlock(Block):
    """timm's `Block` on our kernels."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, D] to [B, N, D]; `attn_mask` as in `ops.attention`."""
        if is_causal is not False or not isinstance(x, Tensor):  # torch.fx traces with proxies
            return super().forward(x, attn_mask, is_causal)
        if block_obstacle(self) is not None:
            return super().forward(x, attn_mask)
        return layers.fused_block(self, x, attn_mask)


class FastPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` on our kernel: projection and bias; `FastVisionTransformer` adds more."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) to (B, N, D) or (B, H/p, W/p, D)
        pixels = None if patch_obstacle(self) is not None else _pixels(self, x)
        if pixels is None:
            return super().forward(x)
        tokens = ops.patch_embed(pixels, self.proj.weight, self.proj.bias)
        if not self.flatten:
            tokens = tokens.unflatten(1, (-1, pixels.shape[3] // self.proj.kernel_size[1]))
        return self.norm(tokens)


class FastLayerNorm(timm_layers.LayerNorm):
    """timm's `LayerNorm` on our kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return layers.apply_norm(self, x) if isinstance(x, Tensor) else super().forward(x)


class FastTorchLayerNorm(nn.LayerNorm):
    """torch's `LayerNorm` on our kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return (
            layers.apply_norm(self, input) if isinstance(input, Tensor) else super().forward(input)
        )


class FastVisionTransformer(graphs.Graphed, VisionTransformer):
    """timm's `VisionTransformer`: from pixels to finished tokens in one kernel, `precision` and
    `cuda_graphs`."""

    def _prefix_tokens(self) -> list[Tensor | None]:
        return [self.cls_token, self.reg_token]

    def _embed(self, x: Tensor) -> Tensor:
        """`_pos_embed` of `patch_embed`: (B, C, H, W) to (B, P+N, D)."""
        embed: Any = self.patch_embed
        pixels = _pixels(embed, x) if embeds_positions(self) else None
        if pixels is None:
            return self._pos_embed(embed(x))
        weight = embed.proj.weight
        grid = [pixels.shape[2] // weight.shape[2], pixels.shape[3] // weight.shape[3]]
        own_positions = 0 if self.no_embed_class else self.num_prefix_tokens
        pos_embed: Any = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = resample_abs_pos_embed(
                pos_embed, grid, embed.grid_size, num_prefix_tokens=own_positions
            )
        if pos_embed.shape[1] != grid[0] * grid[1] + own_positions:
            return self._pos_embed(embed(x))  # which says what is wrong
        tokens = [token for token in self._prefix_tokens() if token is not None]
        prefix = torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0] if tokens else None
        x = ops.patch_embed(
            pixels,
            weight,
            embed.proj.bias,
            pos_embed=pos_embed[0],
            prefix=None if prefix is None else prefix[0],
        )
        return self.pos_drop(x)

    def _features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if not isinstance(x, Tensor) or is_causal:
            return super().forward_features(x, attn_mask, is_causal)
        x = self.norm_pre(self.patch_drop(self._embed(x)))
        if attn_mask is not None:
            for block in self.blocks.children():
                x = block(x, attn_mask=attn_mask)
        elif self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, C, H, W] to [B, P+N, D]."""
        return _at_precision(self, self._features, x, *args, **kwargs)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's."""
        return _at_precision(self, super().forward_intermediates, x, *args, **kwargs)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, C, H, W] to logits [B, classes]."""
        options: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
        if is_causal is not False:  # timm before 1.0.26 does not know the word
            options["is_causal"] = is_causal
        forward = functools.partial(_at_precision, self, super().forward)
        return graphs.run(self, forward, x, **options)


class FastVisionTransformerDistilled(FastVisionTransformer, VisionTransformerDistilled):
    """timm's `VisionTransformerDistilled`, as `FastVisionTransformer`."""

    def _prefix_tokens(self) -> list[Tensor | None]:
        return [self.cls_token, self.dist_token]


def _at_precision(
    vit: nn.Module, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """`forward`, under autocast if `accelerate` was given a precision; results in x's dtype."""
    precision = vit.__dict__.get(PRECISION)
    if precision is None or not isinstance(x, Tensor):
        return forward(x, *args, **kwargs)
    with torch.autocast(x.device.type, AUTOCAST[precision]):
        return _cast(forward(x, *args, **kwargs), x.dtype)


def _cast(result: Any, dtype: torch.dtype) -> Any:
    if isinstance(result, Tensor):
        return result.to(dtype)
    if isinstance(result, dict):
        return {name: _cast(value, dtype) for name, value in result.items()}
    return type(result)(_cast(value, dtype) for value in result)


# --------------------------------------------------------------------------- the plan

FAST: dict[type[nn.Module], type[nn.Module]] = {
    Block: FastBlock,
    PatchEmbed: FastPatchEmbed,
    VisionTransformer: FastVisionTransformer,
    VisionTransformerDistilled: FastVisionTransformerDistilled,
    timm_layers.LayerNorm: FastLayerNorm,
    nn.LayerNorm: FastTorchLayerNorm,
}
ORIGINAL = {fast: original for original, fast in FAST.items()}


def find(model: nn.Module) -> list[Part]:
    """The modules inside `model` that this file knows, fused or not, in the model's order."""
    parts: list[Part] = []
    roles: dict[nn.Module, str] = {}  # of the direct children of timm's models
    for name, module in model.named_modules():
        kind = ORIGINAL.get(type(module), type(module))
        if kind in (VisionTransformer, VisionTransformerDistilled):
            parts.append(Part(module, FAST[kind], row=None, graphed=FAST[kind]))
            roles |= {child: role for role, child in module.named_children()}
            if embeds_positions(module):
                roles[module.get_submodule("patch_embed")] = "patch_embed with positions"
            continue
        found = _look_at(module, kind, roles.get(module, ""))
        if found is None:
            continue
        runs, obstacle = found
        row = PlanRow(
            module=name,
            type=kind.__name__,
            fused=obstacle is None,
            runs=runs if obstacle is None else "timm",
            reason=None if obstacle is None else obstacle.reason,
        )
        stays = obstacle is not None and obstacle.lasting
        parts.append(Part(module, None if stays else FAST[kind], row))
    return parts


def _look_at(module: Any, kind: type, role: str) -> tuple[str, Obstacle | None] | None:
    """The ops that a module can run and what stands in the way; None for one of no interest."""
    if kind is Block:
        obstacle = block_obstacle(module)
        normed = obstacle is None and type(module.attn.q_norm) is not nn.Identity
        return f"layer_norm, linear, {'attention' if normed else 'attention_qkv'}, mlp", obstacle
    if kind is PatchEmbed:
        positions = ", positions and prefix tokens" if role.endswith("positions") else ""
        return f"patch_embed{positions}", patch_obstacle(module)
    if role in ("norm_pre", "norm", "fc_norm") and kind is not nn.Identity:
        return "layer_norm", _norm_obstacle(module, kind)
    of_timm = kind.__module__.startswith("timm.") and kind.__name__.endswith("Block")
    if of_timm or isinstance(module, Block) or role in ("patch_embed", "attn_pool"):
        return "", Obstacle(f"{kind.__name__} has no fused form yet", lasting=True)
    return None


def _norm_obstacle(norm: Any, kind: type) -> Obstacle | None:
    if kind not in _NORM:
        return Obstacle(f"{kind.__name__} is not fused; LayerNorm is", lasting=True)
    if getattr(norm, "_fast_norm", False):
        return Obstacle("timm's fast norm keeps to autocast's dtype", lasting=True)
    return None
