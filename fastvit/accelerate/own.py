"""fastvit's own models: they run on our kernels as they are, and `explain` says so."""

from __future__ import annotations

from torch import nn

from fastvit.accelerate.plan import Part, PlanRow
from fastvit.layers import PatchEmbed, is_plain
from fastvit.vit import Block

_RUNS = {
    PatchEmbed: "patch_embed, positions and prefix tokens",
    Block: "layer_norm, linear, attention_qkv, mlp",
}


def find(model: nn.Module) -> list[Part]:
    """The patch embeddings and blocks of fastvit's own inside `model`, in its order."""
    parts: list[Part] = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in _RUNS:
            continue
        fused = all(map(is_plain, module.children()))
        row = PlanRow(
            module=name,
            type=kind.__name__,
            fused=fused,
            runs=_RUNS[kind] if fused else "layer by layer",
            reason=None if fused else "a layer in it has a hook or has been replaced",
        )
        parts.append(Part(module, kind, row))
    return parts
