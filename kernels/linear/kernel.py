"""y = act(x W^T + b) * scale + residual, one tile of y per program.

Legend: M rows (batch x tokens), N output features, K input features.
"""

import triton
import triton.language as tl

from fastvit.kernels._epilogue import (
    activate,
    activate_with_slope,
    rescale,
    saturate,
    store_row_statistics,
    tile_of,
)


@triton.jit
def _finish(
    acc, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
    stride_rm, stride_rn, stride_ym, out_statistics_ptr, inv_out_scale,
    row_scale_ptr, pre_ptr, hidden_ptr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Bias, activation, scales, residual and store of the tile at (first_row, first_col), in
    SUBTILES (1, 2 or 4) bands of columns one after another, to need fewer registers at a time."""
    if SUBTILES == 1:
        _finish_band(
            acc, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
            stride_rm, stride_rn, stride_ym, out_statistics_ptr, inv_out_scale,
            row_scale_ptr, pre_ptr, hidden_ptr,
            ACTIVATION, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _finish(
            left, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
            stride_rm, stride_rn, stride_ym, out_statistics_ptr, inv_out_scale,
            row_scale_ptr, pre_ptr, hidden_ptr,
            ACTIVATION, ACC, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
        _finish(
            right, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col + HALF, M, N,
            stride_rm, stride_rn, stride_ym, out_statistics_ptr, inv_out_scale,
            row_scale_ptr, pre_ptr, hidden_ptr,
            ACTIVATION, ACC, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip


@triton.jit
def _finish_band(
    acc, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
    stride_rm, stride_rn, stride_ym, out_statistics_ptr, inv_out_scale,
    row_scale_ptr, pre_ptr, hidden_ptr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_cols = cols < N - first_col
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first_col + cols, mask=in_cols, other=0.0)[None, :].to(ACC)
    inside = (rows < M - first_row)[:, None] & in_cols[None, :]
    wide_row = first_row.to(tl.int64)
    wide_col = first_col.to(tl.int64)
    y_start = wide_row * stride_ym + wide_col
    y_offsets = rows[:, None] * stride_ym + cols[None, :]
    if hidden_ptr is not None:
        # backward: acc is the gradient of act(pre)
        pre = tl.load(pre_ptr + y_start + y_offsets, mask=inside, other=0.0).to(ACC)
        hidden, slope = activate_with_slope(pre, ACTIVATION)
        hidden = hidden.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + y_start + y_offsets, hidden, mask=inside)
        acc *= slope
    else:
        if pre_ptr is not None:
            pre = acc.to(pre_ptr.dtype.element_ty)
            tl.store(pre_ptr + y_start + y_offsets, pre, mask=inside)
        acc = activate(acc, ACTIVATION)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + first_col + cols, mask=in_cols, other=0.0)[None, :].to(ACC)
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + first_row + rows, mask=rows < M - first_row, other=0.0)
        acc *= row_scale[:, None].to(ACC)
    if residual_ptr is not None:
        r_base = residual_ptr + wide_row * stride_rm + wide_col * stride_rn
        r_offsets = rows[:, None] * stride_rm + cols[None, :] * stride_rn
        acc += tl.load(r_base + r_offsets, mask=inside, other=0.0).to(ACC)
    if inv_out_scale is not None:
        acc = saturate(acc * inv_out_scale)
    y = acc.to(y_ptr.dtype.element_ty)
    if out_statistics_ptr is not None:
        store_row_statistics(
            y, out_statistics_ptr, first_row, first_col, M, N, ACC, BLOCK_M, BLOCK_N
        )  # fmt: skip
    tl.store(y_ptr + y_start + y_offsets, y, mask=inside)


@triton.jit
def linear_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
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
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_rm,
    stride_rn,
    stride_ym,
    PARTS: tl.constexpr,
    PART: tl.constexpr,  # columns of a part of x's statistics
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    ACC: tl.constexpr,  # accumulator dtype
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = tile_m * BLOCK_M
    first_col = tile_n * BLOCK_N
    acc = _pointer_product(
        x_ptr, weight_ptr, first_row, first_col, M, N, K, stride_xm, stride_xk, stride_wn,
        stride_wk, PRECISION, ACC, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
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


@triton.jit
def _pointer_product(
    x_ptr, weight_ptr, first_row, first_col, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, ACC: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of x W^T at (first_row, first_col)."""
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # one 64-bit base per tile and 32-bit offsets within it, to save registers; rows past the end
    # read the last row instead: no mask in the loop, and nothing of them is stored
    x_base = x_ptr + first_row.to(tl.int64) * stride_xm
    w_base = weight_ptr + first_col.to(tl.int64) * stride_wn
    x_rows = tl.minimum(rows, M - first_row - 1)
    w_rows = tl.minimum(cols, N - first_col - 1)
    x_offsets = x_rows[:, None] * stride_xm + ks[None, :] * stride_xk
    w_offsets = w_rows[None, :] * stride_wn + ks[:, None] * stride_wk

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_base + x_offsets)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_base + w_offsets)  # [BLOCK_K, BLOCK_N]
        else:
            x = tl.load(x_base + x_offsets, mask=ks[None, :] < K - k, other=0.0)
            w = tl.load(w_base + w_offsets, mask=ks[:, None] < K - k, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
        x_base += BLOCK_K * stride_xk
        w_base += BLOCK_K * stride_wk
    return acc


@triton.jit
def linear_tma_kernel(
    x_desc,  # descriptor of [M, K], boxes [BLOCK_M, BLOCK_K]
    weight_desc,  # descriptor of [N, K], boxes [BLOCK_N, BLOCK_K]
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
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`linear_kernel` for half dtypes with its tiles brought by the tensor memory accelerator
    (sm_90 and newer), which computes addresses and clips at the edges.

    A PERSISTENT program goes on to further tiles; the compiler then starts loading the next one
    while it finishes this one.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tma_tile(
                tile, x_desc, weight_desc, bias_ptr, scale_ptr, residual_ptr, y_ptr,
                factor_ptr, colsum_ptr, statistics_ptr, out_statistics_ptr, inv_out_scale,
                row_scale_ptr, pre_ptr, hidden_ptr, M, N, K,
                stride_rm, stride_rn, stride_ym, PARTS, PART, EPS, ACTIVATION, GROUP_M, SUBTILES,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _tma_tile(
            tl.program_id(0), x_desc, weight_desc, bias_ptr, scale_ptr, residual_ptr, y_ptr,
            factor_ptr, colsum_ptr, statistics_ptr, out_statistics_ptr, inv_out_scale,
            row_scale_ptr, pre_ptr, hidden_ptr, M, N, K,
            stride_rm, stride_rn, stride_ym, PARTS, PART, EPS, ACTIVATION, GROUP_M, SUBTILES,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _tma_tile(
    tile, x_desc, weight_desc, bias_ptr, scale_ptr, residual_ptr, y_ptr,
    factor_ptr, colsum_ptr, statistics_ptr, out_statistics_ptr, inv_out_scale,
    row_scale_ptr, pre_ptr, hidden_ptr, M, N, K,
    stride_rm, stride_rn, stride_ym, PARTS: tl.constexpr, PART: tl.constexpr, EPS: tl.constexpr,
    ACTIVATION: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = tile_m * BLOCK_M
    first_col = tile_n * BLOCK_N
    acc = _tma_product(
        x_desc, weight_desc, first_row, first_col, 0, K, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    acc = rescale(
        acc, factor_ptr, colsum_ptr, statistics_ptr, first_row, first_col, M, N, K,
        PARTS, PART, EPS, tl.float32, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    _finish(
        acc, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
        stride_rm, stride_rn, stride_ym, out_statistics_ptr, inv_out_scale,
        row_scale_ptr, pre_ptr, hidden_ptr,
        ACTIVATION, tl.float32, BLOCK_M, BLOCK_N, SUBTILES,
    )  # fmt: skip


@triton.jit
def _tma_product(
    x_desc, weight_desc, first_row, first_col, k_start, k_end, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of x W^T at (first_row, first_col), summed over [k_start, k_end)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(k_start, k_end, BLOCK_K):
        x = x_desc.load([first_row, k])  # [BLOCK_M, BLOCK_K]
        w = weight_desc.load([first_col, k])  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(x, w.T, acc)
    return acc


@triton.jit
def linear_device_tma_kernel(
    x_ptr,  # [M, K], rows packed
    weight_ptr,  # [N, K], rows packed
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
    stride_xm,
    stride_wn,
    stride_rm,
    stride_rn,
    stride_ym,
    PARTS: tl.constexpr,
    PART: tl.constexpr,  # columns of a part of x's statistics
    EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`linear_tma_kernel` with descriptors that the kernel makes itself, in scratch memory, and
    always a loop over tiles.

    WARP_SPECIALIZE lets the compiler give the loads to warps of their own, which run ahead into the
    next tile while two other groups multiply and finish, each one half of BLOCK_M. On sm_90 that
    takes num_warps 4 and a BLOCK_M of 128 or more: with 8 it is ignored, and with 64 rows both
    groups do the same work (`fastvit/audit.py` looks for both).
    """
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    weight_desc = tl.make_tensor_descriptor(weight_ptr, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0),
        flatten=not WARP_SPECIALIZE, warp_specialize=WARP_SPECIALIZE,
    ):  # fmt: skip
        _tma_tile(
            tile, x_desc, weight_desc, bias_ptr, scale_ptr, residual_ptr, y_ptr,
            factor_ptr, colsum_ptr, statistics_ptr, out_statistics_ptr, inv_out_scale,
            row_scale_ptr, pre_ptr, hidden_ptr, M, N, K,
            stride_rm, stride_rn, stride_ym, PARTS, PART, EPS, ACTIVATION, GROUP_M, SUBTILES,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
