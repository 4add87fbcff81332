"""`patch_embed`'s launcher.

Gradients of `patch_embed`, which projects (p - shift) / divisor + offset for each patch p of
raw pixels (see `normalization`).

With g the gradient of the patch rows and u = sum over images of the whole gradient:

    dW = g^T (p - shift) / divisor + db * offset    db = sum of g    dpos = u
    dprefix = u's first rows    dimages = (g W) / divisor, a patch each

Patches do not overlap, so a copy of the pixels, patch by patch, makes this the gradient of a
`linear`; it costs less than a hundredth of a training step.

Legend: B images, T = P + N tokens (P prefix, N patches), D width, C channels, K = C * ph * pw
pixels of a patch.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels import _launch
from fastvit.kernels._backend import Grads, Meta
from fastvit.kernels._device import architecture, cached
from fastvit.kernels._launch import Output, Prepared, accumulator, product_precision
from fastvit.kernels._tuning import cdiv, lookup
from fastvit.kernels.linear import launch_backward as linear
from fastvit.kernels.linear.launch import GROUP_M, result_dtype

Values = tuple[float, ...]


class Normalization(NamedTuple):
    """Pixels x as the projection wants them are (x - shift) / divisor + offset, channel by channel;
    `shift` is the middle of their range."""

    shift: float
    divisor: Tensor  # [C, 1, 1]
    offset: Tensor  # [C, 1, 1]


def normalization(
    images: Tensor, weight: Tensor, mean: Values | None, std: Values | None
) -> Normalization | None:
    """What becomes of pixels before the projection; None for nothing."""
    shift = _shift(images, mean, std)
    if shift == 0.0:
        return None
    full_scale = 255.0 if images.dtype == torch.uint8 else 1.0
    channels = weight.shape[1]
    wide = _launch.wide_dtype(weight.dtype)
    mean_c = _constant(mean or (0.0,) * channels, wide, weight.device)[:, None, None]
    std_c = _constant(std or (1.0,) * channels, wide, weight.device)[:, None, None]
    return Normalization(shift, full_scale * std_c, (shift / full_scale - mean_c) / std_c)


def fold_normalization(
    mean: Values | None, std: Values | None, weight: Tensor, images: Tensor, bias: Tensor | None,
    *others: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The kernel's tensors, with weight and bias that take raw pixels, shifted: W((x / r - mean) /
    std) + b becomes W'(x - shift) + b', with W' = W / (r std) and b' = b + sum over W of
    (shift / r - mean) / std.

    Folding around mid-range (128, or 0.5 for floats) keeps the operand small, so that its rounding
    to the weight's dtype is as small as that of normalised pixels.
    """
    norm = normalization(images, weight, mean, std)
    if norm is not None:
        wide_weight = weight.to(norm.divisor.dtype)
        offset = wide_weight.sum(dim=(2, 3)) @ norm.offset.flatten()  # (D, C) @ (C)
        weight = (wide_weight / norm.divisor).to(weight.dtype)
        bias = offset if bias is None else bias.to(offset.dtype) + offset
    return (images, *map(_launch.as_vector, (weight, bias, *others)))


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied to the device once: a copy from the host waits, and cannot be captured in a graph."""
    return torch.tensor(values, dtype=dtype, device=device)


def tokens_of(weight: Any, images: Any, prefix: Any) -> tuple[int, int]:
    """N and P + N, of tensors or their metadata."""
    patches = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    return patches, patches + (0 if prefix is None else prefix.shape[0])


@cached
def prepare(
    weight: Meta, images: Meta, bias: Meta | None, pos_embed: Meta | None, prefix: Meta | None,
    mean: Values | None, std: Values | None, precision: str,
) -> Output:  # fmt: skip
    """For `run_to_output`, arguments as in `fastvit.ops.patch_embed`."""
    width, channels, patch_h, patch_w = weight.shape
    patches, tokens = tokens_of(weight, images, prefix)
    grid_w, prefix_count = images.shape[3] // patch_w, tokens - patches
    shape = (images.shape[0], tokens, width)
    fold = functools.partial(fold_normalization, mean, std)
    out = Output(None, shape, result_dtype(weight, pos_embed, prefix), fold)
    if 0 in shape:
        return out
    from fastvit.kernels.patch_embed.kernel import Images, patch_embed_kernel

    m, k = shape[0] * tokens, channels * patch_h * patch_w
    tile = lookup("patch_embed", architecture(images.device), weight.dtype, M=m, N=width, K=k)
    pixels, strides = _launch.maker(Images), images.strides
    run_length = math.gcd(16, patch_w, *strides[:3]) if strides[3] == 1 else 1
    pos_on_prefix = pos_embed is not None and pos_embed.shape[0] == tokens
    constants = (
        *shape, grid_w, run_length, _shift(images, mean, std), prefix_count, pos_on_prefix, k,
        patch_h, patch_w, product_precision(weight.dtype, precision), accumulator(weight.dtype),
        GROUP_M, tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K,
    )  # fmt: skip
    launch = Prepared(
        patch_embed_kernel, cdiv(m, tile.BLOCK_M) * cdiv(width, tile.BLOCK_N), tile,
        lambda images, *rest: (pixels((images, *strides)), *rest, *constants),
    )  # fmt: skip
    return out._replace(launch=launch)


def _shift(images: Any, mean: Values | None, std: Values | None) -> float:
    """The middle of the pixels' range, where it is subtracted from them."""
    if images.dtype == torch.uint8:
        return 128.0
    return 0.0 if mean is None and std is None else 0.5


def patch_embed_backward(
    grad: Tensor, kept: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> Grads:
    """As `_register.Gradient` has it."""
    weight, images, bias, pos_embed, prefix, *statistics = args
    statistics = (None if values is None else tuple(values) for values in statistics)
    norm = normalization(images, weight, *statistics)
    count = 0 if prefix is None else prefix.shape[0]
    total = grad.sum(0, dtype=torch.float64)  # (P + N, D)
    sums = total[count:].sum(0)
    g = grad[:, count:].to(weight.dtype).reshape(-1, weight.shape[0])  # (B * N, D)
    dimages = _image_gradient(images, g, weight, norm) if needs[1] else None
    dw = _weight_gradient(images, g, weight, sums, norm) if needs[0] else None
    db = None if bias is None else sums.to(bias.dtype)
    dpos = dprefix = None
    # copies: what an op returns may not share memory
    if pos_embed is not None:
        whole = pos_embed.shape == total.shape
        dpos = (total if whole else total[count:]).to(pos_embed.dtype, copy=True)
    if prefix is not None:
        dprefix = total[:count].to(prefix.dtype, copy=True)
    return dw, dimages, db, dpos, dprefix


def _image_gradient(
    images: Tensor, g: Tensor, weight: Tensor, norm: Normalization | None
) -> Tensor:
    b, c, gh, ph, gw, pw = _as_patches(images, weight).shape
    dpixels = linear.input_gradient(g, weight.flatten(1)).view(b, gh, gw, c, ph, pw)
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
    dw, _, _ = linear.parameter_gradients(g, rows, like, None, None, None, only_weight)
    assert dw is not None
    dw = dw[:, :k].reshape(weight.shape)
    if norm is not None:
        dw = dw / norm.divisor + sums[:, None, None, None] * norm.offset
    return dw.to(weight.dtype)


def _as_patches(images: Tensor, weight: Tensor) -> Tensor:
    """[B, C, H, W] as [B, C, gh, ph, gw, pw]."""
    ph, pw = weight.shape[2:]
    return images.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))
