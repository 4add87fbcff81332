"""fastvit's own models: they run on our kernels as they are, and `explain` says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastvit.accelerate import graphs
from fastvit.accelerate.block import FastBlock, block_part, fast, make_row, original_of
from fastvit.accelerate.plan import Part
from fastvit.layers import PatchEmbed, obstacle_in, parts_of
from fastvit.obstacles import Obstacle, own_forward
from fastvit.parts import Parts
from fastvit.vit import Block, VisionTransformer

_RUNS = {
    PatchEmbed: "patch_embed, positions and prefix tokens",
    Block: "layer_norm, linear, attention_qkv, mlp",
}


@fast(VisionTransformer)
class GraphedVisionTransformer(graphs.Graphed, VisionTransformer):
    """fastvit's `VisionTransformer` with `cuda_graphs`."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, C, H, W] to [B, num_classes]."""
        options: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
        if is_causal:
            options["is_causal"] = is_causal
        return graphs.run(self, super().forward, x, **options)


@fast(Block)
class QuantizedBlock(FastBlock, Block):
    """fastvit's `Block` with `fp8.Quantized`."""

    @staticmethod
    def take_apart(block: Any) -> Parts | Obstacle:
        """Of a `Block`."""
        return obstacle_in(*block.children()) or parts_of(block)

    def bias(self) -> Tensor | None:
        return self.attn.add_rel_pos(None)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, N, D] to [B, N, D], as `Block.forward`."""
        parts = self.examine(x)
        if parts is None:
            return super().forward(x, attn_mask)
        return self.run(parts, x, self.attn.add_rel_pos(attn_mask))


def find(model: nn.Module) -> list[Part]:
    """fastvit's own models, patch embeddings and blocks inside `model`, in its order."""
    parts: list[Part] = []
    for name, module in model.named_modules():
        kind = original_of(type(module))
        if kind is VisionTransformer:
            parts.append(Part(module, None, row=None, graphed=GraphedVisionTransformer))
        elif kind is Block:
            part = block_part(name, module, QuantizedBlock, _RUNS[kind], "layer by layer")
            parts.append(replace(part, fast=type(module)))
        elif kind is PatchEmbed:
            obstacle = own_forward(module) or obstacle_in(module)
            row = make_row(name, kind, _RUNS[kind], "layer by layer", obstacle)
            parts.append(Part(module, type(module), row))
    return parts
