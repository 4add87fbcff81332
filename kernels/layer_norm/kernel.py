"""Layer norm and RMS norm, BLOCK_M whole rows per program. Legend: M rows, D width."""

import triton
import triton.language as tl

from fastvit.kernels._activations import saturate


@triton.jit
def layer_norm_kernel(
    x,  # Matrix [M, D]
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    y_ptr,  # [M, D]
    M,
    inv_out_scale,  # multiplies y before it is stored as e4m3, or None
    D: tl.constexpr, EPS: tl.constexpr,
    CENTER: tl.constexpr,  # subtract the mean: layer norm; else RMS norm
    ACC: tl.constexpr,  # dtype of the statistics
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # power of two, at least D
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_row = cols[None, :] < D
    inside = (rows[:, None] < M) & in_row
    # [BLOCK_M, BLOCK_N]
    x_ptrs = x.ptr + rows[:, None] * x.stride_m + cols[None, :] * x.stride_n
    values = tl.load(x_ptrs, mask=inside, other=0.0).to(ACC)
    normal, _ = normalise(values, in_row, D, EPS, CENTER)
    y = affine(normal, weight_ptr, bias_ptr, D)
    if inv_out_scale is not None:
        y = saturate(y * inv_out_scale)
    y_ptrs = y_ptr + rows[:, None] * D + cols[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def mean_of(values, D: tl.constexpr):
    """[rows, 1]: over D values of each row; the others are zero. A factor, for the compiler's
    division is not exact: of one value it would not give that value."""
    return (tl.sum(values, axis=1) * (1.0 / D))[:, None]


@triton.jit
def normalise(values, in_row, D: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr):
    """Rows with mean 0 (if CENTER) and mean square 1, and their factors [rows, 1]."""
    if CENTER:
        # two passes over registers: the mean first, then centred squares
        values = tl.where(in_row, values - mean_of(values, D), 0.0)
    rstd = 1.0 / tl.sqrt(mean_of(values * values, D) + EPS)
    return values * rstd, rstd


@triton.jit
def affine(normal, weight_ptr, bias_ptr, D: tl.constexpr):
    """normal * weight + bias, as far as they are there."""
    cols = tl.arange(0, normal.shape[1])
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0)
        normal *= weight[None, :].to(normal.dtype)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0)
        normal += bias[None, :].to(normal.dtype)
    return normal
