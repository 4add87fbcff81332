"""Pixels to finished tokens in plain PyTorch. Source: ViT paper (arXiv:2010.11929), equation 1."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed_reference(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, pos_embed: Tensor | None = None,
    prefix: Tensor | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:  # fmt: skip
    """Projected patches behind the prefix rows, position added; as in `fastvit.ops.patch_embed`."""
    if images.dtype == torch.uint8:
        images = images.to(weight.dtype) / 255
    if mean is not None:
        images = images - images.new_tensor(mean)[:, None, None]
    if std is not None:
        images = images / images.new_tensor(std)[:, None, None]
    x = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if prefix is None:
        return x if pos_embed is None else x + pos_embed
    rows = prefix.expand(x.shape[0], -1, -1)
    if pos_embed is None:
        return torch.cat([rows, x], dim=1)
    if pos_embed.shape[0] == x.shape[1]:
        return torch.cat([rows, x + pos_embed], dim=1)
    return torch.cat([rows, x], dim=1) + pos_embed
