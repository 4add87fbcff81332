"""`patch_embed`: launcher, registration, public function."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_shape, check_tensors
from fastvit.kernels._device import architecture
from fastvit.kernels._library import Gradient, define_op, launch, uses_triton
from fastvit.kernels._tuning import cdiv, lookup
from fastvit.kernels.linear.op import GROUP_M, float32_precision, result_dtype
from fastvit.kernels.patch_embed.reference import patch_embed_reference


class Normalization(NamedTuple):
    """Pixels x as the projection wants them are (x - shift) / divisor + offset, channel by channel;
    `shift` is the middle of their range."""

    shift: float
    divisor: Tensor  # [C, 1, 1]
    offset: Tensor  # [C, 1, 1]


def normalization(
    images: Tensor, weight: Tensor, mean: list[float] | None, std: list[float] | None
) -> Normalization | None:
    """What becomes of pixels before the projection; None for nothing."""
    is_bytes = images.dtype == torch.uint8
    if not is_bytes and mean is None and std is None:
        return None
    full_scale, shift = (255.0, 128.0) if is_bytes else (1.0, 0.5)
    channels = weight.shape[1]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    mean_c = _constant(tuple(mean or [0.0] * channels), wide, weight.device)[:, None, None]
    std_c = _constant(tuple(std or [1.0] * channels), wide, weight.device)[:, None, None]
    return Normalization(shift, full_scale * std_c, (shift / full_scale - mean_c) / std_c)


def fold_normalization(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> tuple[Tensor, Tensor | None, float]:
    """Weight, bias and shift that take raw pixels: W((x / r - mean) / std) + b becomes
    W'(x - shift) + b', with W' = W / (r std) and b' = b + sum over W of (shift / r - mean) / std.

    Folding around mid-range (128, or 0.5 for floats) keeps the operand small, so that its rounding
    to the weight's dtype is as small as that of normalised pixels.
    """
    norm = normalization(images, weight, mean, std)
    if norm is None:
        return weight, bias, 0.0
    wide_weight = weight.to(norm.divisor.dtype)
    offset = wide_weight.sum(dim=(2, 3)) @ norm.offset.flatten()  # (D, C) @ (C)
    folded = (wide_weight / norm.divisor).to(weight.dtype)
    return folded, offset if bias is None else bias.to(offset.dtype) + offset, norm.shift


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied to the device once: a copy from the host waits, and cannot be captured in a graph."""
    return torch.tensor(values, dtype=dtype, device=device)


