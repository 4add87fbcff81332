# pyright: reportPrivateImportUsage=false
"""timm's blocks, norms and attention pooling on our kernels.

Each class is a subclass of the timm class whose place it takes. It looks at its submodules at every
forward, and leaves the call to timm's forward where they carry hooks or have been replaced, so that
nothing a user adds later is ignored.

Shape legend: B batch, N tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from timm.layers import AttentionPoolLatent, LayerNorm, Mlp, RmsNorm
from timm.models import beit, vision_transformer
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from fastvit import layers, ops
from fastvit.accelerate import inference
from fastvit.accelerate.timm import compute, structure


class _FastBlock(nn.Module):
    """Base of the blocks: what they compute, and whether they may."""

    _timm: ClassVar[type[nn.Module]]
    _compute: ClassVar[Callable[..., Tensor]]

    def _runs_timm(self, x: object) -> bool:
        # torch.fx traces with proxies
        return not isinstance(x, Tensor) or structure.obstacle(self, self._timm) is not None


class _MaskedBlock(_FastBlock):
    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, D] to [B, N, D]; `attn_mask` as in `ops.attention`."""
        if is_causal is not False:
            return super().forward(x, attn_mask, is_causal)
        if self._runs_timm(x):
            return super().forward(x, attn_mask)
        return type(self)._compute(self, x, attn_mask)


class _RotaryBlock(_FastBlock):
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
        if self._runs_timm(x):
            return super().forward(x, rope, attn_mask)
        return type(self)._compute(self, x, attn_mask, rope)


class _BiasedBlock(_FastBlock):
    def _biased(self, x: Tensor, shared: Tensor | None) -> Tensor:
        if self._runs_timm(x):
            return super().forward(x, shared)
        return type(self)._compute(self, x, compute.relative_bias(self.attn, shared))


def _block(block: Any, x: Tensor, attn_mask: Tensor | None) -> Tensor:
    """`layers.fused_block` for what our own ViTs are made of, else the same of other parts."""
    run = inference.run_block if is_own(block) else compute.pre_norm_block
    return run(block, x, attn_mask)


def is_own(block: Any) -> bool:
    """Whether `block`, without obstacles, is made of what `layers.fused_block` knows."""
    attn, mlp = block.attn, block.mlp
    return type(attn) is Attention and getattr(attn, "gate", None) is None and type(mlp) is Mlp


class FastBlock(_MaskedBlock, Block):
    """timm's `Block`."""

    _timm, _compute = Block, _block

    def fuses(self, x: object) -> bool:
        """Whether `layers.fused_block` can stand for its forward now."""
        return not self._runs_timm(x) and is_own(self)


class FastResPostBlock(_MaskedBlock, ResPostBlock):
    """timm's `ResPostBlock`."""

    _timm, _compute = ResPostBlock, compute.post_norm_block


class FastParallelScalingBlock(_MaskedBlock, ParallelScalingBlock):
    """timm's `ParallelScalingBlock`."""

    _timm, _compute = ParallelScalingBlock, compute.parallel_block


class FastParallelThingsBlock(_MaskedBlock, ParallelThingsBlock):
    """timm's `ParallelThingsBlock`."""

    _timm, _compute = ParallelThingsBlock, compute.parallel_things_block


class FastEvaBlock(_RotaryBlock, EvaBlock):
    """timm's `EvaBlock`."""

    _timm, _compute = EvaBlock, compute.pre_norm_block


class FastEvaBlockPostNorm(_RotaryBlock, EvaBlockPostNorm):
    """timm's `EvaBlockPostNorm`."""

    _timm, _compute = EvaBlockPostNorm, compute.post_norm_block


class FastRelPosBlock(_BiasedBlock, RelPosBlock):
    """timm's `RelPosBlock`."""

    _timm, _compute = RelPosBlock, compute.pre_norm_block

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, N, D]; `shared_rel_pos` is added to the scores, [1, H, N, N]."""
        return self._biased(x, shared_rel_pos)


class FastResPostRelPosBlock(_BiasedBlock, ResPostRelPosBlock):
    """timm's `ResPostRelPosBlock`."""

    _timm, _compute = ResPostRelPosBlock, compute.post_norm_block

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, N, D]; `shared_rel_pos` is added to the scores, [1, H, N, N]."""
        return self._biased(x, shared_rel_pos)


class FastBeitBlock(_BiasedBlock, beit.Block):
    """BEiT's `Block` in timm."""

    _timm, _compute = beit.Block, compute.pre_norm_block

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, N, D]; `shared_rel_pos_bias` is added to the scores, [H, N, N]."""
        return self._biased(x, shared_rel_pos_bias)


class FastAttentionPoolLatent(AttentionPoolLatent):
    """timm's `AttentionPoolLatent`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, D]; `attn_mask` as in `ops.attention`."""
        if isinstance(x, Tensor) and structure.obstacle(self, AttentionPoolLatent) is None:
            return compute.pool(self, x, attn_mask)
        return super().forward(x) if attn_mask is None else super().forward(x, attn_mask)


class FastLayerNorm(LayerNorm):
    """timm's `LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return layers.apply_norm(self, x) if isinstance(x, Tensor) else super().forward(x)


class FastRmsNorm(RmsNorm):
    """timm's `RmsNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            ops.rms_norm(x, self.weight, self.eps) if isinstance(x, Tensor) else super().forward(x)
        )


class FastLinear(nn.Linear):
    """torch's `Linear`, where it embeds patches."""

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or structure.obstacle_of(self, (FastLinear,)) is not None:
            return super().forward(input)
        return ops.linear(input, self.weight, self.bias)


_BLOCKS: list[type[_FastBlock]] = [
    FastBlock, FastResPostBlock, FastParallelScalingBlock, FastParallelThingsBlock, FastEvaBlock,
    FastEvaBlockPostNorm, FastRelPosBlock, FastResPostRelPosBlock, FastBeitBlock,
]  # fmt: skip

if hasattr(vision_transformer, "DiffParallelScalingBlock"):  # not in older timm

    class FastDiffParallelScalingBlock(_MaskedBlock, vision_transformer.DiffParallelScalingBlock):
        """timm's `DiffParallelScalingBlock`."""

        _timm, _compute = vision_transformer.DiffParallelScalingBlock, compute.parallel_block

    _BLOCKS.append(FastDiffParallelScalingBlock)

FAST: dict[type[nn.Module], type[nn.Module]] = {
    **{fast._timm: fast for fast in _BLOCKS},
    AttentionPoolLatent: FastAttentionPoolLatent,
    LayerNorm: FastLayerNorm,
    RmsNorm: FastRmsNorm,
    nn.Linear: FastLinear,
}
