# pyright: reportPrivateImportUsage=false
"""timm's patch embedding on our kernel.

Shape legend: B batch, C channels, N patch tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fastvit import ops
from fastvit.accelerate.block import applies, fast, library_class
from fastvit.accelerate.timm import structure
from fastvit.obstacles import Obstacle, conv_obstacle, global_hook, is_traced, patched
from fastvit.pos_embed import resample_pos_embed

METHODS = ("_pos_embed", "forward_features")  # what a model's fast class does not call


def patch_obstacle(embed: Any) -> Obstacle | None:
    """Why `embed`, of timm's exact class `PatchEmbed`, runs timm's forward now; None if it need
    not. Its norm may be any."""
    found = structure.single_obstacle(embed.proj, structure.CONV)
    if found is not None:
        return found.within("proj")
    if (found := conv_obstacle(embed.proj)) is not None:
        return found
    if not embed.flatten and embed.output_fmt != "NHWC":
        return Obstacle(f"output format is {embed.output_fmt.value}", lasting=True)
    return global_hook()


def embeds_positions(vit: Any) -> bool:
    """Whether one kernel can do all of a model's embedding now, exactly."""
    embed = getattr(vit, "patch_embed", None)
    if isinstance(vit, VisionTransformer) and vit.pos_embed is None:
        return False  # timm's versions differ in what prefix tokens there are then
    return (
        isinstance(embed, PatchEmbed)
        and not is_traced()
        and structure.single_obstacle(embed, frozenset({PatchEmbed, FastPatchEmbed})) is None
        and patched(PatchEmbed) is None
        and structure.single_obstacle(embed.norm, structure.IDENTITY) is None
        and patched(library_class(vit), *METHODS) is None
        and not any(name in vit.__dict__ for name in METHODS)
        and embed.flatten != getattr(vit, "dynamic_img_size", False)  # else timm's path objects
        and patch_obstacle(embed) is None
    )


def embed_tokens(vit: Any, x: Tensor, *prefix: Tensor | None) -> Tensor | None:
    """A model's patch embedding, positions and prefix tokens: [B, C, H, W] to [B, P+N, D]; None
    where timm's own way is to run.

    Args:
        vit: with timm's names, ``patch_embed`` and where it has them ``pos_embed, no_embed_class``.
        x: images.
        prefix: [1, 1 or more, D] each, in their order; None for one that the model lacks.
    """
    pixels = pixels_of(vit.patch_embed, x) if embeds_positions(vit) else None
    if pixels is None:
        return None
    proj = vit.patch_embed.proj
    grid = (pixels.shape[2] // proj.kernel_size[0], pixels.shape[3] // proj.kernel_size[1])
    pos_embed = getattr(vit, "pos_embed", None)
    if pos_embed is not None:
        own_positions = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
        if getattr(vit, "dynamic_img_size", False):
            pos_embed = resample_pos_embed(
                pos_embed, grid, vit.patch_embed.grid_size, own_positions
            )
        if pos_embed.shape[1] != grid[0] * grid[1] + own_positions:
            return None  # timm says what is wrong
    tokens = [token for token in prefix if token is not None]
    return ops.patch_embed(
        pixels,
        proj.weight,
        proj.bias,
        pos_embed=None if pos_embed is None else pos_embed[0],
        prefix=torch.cat(tokens, dim=1)[0] if tokens else None,
    )


def pixels_of(embed: Any, images: Tensor) -> Tensor | None:
    """Images to cut into patches, or None where timm's own forward has to pad, crop or object."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4:
        return None
    height, width = images.shape[2:]
    if embed.img_size is not None and embed.strict_img_size and (height, width) != embed.img_size:
        return None
    patch_h, patch_w = embed.patch_size
    if embed.dynamic_img_pad:
        return F.pad(images, (0, -width % patch_w, 0, -height % patch_h))
    return None if height % patch_h or width % patch_w else images


@fast(PatchEmbed)
class FastPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` on our kernel: projection and bias; the models' classes add more."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) to (B, N, D) or (B, H/p, W/p, D)
        fused = applies(self, x) and patch_obstacle(self) is None
        pixels = pixels_of(self, x) if fused else None
        if pixels is None:
            return super().forward(x)
        tokens = ops.patch_embed(pixels, self.proj.weight, self.proj.bias)
        if not self.flatten:
            tokens = tokens.unflatten(1, (-1, pixels.shape[3] // self.proj.kernel_size[1]))
        return self.norm(tokens)
