# pyright: reportPrivateImportUsage=false
"""timm's Vision Transformers: which of their modules run on our kernels, and how."""

from __future__ import annotations

from typing import Any

from fastvit._compat import import_timm

import_timm()  # before all else of timm; unpickling an accelerated model comes here first

from timm.layers import AttentionPoolLatent, PatchEmbed  # noqa: E402
from timm.models.vision_transformer import Block  # noqa: E402
from torch import nn  # noqa: E402

from fastvit.accelerate import common  # noqa: E402
from fastvit.accelerate.common import Obstacle  # noqa: E402
from fastvit.accelerate.plan import Part  # noqa: E402
from fastvit.accelerate.timm import blocks, models, structure  # noqa: E402
from fastvit.accelerate.timm.blocks import FastBlock  # noqa: E402
from fastvit.accelerate.timm.embed import (  # noqa: E402
    FastPatchEmbed,
    embeds_positions,
    patch_obstacle,
)

__all__ = ["FAST", "ORIGINAL", "FastBlock", "find"]

FAST: dict[type[nn.Module], type[nn.Module]] = (
    common.FAST | models.FAST | blocks.FAST | {PatchEmbed: FastPatchEmbed}
)
ORIGINAL = {fast: original for original, fast in FAST.items()}
Found = tuple[str, Obstacle | None]  # the ops that a module can run, and what stands in the way


def find(model: nn.Module) -> list[Part]:
    """The modules inside `model` that this file knows, fused or not, in the model's order."""
    parts: list[Part] = []
    roles: dict[nn.Module, str] = {}  # of the children of timm's models
    for name, module in model.named_modules():
        kind = ORIGINAL.get(type(module), type(module))
        if kind in models.FAST:
            parts.append(Part(module, FAST[kind], row=None, graphed=FAST[kind]))
            roles |= _roles(module)
            continue
        found = _look_at(module, kind, roles.get(module, ""))
        if found is None:
            continue
        runs, obstacle = found
        row = common.make_row(name, kind, runs, "timm", obstacle, block=_is_block(module, kind))
        stays = obstacle is not None and obstacle.lasting
        form = FastBlock if row.fused and kind is Block and blocks.is_own(module) else None
        parts.append(Part(module, None if stays else FAST[kind], row, inference=form))
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


def _look_at(module: Any, kind: type[nn.Module], role: str) -> Found | None:
    """None for a module of no interest."""
    if kind in structure.BLOCKS or kind is AttentionPoolLatent:
        return _ops_of(module), structure.obstacle(module, kind)
    if kind is PatchEmbed:
        positions = ", positions and prefix tokens" if role.endswith("positions") else ""
        return f"patch_embed{positions}", patch_obstacle(module)
    if role == "embeds.proj" and kind in (nn.Conv2d, nn.Linear):
        return _look_at_projection(module, kind)
    if role in ("norm_pre", "norm", "fc_norm") and kind is not nn.Identity:
        return _norm_op(kind), _norm_obstacle(module, kind)
    if _is_block(module, kind) or role in ("patch_embed", "embeds.proj", "attn_pool"):
        return "", Obstacle(f"{kind.__name__} has no fused form yet", lasting=True)
    return None


def _look_at_projection(projection: Any, kind: type[nn.Module]) -> Found:
    """Of images, or of patches cut out before."""
    if kind is nn.Conv2d:
        return "patch_embed", common.conv_obstacle(projection)
    return "linear", structure.obstacle_of(projection, (kind, FAST[kind]))


def _norm_op(kind: type[nn.Module]) -> str:
    return "rms_norm" if kind in structure.RMS_NORM else "layer_norm"


def _norm_obstacle(norm: Any, kind: type[nn.Module]) -> Obstacle | None:
    if kind not in FAST:
        return Obstacle(f"{kind.__name__} is not fused; LayerNorm and RmsNorm are", lasting=True)
    if getattr(norm, "_fast_norm", False):
        return Obstacle("timm's fast norm keeps to autocast's dtype", lasting=True)
    return None


def _ops_of(block: nn.Module) -> str:
    """What a block or an attention pooling runs, as far as its parts decide that."""
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
