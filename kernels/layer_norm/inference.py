"""What inference takes from rows beside the norms: their statistics, for a norm that is folded into
the next linear, and their values in e4m3.

Shape legend: D width, T parts of a row's statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.kernels._checks import check_fp8_device, check_out_scale, check_tensors
from fastvit.kernels._device import architecture
from fastvit.kernels._library import define_inference_op, launch, uses_triton
from fastvit.kernels._tuning import TileConfig, cdiv, lookup
from fastvit.kernels.layer_norm.op import MAX_WIDTH, check_layer_norm, launch_norm
from fastvit.kernels.layer_norm.reference import (
    E4M3,
    E4M3_MAX,
    fp8_layer_norm_reference,
    fp8_quantize_reference,
    merge_statistics_reference,
    row_statistics_reference,
)

__all__ = [
    "E4M3", "E4M3_MAX", "fp8_layer_norm", "fp8_quantize", "merge_statistics", "row_statistics",
]  # fmt: skip

QUANTIZE_BLOCK = 4096  # values a program: 16 bytes of bfloat16 for each of 4 x 128 loads


def _no_flops(*shapes: object) -> int:
    return 0  # no products of matrices


def _check_rows(op: str, x: Tensor) -> None:
    check_tensors(op, x)
    if x.dim() < 1 or not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{op}: x {list(x.shape)} needs a last dimension from 1 to {MAX_WIDTH}")


# --------------------------------------------------------------------------- statistics


def _launch_statistics(x: Tensor) -> Tensor:
    import triton.language as tl

    from fastvit.kernels.layer_norm.kernel import row_statistics_kernel

    d = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    statistics = x.new_empty((*x.shape[:-1], 1, 2), dtype=wide)
    if statistics.numel() == 0:
        return statistics
    x2 = x.reshape(-1, d)
    m = x2.shape[0]
    width = 1 << (d - 1).bit_length()
    tile = lookup("layer_norm", architecture(x.device), x.dtype, M=m, D_POW2=width)
    launch(
        row_statistics_kernel,
        cdiv(m, tile.BLOCK_M),
        tile,
        x_ptr=x2,
        statistics_ptr=statistics,
        M=m,
        D=d,
        stride_xm=x2.stride(0),
        stride_xd=x2.stride(1),
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=width,
    )
    return statistics


_row_statistics = define_inference_op(
    "row_statistics",
    "(Tensor x)",
    launch=_launch_statistics,
    eager=row_statistics_reference,
    fake=lambda x: x.new_empty(
        (*x.shape[:-1], 1, 2), dtype=torch.promote_types(x.dtype, torch.float32)
    ),
    flops=_no_flops,
)


def row_statistics(x: Tensor) -> Tensor:
    """Mean and sum of centred squares of each row, for `folded_linear`.

    Args:
        x: [..., D], D up to 16384.

    Returns:
        [..., 1, 2], float32; float64 for float64 input.

    Raises:
        TypeError, ValueError: as `layer_norm`.
    """
    _check_rows("row_statistics", x)
    op = _row_statistics if uses_triton(x) else row_statistics_reference
    return op(x)


def merge_statistics(statistics: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, both [...], of rows of `width` values from the statistics of their parts,
    [..., T, 2]. Plain PyTorch; `folded_linear` does this by itself."""
    return merge_statistics_reference(statistics, width)


# --------------------------------------------------------------------------- e4m3


def _launch_fp8_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_scale: float
) -> Tensor:
    return launch_norm(x, weight, bias, eps, center=True, out_scale=out_scale)


_fp8_layer_norm = define_inference_op(
    "fp8_layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, float out_scale)",
    launch=_launch_fp8_norm,
    eager=fp8_layer_norm_reference,
    fake=lambda x, *rest: x.new_empty(x.shape, dtype=E4M3),
    flops=_no_flops,
)


def fp8_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    out_scale: float,
) -> Tensor:
    """`layer_norm` over `out_scale`, stored as e4m3; beyond +-448 as +-448, NaN as NaN.

    Args:
        x, weight, bias, eps: as in `layer_norm`.
        out_scale: what the result is to be multiplied by later, positive.

    Returns:
        Contiguous [..., D] of torch.float8_e4m3fn.

    Raises:
        TypeError, ValueError: as `layer_norm`, and an `out_scale` that is not positive.
        RuntimeError: a GPU without this e4m3 (before sm_89, AMD's).
    """
    check_layer_norm("fp8_layer_norm", x, weight, bias)
    check_out_scale("fp8_layer_norm", out_scale)
    op = fp8_layer_norm_reference
    if uses_triton(x):
        check_fp8_device("fp8_layer_norm", x.device)
        op = _fp8_layer_norm
    return op(x, weight, bias, eps, out_scale)


def _launch_quantize(x: Tensor, out_scale: float) -> Tensor:
    from fastvit.kernels.layer_norm.kernel import fp8_quantize_kernel

    y = x.new_empty(x.shape, dtype=E4M3)
    if y.numel() == 0:
        return y
    launch(
        fp8_quantize_kernel,
        cdiv(y.numel(), QUANTIZE_BLOCK),
        TileConfig(1, QUANTIZE_BLOCK, num_warps=4),
        x_ptr=x.contiguous(),
        y_ptr=y,
        inv_out_scale=1.0 / out_scale,
        SIZE=y.numel(),
        BLOCK=QUANTIZE_BLOCK,
    )
    return y


_fp8_quantize = define_inference_op(
    "fp8_quantize",
    "(Tensor x, float out_scale)",
    launch=_launch_quantize,
    eager=fp8_quantize_reference,
    fake=lambda x, out_scale: x.new_empty(x.shape, dtype=E4M3),
    flops=_no_flops,
)


def fp8_quantize(x: Tensor, *, out_scale: float) -> Tensor:
    """x / out_scale as e4m3, beyond +-448 as +-448, NaN as NaN.

    Args:
        x: [..., D].
        out_scale: what the result is to be multiplied by later, positive.

    Returns:
        Contiguous [..., D] of torch.float8_e4m3fn.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: an `out_scale` that is not positive.
        RuntimeError: a GPU without this e4m3 (before sm_89, AMD's).
    """
    check_tensors("fp8_quantize", x)
    check_out_scale("fp8_quantize", out_scale)
    op = fp8_quantize_reference
    if uses_triton(x):
        check_fp8_device("fp8_quantize", x.device)
        op = _fp8_quantize
    return op(x, out_scale)
