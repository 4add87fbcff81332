"""Layer norm and RMS norm, BLOCK_M whole rows per program. Legend: M rows, D width."""

import triton
import triton.language as tl

from fastvit.kernels._epilogue import saturate, store_row_statistics


@triton.jit
def layer_norm_kernel(
    x_ptr,  # [M, D]
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    y_ptr,  # [M, D]
    inv_out_scale,  # multiplies y before it is stored as e4m3, or None
    M,
    D,
    stride_xm,
    stride_xd,
    stride_ym,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,  # subtract the mean: layer norm; else RMS norm
    ACC: tl.constexpr,  # dtype of the statistics
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # power of two, at least D
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_row = cols[None, :] < D
    inside = (rows[:, None] < M) & in_row
    # [BLOCK_M, BLOCK_N]
    x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xd
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(ACC)
    if CENTER:
        # two passes over registers: the mean first, then centred squares
        x = tl.where(in_row, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
    variance = tl.sum(x * x, axis=1) / D
    y = x * (1.0 / tl.sqrt(variance + EPS))[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols, mask=cols < D, other=0.0)[None, :].to(ACC)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < D, other=0.0)[None, :].to(ACC)
    if inv_out_scale is not None:
        y = saturate(y * inv_out_scale)
    y_ptrs = y_ptr + rows[:, None] * stride_ym + cols[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_statistics_kernel(
    x_ptr,  # [M, D]
    statistics_ptr,  # [M, 1, 2]
    M,
    D,
    stride_xm,
    stride_xd,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # power of two, at least D
):
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (cols[None, :] < D)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xd
    x = tl.load(x_ptrs, mask=inside, other=0.0)
    store_row_statistics(x, statistics_ptr, first_row, first_row * 0, M, D, ACC, BLOCK_M, BLOCK_N)


@triton.jit
def fp8_quantize_kernel(
    x_ptr,  # [SIZE]
    y_ptr,  # [SIZE] of e4m3
    inv_out_scale,
    SIZE,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < SIZE, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, saturate(x * inv_out_scale).to(tl.float8e4nv), mask=offsets < SIZE)
