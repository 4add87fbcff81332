"""`patch_embed`: registration, public function."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels._checks import check_floats, check_same_dtype, check_shapes
from fastvit.kernels._launch import run_to_output
from fastvit.kernels._register import Gradient, define_op
from fastvit.kernels.linear.launch import result_dtype
from fastvit.kernels.patch_embed.launch import Values, patch_embed_backward, prepare, tokens_of
from fastvit.kernels.patch_embed.reference import patch_embed_reference


def _check(
    weight: Any, images: Any, bias: Any, pos_embed: Any, prefix: Any, mean: Values | None,
    std: Values | None,
) -> None:  # fmt: skip
    op = "patch_embed"
    floats = {} if images.dtype == torch.uint8 else {"images": images}
    check_floats(op, weight=weight, bias=bias, pos_embed=pos_embed, prefix=prefix, **floats)
    check_same_dtype(op, weight, bias=bias, **floats)
    check_shapes(
        op, weight=(weight, "D C ph pw"), images=(images, "B C H W"), bias=(bias, "D"),
        pos_embed=(pos_embed, "positions D"), prefix=(prefix, "P D"),
    )  # fmt: skip
    _, channels, patch_h, patch_w = weight.shape
    height, width = images.shape[2:]
    if height % patch_h or width % patch_w or height == 0 or width == 0:
        raise ValueError(
            f"{op}: patches of {patch_h}x{patch_w} do not tile an image of {height}x{width}"
        )
    patches, tokens = tokens_of(weight, images, prefix)
    if pos_embed is not None and pos_embed.shape[0] != patches and pos_embed.shape[0] != tokens:
        raise ValueError(
            f"{op}: pos_embed {list(pos_embed.shape)} has neither {patches} nor {tokens} rows"
        )
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(f"{op}: {name} has {len(values)} values for {channels} channels")
    if std is not None and any(value == 0 for value in std):
        raise ValueError(f"{op}: std {list(std)} contains 0")


def _fake(weight: Tensor, images: Tensor, bias: Any, pos_embed: Any, prefix: Any, *_: Any) -> Any:
    shape = (images.shape[0], tokens_of(weight, images, prefix)[1], weight.shape[0])
    return images.new_empty(shape, dtype=result_dtype(weight, pos_embed, prefix))


def _flops(weight: Tensor, images: Tensor, *rest: object) -> int:
    return 2 * images.shape[0] * tokens_of(weight, images, None)[0] * math.prod(weight.shape)


_patch_embed = define_op(
    "patch_embed",
    "Tensor weight, Tensor images, Tensor? bias, Tensor? pos_embed, Tensor? prefix, "
    "float[]? mean, float[]? std",
    _check, prepare, run_to_output,
    eager=lambda weight, images, *rest: patch_embed_reference(images, weight, *rest),
    fake=_fake, flops=_flops, autocast=("weight", "images", "bias"),
    gradient=Gradient(patch_embed_backward),
)  # fmt: skip


def patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, *, pos_embed: Tensor | None = None,
    prefix: Tensor | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:  # fmt: skip
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
    mean = None if mean is None else tuple(map(float, mean))
    std = None if std is None else tuple(map(float, std))
    return _patch_embed.apply((weight, images, bias, pos_embed, prefix), mean, std)
