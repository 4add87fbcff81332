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
from fastvit.accelerate.block import FastBlock, block_part, fast, fast_class, original_of
from fastvit.accelerate.plan import Part
from fastvit.accelerate.single import FastNorm, find_single, layer_part
from fastvit.obstacles import Obstacle, layer_obstacle, mha_obstacle, patched, wanted_by
from fastvit.parts import Parts, activation_name, packed_weights_of, scale_of

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
    "NORM": frozenset({LayerNorm, LayerNormFp32}), "ATTENTION": frozenset({nn.MultiheadAttention}),
    "out_proj": frozenset({NonDynamicallyQuantizableLinear}), "MLP": frozenset({nn.Sequential}),
    "ACTIVATION": frozenset({QuickGELU}), "LAYER_SCALE": frozenset({LayerScale}),
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


class _FastNorm(FastNorm):
    def forward(self, input: Tensor) -> Tensor:
        """In its input's dtype, under autocast too."""
        return super().forward(input).to(input.dtype)


FAST: dict[type[nn.Module], type[nn.Module]] = {ResidualAttentionBlock: FastResidualAttentionBlock}
FAST |= {kind: fast_class(kind, _FastNorm, globals()) for kind in (LayerNorm, LayerNormFp32)}


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
                part = layer_part(name, module, FAST[kind], "layer_norm", "open_clip")
            else:
                part = find_single(name, module, "open_clip")
            parts += [] if part is None else [part]
    return parts
