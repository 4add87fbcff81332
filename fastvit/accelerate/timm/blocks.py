# pyright: reportPrivateImportUsage=false
"""timm's blocks, norms and attention pooling on our kernels.

Shape legend: B batch, N tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionPoolLatent, LayerNorm, RmsNorm
from timm.models import beit
from timm.models import vision_transformer_relpos as relpos
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

from fastvit import ops
from fastvit.accelerate import block as blocks
from fastvit.accelerate.block import applies, fast
from fastvit.accelerate.timm import compute, structure
from fastvit.parts import Rope, apply_norm, weights_of


class _MaskedBlock(blocks.FastBlock):
    take_apart = compute.take_apart

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, D] to [B, N, D]; `attn_mask` as in `ops.attention`."""
        if is_causal is not False:
            return super().forward(x, attn_mask, is_causal)
        parts = self.examine(x)
        return super().forward(x, attn_mask) if parts is None else self.run(parts, x, attn_mask)


class _RotaryBlock(blocks.FastBlock):
    take_apart = compute.take_apart

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """[B, N, D] to [B, N, D]; `rope` as timm gives it, `attn_mask` as in `ops.attention`."""
        if is_causal is not False:
            return super().forward(x, rope, attn_mask, is_causal)
        parts = self.examine(x)
        if parts is None:
            return super().forward(x, rope, attn_mask)
        return self.run(parts, x, attn_mask, _rope(rope))


def _rope(rope: Tensor | None) -> Rope | None:
    """Of timm's sine beside cosine, [N-P, 2*d], perhaps of each head."""
    if rope is None:
        return None
    sin, cos = rope.chunk(2, dim=-1)
    return cos, sin


class _BiasedBlock(blocks.FastBlock):
    take_apart = compute.take_apart

    def bias(self) -> Tensor | None:
        return compute.relative_bias(self.attn, None)

    def _biased(self, x: Tensor, shared: Tensor | None) -> Tensor:
        parts = self.examine(x)
        if parts is None:
            return super().forward(x, shared)
        return self.run(parts, x, compute.relative_bias(self.attn, shared))


class _RelPosBlock(_BiasedBlock):
    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, N, D]; `shared_rel_pos` is added to the scores, [1, H, N, N]."""
        return self._biased(x, shared_rel_pos)


class _BeitBlock(_BiasedBlock):
    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, N, D]; `shared_rel_pos_bias` is added to the scores, [H, N, N]."""
        return self._biased(x, shared_rel_pos_bias)


_POST_NORM: dict[str, Any] = {
    "take_apart": compute.take_post_norm_apart, "run": compute.run_post_norm,
}  # fmt: skip
_PARALLEL: dict[str, Any] = {
    "take_apart": compute.take_parallel_apart, "run": compute.run_parallel,
}  # fmt: skip
_THINGS: dict[str, Any] = {"take_apart": compute.take_things_apart, "run": compute.run_things}
# timm's class, whose forward it has, and what is not as in `block.FastBlock`
_BLOCKS: list[tuple[type[nn.Module], type[nn.Module], dict[str, Any]]] = [
    (Block, _MaskedBlock, {}),
    (ResPostBlock, _MaskedBlock, _POST_NORM),
    (ParallelScalingBlock, _MaskedBlock, _PARALLEL),
    (ParallelThingsBlock, _MaskedBlock, _THINGS),
    (EvaBlock, _RotaryBlock, {}),
    (EvaBlockPostNorm, _RotaryBlock, _POST_NORM),
    (relpos.RelPosBlock, _RelPosBlock, {}),
    (relpos.ResPostRelPosBlock, _RelPosBlock, _POST_NORM),
    (beit.Block, _BeitBlock, {}),
    *((kind, _MaskedBlock, _PARALLEL) for kind in structure.DIFF_PARALLEL),
]


@fast(AttentionPoolLatent)
class FastAttentionPoolLatent(blocks.FastBlock, AttentionPoolLatent):
    """timm's `AttentionPoolLatent`."""

    take_apart = compute.take_pool_apart

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, D]; `attn_mask` as in `ops.attention`."""
        parts = self.examine(x)
        if parts is not None:
            return compute.pool(self, parts, x, attn_mask)
        timm: Any = super()
        return timm.forward(x) if attn_mask is None else timm.forward(x, attn_mask)


@fast(LayerNorm)
class FastLayerNorm(LayerNorm):
    """timm's `LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return apply_norm(self, x) if applies(self, x) else super().forward(x)


@fast(RmsNorm)
class FastRmsNorm(RmsNorm):
    """timm's `RmsNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        if not applies(self, x):
            return super().forward(x)
        return ops.rms_norm(x, self.weight, self.eps)


@fast(nn.Linear)
class FastLinear(nn.Linear):
    """torch's `Linear`, where it embeds patches."""

    def forward(self, input: Tensor) -> Tensor:
        if not applies(self, input) or structure.single_obstacle(self, frozenset({FastLinear})):
            return super().forward(input)
        return ops.linear(input, *weights_of(self))


FAST: dict[type[nn.Module], type[nn.Module]] = {
    kind: blocks.fast_class(kind, base, globals(), **members) for kind, base, members in _BLOCKS
}
FastBlock = FAST[Block]
FAST |= {
    AttentionPoolLatent: FastAttentionPoolLatent,
    LayerNorm: FastLayerNorm,
    RmsNorm: FastRmsNorm,
    nn.Linear: FastLinear,
}
