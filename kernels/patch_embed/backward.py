"""Gradients of `patch_embed`, which projects (p - shift) / divisor + offset for each patch p of
raw pixels (see `normalization`).

With g the gradient of the patch rows and u = sum over images of the whole gradient:

    dW = g^T (p - shift) / divisor + db * offset    db = sum of g    dpos = u
    dprefix = u's first rows    dimages = (g W) / divisor, a patch each

Patches do not overlap, so a copy of the pixels, patch by patch, makes this the gradient of a
`linear`; it costs less than a hundredth of a training step.

Shape legend: B images, P prefix rows, N patches, D width, C channels, K = C * ph * pw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.kernels.linear.backward import (
    input_gradient,
    parameter_gradients,
    select,
)
from fastvit.kernels.patch_embed.op import Normalization, normalization

Args = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None,
    list[float] | None, list[float] | None,
]  # fmt: skip


def patch_embed_backward(
    grad: Tensor, output: None, kept: Sequence[Tensor], args: Args, needs: Sequence[bool]
) -> list[Tensor]:
    """As `_library.Gradient` has it."""
    images, weight, bias, pos_embed, prefix, mean, std = args
    norm = normalization(images, weight, mean, std)
    count = 0 if prefix is None else prefix.shape[0]
    total = grad.sum(0, dtype=torch.float64)  # (P + N, D)
    sums = total[count:].sum(0)
    g = grad[:, count:].to(weight.dtype).reshape(-1, weight.shape[0])  # (B * N, D)
    dimages = _image_gradient(images, g, weight, norm) if needs[0] else None
    dw = _weight_gradient(images, g, weight, sums, norm) if needs[1] else None
    db = None if bias is None else sums.to(bias.dtype)
    dpos = dprefix = None
    # copies: what an op returns may not share memory
    if pos_embed is not None:
        whole = pos_embed.shape == total.shape
        dpos = (total if whole else total[count:]).to(pos_embed.dtype, copy=True)
    if prefix is not None:
        dprefix = total[:count].to(prefix.dtype, copy=True)
    return select((dimages, dw, db, dpos, dprefix, None, None), needs)


def _image_gradient(
    images: Tensor, g: Tensor, weight: Tensor, norm: Normalization | None
) -> Tensor:
    b, c, gh, ph, gw, pw = _as_patches(images, weight).shape
    dpixels = input_gradient(g, weight.flatten(1)).view(b, gh, gw, c, ph, pw)
    dimages = dpixels.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    return dimages if norm is None else (dimages / norm.divisor).to(images.dtype)


def _weight_gradient(
    images: Tensor, g: Tensor, weight: Tensor, sums: Tensor, norm: Normalization | None
) -> Tensor:
    pixels = _as_patches(images, weight).permute(0, 2, 4, 1, 3, 5)  # (B, gh, gw, C, ph, pw)
    if norm is not None:
        pixels = pixels.to(norm.divisor.dtype) - norm.shift
    k = weight[0].numel()
    # rows of patch 14 are filled up with zeros, to begin at multiples of 16 bytes
    rows = g.new_empty(len(g), k + -k % 16)
    rows[:, k:] = 0
    rows[:, :k].view(pixels.shape).copy_(pixels)
    like = weight.flatten(1)
    # of raw pixels, which are large, it is rounded last
    like = like if norm is None else like.to(norm.divisor.dtype)
    only_weight = (True, False, False)
    dw, _, _ = parameter_gradients(g, rows, like, None, None, None, only_weight)
    assert dw is not None
    dw = dw[:, :k].reshape(weight.shape)
    if norm is not None:
        dw = dw / norm.divisor + sums[:, None, None, None] * norm.offset
    return dw.to(weight.dtype)


def _as_patches(images: Tensor, weight: Tensor) -> Tensor:
    """[B, C, H, W] as [B, C, gh, ph, gw, pw]."""
    ph, pw = weight.shape[2:]
    return images.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))