def _launch(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Tensor:
    import triton.language as tl

    from fastvit.kernels.patch_embed.kernel import patch_embed_kernel

    out = _fake(images, weight, bias, pos_embed, prefix, mean, std)
    if out.numel() == 0:
        return out
    batch, tokens, width = out.shape
    prefix_count = 0 if prefix is None else prefix.shape[0]
    patch_h, patch_w = weight.shape[2:]
    k = weight.shape[1] * patch_h * patch_w
    folded, offset, shift = fold_normalization(images, weight, bias, mean, std)
    m = batch * tokens
    tile = lookup("patch_embed", architecture(images.device), weight.dtype, M=m, N=width, K=k)
    programs = cdiv(m, tile.BLOCK_M) * cdiv(width, tile.BLOCK_N)
    launch(
        patch_embed_kernel,
        programs,
        tile,
        image_ptr=images,
        weight_ptr=folded.contiguous(),
        bias_ptr=None if offset is None else offset.contiguous(),
        pos_ptr=None if pos_embed is None else pos_embed.contiguous(),
        prefix_ptr=None if prefix is None else prefix.contiguous(),
        out_ptr=out,
        B=batch,
        T=tokens,
        D=width,
        GRID_W=images.shape[3] // patch_w,
        stride_ib=images.stride(0),
        stride_ic=images.stride(1),
        stride_ih=images.stride(2),
        stride_iw=images.stride(3),
        RUN=math.gcd(16, patch_w, *images.stride()[:3]) if images.stride(3) == 1 else 1,
        SHIFT=shift,
        PREFIX=prefix_count,
        POS_ON_PREFIX=pos_embed is not None and pos_embed.shape[0] == tokens,
        K=k,
        PH=patch_h,
        PW=patch_w,
        PRECISION=float32_precision(weight.dtype),
        ACC=tl.float64 if weight.dtype == torch.float64 else tl.float32,
        GROUP_M=GROUP_M,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
    )
    return out


def _fake(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Tensor:
    patches = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    tokens = patches + (0 if prefix is None else prefix.shape[0])
    shape = (images.shape[0], tokens, weight.shape[0])
    return images.new_empty(shape, dtype=result_dtype(weight, pos_embed, prefix))


def _flops(images: tuple[int, ...], weight: tuple[int, ...], *rest: object) -> int:
    d, c, ph, pw = weight
    return 2 * images[0] * (images[2] // ph) * (images[3] // pw) * d * c * ph * pw


def _backward(*args: Any) -> list[Tensor]:
    from fastvit.kernels.patch_embed.backward import patch_embed_backward

    return patch_embed_backward(*args)


_patch_embed = define_op(
    "patch_embed",
    "(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, "
    "float[]? mean, float[]? std)",
    launch=_launch,
    eager=patch_embed_reference,
    fake=_fake,
    flops=_flops,
    autocast=("images", "weight", "bias"),
    gradient=Gradient(_backward),
)


def _check_statistics(name: str, values: Sequence[float] | None, channels: int) -> None:
    if values is not None and len(values) != channels:
        raise ValueError(f"patch_embed: {name} has {len(values)} values for {channels} channels")
    if name == "std" and values is not None and any(value == 0 for value in values):
        raise ValueError(f"patch_embed: std {list(values)} contains 0")


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Finished tokens from pixels: projection, bias, position, CLS and register rows in one store.

    Args:
        images: [B, C, H, W], floats of weight's dtype, or uint8 (then read as x / 255); any
            strides, channels_last too.
        weight: [D, C, p, p] or [D, C, ph, pw], whose patches tile the image exactly.
        bias: [D].
        pos_embed: [N, D] for patches only, or [P+N, D] for the prefix rows too.
        prefix: [P, D], rows put before the patches of every image.
        mean, std: C values each; (x - mean) / std comes first, folded into weight and bias.

    Returns:
        [B, P+N, D], N = (H / ph) (W / pw), of weight's dtype promoted with pos_embed's and
        prefix's.

    Raises:
        TypeError: images neither uint8 nor of weight's dtype.
        ValueError: shapes or devices that do not fit, a patch that does not divide the image.

    Source: ViT paper (arXiv:2010.11929), equation 1.
    """
    check_tensors("patch_embed", weight, bias=bias, pos_embed=pos_embed, prefix=prefix)
    if images.device != weight.device:
        raise ValueError(
            f"patch_embed: images are on {images.device}, the weight on {weight.device}"
        )
    check_same_dtype("patch_embed", weight, bias=bias)
    if images.dtype != torch.uint8:
        check_tensors("patch_embed", images)
        check_same_dtype("patch_embed", images, weight=weight)
    if images.dim() != 4 or weight.dim() != 4 or images.shape[1] != weight.shape[1]:
        raise ValueError(
            f"patch_embed: images {list(images.shape)} and weight {list(weight.shape)} do not fit "
            "[B, C, H, W], [D, C, p, p]"
        )
    width, channels, patch_h, patch_w = weight.shape
    height_px, width_px = images.shape[2:]
    if height_px % patch_h or width_px % patch_w or height_px == 0 or width_px == 0:
        raise ValueError(
            f"patch_embed: patches of {patch_h}x{patch_w} do not tile an image of "
            f"{height_px}x{width_px}"
        )
    patches = (height_px // patch_h) * (width_px // patch_w)
    check_shape("patch_embed", "bias", bias, width)
    prefix_count = 0
    if prefix is not None:
        prefix_count = prefix.shape[0]
        check_shape("patch_embed", "prefix", prefix, prefix_count, width)
    # one by one: Dynamo compares tuples of symbolic sizes as objects
    if pos_embed is not None and not (
        pos_embed.dim() == 2
        and (pos_embed.shape[0] == patches or pos_embed.shape[0] == prefix_count + patches)
        and pos_embed.shape[1] == width
    ):
        raise ValueError(
            f"patch_embed: pos_embed {list(pos_embed.shape)} is neither [{patches}, {width}] nor "
            f"[{prefix_count + patches}, {width}]"
        )
    _check_statistics("mean", mean, channels)
    _check_statistics("std", std, channels)
    args = (
        images, weight, bias, pos_embed, prefix,
        None if mean is None else [float(value) for value in mean],
        None if std is None else [float(value) for value in std],
    )  # fmt: skip
    op = _patch_embed if uses_triton(weight) else patch_embed_reference
    return op(*args)
