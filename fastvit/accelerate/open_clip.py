"""open_clip's vision towers: their blocks, patch projection and norms on our kernels.

Towers that open_clip takes from timm or transformers are those libraries'. Text towers are left
alone.

Shape legend: B batch, N tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastvit._compat import import_torchvision
from fastvit.accelerate.block import FastBlock, applies, block_part, fast, original_of
from fastvit.accelerate.plan import Part
from fastvit.accelerate.single import find_single, single_part
from fastvit.obstacles import Obstacle, layer_obstacle, mha_obstacle, patched, wanted_by
from fastvit.parts import Parts, activation_name, apply_norm, packed_weights_of, scale_of

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

_WANTED = wanted_by({
    "norm": frozenset({LayerNorm, LayerNormFp32}), "attention": frozenset({nn.MultiheadAttention}),
    "out_proj": frozenset({NonDynamicallyQuantizableLinear}), "mlp": frozenset({nn.Sequential}),
    "activation": frozenset({QuickGELU}), "layer scale": frozenset({LayerScale}),
})  # fmt: skip


@fast(ResidualAttentionBlock)
class FastResidualAttentionBlock(FastBlock, ResidualAttentionBlock):
    """open_clip's `ResidualAttentionBlock` on our kernels."""

    watched = staticmethod(lambda block: [(ResidualAttentionBlock.__dict__, ("attention",))])

    @staticmethod
    def take_apart(block: Any) -> Parts | Obstacle:
        """Of a `ResidualAttentionBlock`."""
        attn, mlp = block.attn, block.mlp
        found = layer_obstacle(block, _WANTED) or mha_obstacle(attn)
        found = found or patched(ResidualAttentionBlock, "attention")
        if "attention" in block.__dict__:
            found = Obstacle("has an attention of its own", lasting=False)
        return found or Parts(
            block.ln_1, attn, (attn,), attn.num_heads, attn.out_proj,
            block.ln_2, mlp.c_fc, activation_name(mlp.gelu), mlp.c_proj,
            qkv_weights=packed_weights_of, dropout=attn.dropout,
            scale1=scale_of(block.ls_1), scale2=scale_of(block.ls_2),
        )  # fmt: skip

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, N, D] to [B, N, D]; with other keys or a mask as open_clip does it."""
        plain = k_x is None and v_x is None and attn_mask is None
        parts = self.examine(q_x) if plain else None
        return super().forward(q_x, k_x, v_x, attn_mask) if parts is None else self.run(parts, q_x)


def _norm(norm: Any, x: Tensor) -> Tensor:
    """open_clip's norms give their input's dtype, under autocast too."""
    return apply_norm(norm, x).to(x.dtype)


@fast(LayerNorm)
class FastLayerNorm(LayerNorm):
    """open_clip's `LayerNorm` on our kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return _norm(self, x) if applies(self, x) else super().forward(x)


@fast(LayerNormFp32)
class FastLayerNormFp32(LayerNormFp32):
    """open_clip's `LayerNormFp32` on our kernel, which has its statistics in float32 anyway."""

    def forward(self, x: Tensor) -> Tensor:
        return _norm(self, x) if applies(self, x) else super().forward(x)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    ResidualAttentionBlock: FastResidualAttentionBlock,
    LayerNorm: FastLayerNorm,
    LayerNormFp32: FastLayerNormFp32,
}


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
        kind = original_of(type(module))
        if issubclass(kind, ResidualAttentionBlock | CustomResidualAttentionBlock):
            fast = FAST.get(kind) or Obstacle(f"{kind.__name__} has no fused form yet", True)
            parts.append(block_part(name, module, fast, None, "open_clip"))
        elif module in (tower.conv1, tower.ln_pre, tower.ln_post):
            if kind in FAST:
                part = single_part(name, module, FAST[kind], "layer_norm", "open_clip")
            else:
                part = find_single(name, module, "open_clip")
            parts += [] if part is None else [part]
    return parts
