"""fastvit's own models: they run on our kernels as they are, and `explain` says so."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvit.accelerate import graphs, inference
from fastvit.accelerate.plan import Part, PlanRow
from fastvit.layers import PatchEmbed, is_plain
from fastvit.vit import Block, VisionTransformer

_RUNS = {
    PatchEmbed: "patch_embed, positions and prefix tokens",
    Block: "layer_norm, linear, attention_qkv, mlp",
}


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


class InferenceBlock(Block):
    """fastvit's `Block` with the forms of inference.py."""

    def fuses(self, x: object) -> bool:
        """Whether `layers.fused_block` can stand for its forward now."""
        return isinstance(x, Tensor) and is_plain(*self._modules.values())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """As `Block`'s."""
        if not self.fuses(x):
            return super().forward(x, attn_mask)
        return inference.run_block(self, x, self.attn.add_rel_pos(attn_mask))


ORIGINAL: dict[type[nn.Module], type[nn.Module]] = {
    GraphedVisionTransformer: VisionTransformer,
    InferenceBlock: Block,
}


def find(model: nn.Module) -> list[Part]:
    """fastvit's own models, patch embeddings and blocks inside `model`, in its order."""
    parts: list[Part] = []
    for name, module in model.named_modules():
        kind = type(module)
        if ORIGINAL.get(kind, kind) is VisionTransformer:
            parts.append(Part(module, None, row=None, graphed=GraphedVisionTransformer))
        kind = ORIGINAL.get(kind, kind)
        if kind not in _RUNS:
            continue
        fused = all(map(is_plain, module.children()))
        row = PlanRow(
            module=name,
            type=kind.__name__,
            fused=fused,
            runs=_RUNS[kind] if fused else "layer by layer",
            reason=None if fused else "a layer in it has a hook or has been replaced",
            block=kind is Block,
        )
        form = InferenceBlock if kind is Block else None
        parts.append(Part(module, type(module), row, inference=form))
    return parts
