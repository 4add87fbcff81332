# pyright: reportPrivateImportUsage=false
"""timm's Vision Transformers: which of their modules run on our kernels, and how."""

from __future__ import annotations

from typing import Any

from fastvit._compat import import_timm

import_timm()  # before all else of timm; unpickling an accelerated model comes here first

from timm.layers import AttentionPoolLatent, PatchEmbed  # noqa: E402
from torch import nn  # noqa: E402

from fastvit.accelerate import block, single  # noqa: E402
from fastvit.accelerate.block import original_of  # noqa: E402
from fastvit.accelerate.plan import Part  # noqa: E402
from fastvit.accelerate.timm import blocks, models, structure  # noqa: E402
from fastvit.accelerate.timm.blocks import FastBlock  # noqa: E402
from fastvit.accelerate.timm.embed import (  # noqa: E402
    METHODS,
    FastPatchEmbed,
    embeds_positions,
    patch_obstacle,
)
from fastvit.obstacles import Obstacle, conv_obstacle, patched  # noqa: E402

__all__ = ["FAST", "FastBlock", "find"]

FAST: dict[type[nn.Module], type[nn.Module]] = (
    single.FAST | models.FAST | blocks.FAST | {PatchEmbed: FastPatchEmbed}
)


def find(model: nn.Module) -> list[Part]:
    """The modules inside `model` that this file knows, fused or not, in the model's order."""
    parts: list[Part] = []
    roles: dict[nn.Module, str] = {}  # of the children of timm's models
    for name, module in model.named_modules():
        kind = original_of(type(module))
        if kind in models.FAST:
            found = patched(kind, "forward", *METHODS)
            parts += block.model_parts(name, module, FAST[kind], "timm", found)
            roles |= _roles(module)
        elif (part := _part(name, module, kind, roles.get(module, ""))) is not None:
            parts.append(part)
    return parts


def _roles(vit: Any) -> dict[nn.Module, str]:
    roles = {child: role for role, child in vit.named_children()}
    if embeds_positions(vit):
        roles[vit.patch_embed] = "patch_embed with positions"
    if hasattr(vit, "embeds"):  # NaFlex
        roles[vit.embeds.proj] = "embeds.proj"
    return roles


def _is_block(module: nn.Module, kind: type[nn.Module]) -> bool:
    of_timm = kind.__module__.startswith("timm.") and kind.__name__.endswith("Block")
    return of_timm or isinstance(module, tuple(structure.BLOCKS))


def _part(name: str, module: Any, kind: type[nn.Module], role: str) -> Part | None:  # noqa: PLR0911
    """None for a module of no interest."""

    def single_part(runs: str, obstacle: Obstacle | None) -> Part:
        return single.single_part(name, module, FAST.get(kind), runs, "timm", obstacle)

    if kind in structure.BLOCKS or kind is AttentionPoolLatent:
        is_block = kind in structure.BLOCKS
        return block.block_part(name, module, FAST[kind], _ops_of(module), "timm", is_block)
    if kind is PatchEmbed:
        positions = ", positions and prefix tokens" if role.endswith("positions") else ""
        return single_part(f"patch_embed{positions}", patch_obstacle(module))
    if role == "embeds.proj" and kind is nn.Conv2d:
        return single_part("patch_embed", conv_obstacle(module))
    if role == "embeds.proj" and kind is nn.Linear:
        return single_part(
            "linear", structure.single_obstacle(module, frozenset({kind, FAST[kind]}))
        )
    if role in ("norm_pre", "norm", "fc_norm") and kind is not nn.Identity:
        return single_part(_norm_op(kind), _norm_obstacle(module, kind))
    if _is_block(module, kind) or role in ("patch_embed", "embeds.proj", "attn_pool"):
        obstacle = Obstacle(f"{kind.__name__} has no fused form yet", lasting=True)
        row = block.make_row(name, kind, "", "timm", obstacle, block=_is_block(module, kind))
        return Part(module, None, row)
    return None


def _norm_op(kind: type[nn.Module]) -> str:
    return "rms_norm" if kind in structure.RMS_NORM else "layer_norm"


def _norm_obstacle(norm: Any, kind: type[nn.Module]) -> Obstacle | None:
    if kind not in FAST:
        return Obstacle(f"{kind.__name__} is not fused; LayerNorm and RmsNorm are", lasting=True)
    if getattr(norm, "_fast_norm", False):
        return Obstacle("timm's fast norm keeps to autocast's dtype", lasting=True)
    return None


def _ops_of(block: nn.Module) -> str:
    """Names of our ops that a block or an attention pooling runs, by its layers' classes."""
    found = {type(module) for module in block.modules()}
    layers = dict(block.named_modules())
    norms = sorted({_norm_op(kind) for kind in found & structure.NORM})
    normed = any(
        name.endswith("q_norm") and type(layer) is not nn.Identity for name, layer in layers.items()
    )
    one_linear = any(name.endswith(("qkv", "in_proj")) for name in layers)
    differential = found & (structure.DIFF_ATTENTION | structure.DIFF_PARALLEL)
    packed = one_linear and not normed and not differential
    attention = "attention_qkv" if packed else "attention"
    mlp = ["mlp"] if structure.Mlp in found else []
    return ", ".join([*norms, "linear", attention, *mlp])
