"""`linear` for few rows: the sum over K is split among several programs, and a second kernel adds
their parts up, always in the same order.

Legend: M rows (batch x tokens), N output features, K input features.
"""

import triton
import triton.language as tl

from fastvit.kernels._epilogue import rescale, tile_of
from fastvit.kernels.linear.kernel import _finish, _pointer_product, _tma_product


@triton.jit
def linear_split_kernel(
    x,  # pointer to [M, K], or where TMA a descriptor of it with boxes [BLOCK_M, BLOCK_K]
    weight,  # pointer to [N, K], or a descriptor with boxes [BLOCK_N, BLOCK_K]
    partial_ptr,  # [SPLIT_K, M, N] of ACC
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of x W^T, summed over one of SPLIT_K parts of K (the last may be shorter or empty:
    zeros)."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    split = pid // tiles
    tile_m, tile_n = tile_of(pid % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = tile_m * BLOCK_M
    first_col = tile_n * BLOCK_N
    part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    k_start = split * part
    k_end = tl.minimum(k_start + part, K)
    if TMA:
        acc = _tma_product(
            x, weight, first_row, first_col, k_start, k_end, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
    else:
        wide_start = k_start.to(tl.int64)
        acc = _pointer_product(
            x + wide_start * stride_xk, weight + wide_start * stride_wk, first_row, first_col,
            M, N, k_end - k_start, stride_xm, stride_xk, stride_wn, stride_wk, PRECISION, ACC,
            EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    base = partial_ptr + split.to(tl.int64) * M * N
    tl.store(base + rows.to(tl.int64)[:, None] * N + cols[None, :], acc, mask=inside)


@triton.jit
def linear_reduce_kernel(
    partial_ptr,  # [SPLIT_K, M, N] of ACC
    bias_ptr,  # [N] or None
    scale_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    y_ptr,  # [M, N]
    factor_ptr,  # [N] or None: multiplies the sums
    colsum_ptr,  # [N] with statistics
    statistics_ptr,  # [M, PARTS, 2] of x's rows, or None: see `rescale`
    out_statistics_ptr,  # [M, N / columns of a band, 2] of y's rows, or None
    inv_out_scale,  # multiplies y before it is stored as e4m3, or None
    row_scale_ptr,  # [M] or None: DropPath's factor of each row
    pre_ptr,  # [M, N] or None: gets what goes into the activation; see hidden_ptr
    hidden_ptr,  # [M, N] or None: gets act(pre), and the sums are multiplied by act'(pre)
    M,
    N,
    K,
    stride_rm,
    stride_rn,
    stride_ym,
    PARTS: tl.constexpr,
    PART: tl.constexpr,  # columns of a part of x's statistics
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    SUBTILES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of `linear_split_kernel`'s parts, then `linear`'s epilogue."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_row = tl.program_id(0) // tiles_n * BLOCK_M
    first_col = tl.program_id(0) % tiles_n * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    source = partial_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for _ in tl.static_range(SPLIT_K):
        acc += tl.load(source, mask=inside, other=0.0)
        source += tl.cast(M, tl.int64) * N
    acc = rescale(
        acc, factor_ptr, colsum_ptr, statistics_ptr, first_row, first_col, M, N, K,
        PARTS, PART, EPS, ACC, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    _finish(
        acc, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
        stride_rm, stride_rn, stride_ym, out_statistics_ptr, inv_out_scale,
        row_scale_ptr, pre_ptr, hidden_ptr,
        ACTIVATION, ACC, BLOCK_M, BLOCK_N, SUBTILES,
    )  # fmt: skip
