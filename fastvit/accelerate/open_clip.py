"""open_clip's vision towers: their blocks, patch projection and norms on our kernels.

Towers that open_clip takes from timm or transformers are those libraries'. Text towers are left
alone. Each fast class is a subclass of open_clip's; where a layer of a block carries a hook or has
been replaced, that block runs open_clip's forward.

Shape legend: B batch, N tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from fastvit import layers, ops
from fastvit._compat import import_torchvision
from fastvit.accelerate import common
from fastvit.accelerate.common import GLOBAL_HOOK, Obstacle
from fastvit.accelerate.plan import Part

import_torchvision()  # before open_clip, which imports it

from open_clip.transformer import (  # noqa: E402
    CustomResidualAttentionBlock,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    QuickGELU,
    ResidualAttentionBlock,
    VisionTransformer,
)

_NORM = frozenset({nn.LayerNorm, LayerNorm, LayerNormFp32})
_LINEAR = frozenset({nn.Linear})
_LAYER_SCALE = frozenset({LayerScale, nn.Identity})
_KINDS: dict[str, frozenset[type]] = {
    "ln_1": _NORM, "attn": frozenset({nn.MultiheadAttention}), "ls_1": _LAYER_SCALE,
    "out_proj": frozenset({NonDynamicallyQuantizableLinear}), "ln_2": _NORM,
    "mlp": frozenset({nn.Sequential}), "c_fc": _LINEAR, "gelu": frozenset({nn.GELU, QuickGELU}),
    "c_proj": _LINEAR, "ls_2": _LAYER_SCALE,
}  # fmt: skip


def _knows(name: str, kind: type) -> bool:
    return kind in _KINDS.get(name, ())


def block_obstacle(block: Any) -> Obstacle | None:
    """Why `block`, a `ResidualAttentionBlock`, runs open_clip's forward now."""
    if _has_any_global_hook():
        return GLOBAL_HOOK
    return common.layer_obstacle(block, _knows) or common.mha_obstacle(block.attn, "attn")


def _norm(norm: Any, x: Tensor) -> Tensor:
    """open_clip's norms give their input's dtype, under autocast too."""
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps).to(x.dtype)


class FastResidualAttentionBlock(ResidualAttentionBlock):
    """open_clip's `ResidualAttentionBlock` on our kernels."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, N, D] to [B, N, D]; with other keys or a mask as open_clip does it."""
        others = (k_x, v_x, attn_mask)
        plain = isinstance(q_x, Tensor) and all(other is None for other in others)
        if not plain or block_obstacle(self) is not None:
            return super().forward(q_x, *others)
        mlp: Any = self.mlp
        out = common.attend_mha(self.attn, _norm(self.ln_1, q_x))
        scale = getattr(self.ls_1, "gamma", None)
        x = common.add_branch(q_x, out, self.attn.out_proj, scale=scale)
        return common.add_mlp(
            x, _norm(self.ln_2, x), mlp.c_fc, layers.activation_name(mlp.gelu), mlp.c_proj,
            scale=getattr(self.ls_2, "gamma", None),
        )  # fmt: skip


class FastLayerNorm(LayerNorm):
    """open_clip's `LayerNorm` on our kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return _norm(self, x) if isinstance(x, Tensor) else super().forward(x)


class FastLayerNormFp32(LayerNormFp32):
    """open_clip's `LayerNormFp32` on our kernel, which has its statistics in float32 anyway."""

    def forward(self, x: Tensor) -> Tensor:
        return _norm(self, x) if isinstance(x, Tensor) else super().forward(x)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    ResidualAttentionBlock: FastResidualAttentionBlock,
    LayerNorm: FastLayerNorm,
    LayerNormFp32: FastLayerNormFp32,
}
ORIGINAL = common.ORIGINAL | {fast: original for original, fast in FAST.items()}


def find(model: nn.Module) -> list[Part]:
    """The blocks, patch projections and norms of open_clip's vision towers inside `model`."""
    parts: list[Part] = []
    towers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer):
            towers[f"{name}." if name else ""] = module
        tower = next((t for prefix, t in towers.items() if name.startswith(prefix)), None)
        if tower is None:
            continue
        kind = ORIGINAL.get(type(module), type(module))
        if issubclass(kind, ResidualAttentionBlock | CustomResidualAttentionBlock):
            parts.append(_block_part(name, module, kind))
        elif module in (tower.conv1, tower.ln_pre, tower.ln_post):
            parts += _single_parts(name, module, kind)
    return parts


def _single_parts(name: str, module: nn.Module, kind: type[nn.Module]) -> list[Part]:
    if kind in FAST:
        row = common.make_row(name, kind, "layer_norm", "open_clip", None)
        return [Part(module, FAST[kind], row)]
    part = common.find_single(name, module, "open_clip")
    return [] if part is None else [part]


def _block_part(name: str, block: nn.Module, kind: type) -> Part:
    obstacle = Obstacle(f"{kind.__name__} has no fused form yet", lasting=True)
    if kind is ResidualAttentionBlock:
        obstacle = block_obstacle(block)
    runs = "layer_norm, linear, attention_qkv, mlp"
    row = common.make_row(name, kind, runs, "open_clip", obstacle, block=True)
    stays = obstacle is not None and obstacle.lasting
    return Part(block, None if stays else FAST[kind], row)
