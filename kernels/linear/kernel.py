"""y = act(x W^T + b) * scale + residual, one tile of y per program.

Legend: M rows (batch x tokens), N output features, K input features.
"""

import triton
import triton.language as tl

from fastvit.kernels._epilogue import activate, tile_of


@triton.jit
def _finish(
    acc, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
    stride_rm, stride_rn, stride_ym, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Bias, activation, scale, residual and store of the tile at (first_row, first_col), in
    SUBTILES (1, 2 or 4) bands of columns one after another, to need fewer registers at a time."""
    if SUBTILES == 1:
        _finish_band(
            acc, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
            stride_rm, stride_rn, stride_ym, ACTIVATION, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _finish(
            left, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
            stride_rm, stride_rn, stride_ym, ACTIVATION, ACC, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
        _finish(
            right, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col + HALF, M, N,
            stride_rm, stride_rn, stride_ym, ACTIVATION, ACC, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip


@triton.jit
def _finish_band(
    acc, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
    stride_rm, stride_rn, stride_ym, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_cols = cols < N - first_col
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first_col + cols, mask=in_cols, other=0.0)[None, :].to(ACC)
    acc = activate(acc, ACTIVATION)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + first_col + cols, mask=in_cols, other=0.0)[None, :].to(ACC)
    inside = (rows < M - first_row)[:, None] & in_cols[None, :]
    wide_row = first_row.to(tl.int64)
    wide_col = first_col.to(tl.int64)
    if residual_ptr is not None:
        r_base = residual_ptr + wide_row * stride_rm + wide_col * stride_rn
        r_offsets = rows[:, None] * stride_rm + cols[None, :] * stride_rn
        acc += tl.load(r_base + r_offsets, mask=inside, other=0.0).to(ACC)
    y_base = y_ptr + wide_row * stride_ym + wide_col
    y_offsets = rows[:, None] * stride_ym + cols[None, :]
    tl.store(y_base + y_offsets, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    scale_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    y_ptr,  # [M, N]
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
    _finish(
        acc, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
        stride_rm, stride_rn, stride_ym, ACTIVATION, ACC, BLOCK_M, BLOCK_N, SUBTILES,
    )  # fmt: skip


@triton.jit
def linear_tma_kernel(
    x_desc,  # descriptor of [M, K], boxes [BLOCK_M, BLOCK_K]
    weight_desc,  # descriptor of [N, K], boxes [BLOCK_N, BLOCK_K]
    bias_ptr,  # [N] or None
    scale_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    y_ptr,  # [M, N]
    M,
    N,
    K,
    stride_rm,
    stride_rn,
    stride_ym,
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
                tile, x_desc, weight_desc, bias_ptr, scale_ptr, residual_ptr, y_ptr, M, N, K,
                stride_rm, stride_rn, stride_ym, ACTIVATION, GROUP_M, SUBTILES,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _tma_tile(
            tl.program_id(0), x_desc, weight_desc, bias_ptr, scale_ptr, residual_ptr, y_ptr,
            M, N, K, stride_rm, stride_rn, stride_ym, ACTIVATION, GROUP_M, SUBTILES,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _tma_tile(
    tile, x_desc, weight_desc, bias_ptr, scale_ptr, residual_ptr, y_ptr, M, N, K,
    stride_rm, stride_rn, stride_ym, ACTIVATION: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = tile_m * BLOCK_M
    first_col = tile_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([first_row, k])  # [BLOCK_M, BLOCK_K]
        w = weight_desc.load([first_col, k])  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(x, w.T, acc)
    _finish(
        acc, bias_ptr, scale_ptr, residual_ptr, y_ptr, first_row, first_col, M, N,
        stride_rm, stride_rn, stride_ym, ACTIVATION, tl.float32, BLOCK_M, BLOCK_N, SUBTILES,
    )  # fmt: skip
