"""y = act(x W^T + b) * scale + residual, one tile of y per program.

Legend: M rows (batch x tokens), N output features, K input features.
"""

import triton
import triton.language as tl

from fastvit.kernels._epilogue import activate, tile_of


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = (tile_m * BLOCK_M).to(tl.int64)
    first_col = (tile_n * BLOCK_N).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # one 64-bit base per tile and 32-bit offsets within it, to save registers; rows past the end
    # read the last row instead: no mask in the loop, and nothing of them is stored
    rows_left = M - tile_m * BLOCK_M
    cols_left = N - tile_n * BLOCK_N
    x_base = x_ptr + first_row * stride_xm
    w_base = weight_ptr + first_col * stride_wn
    x_offsets = tl.minimum(rows, rows_left - 1)[:, None] * stride_xm + ks[None, :] * stride_xk
    w_offsets = tl.minimum(cols, cols_left - 1)[None, :] * stride_wn + ks[:, None] * stride_wk

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

    in_cols = cols < cols_left
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first_col + cols, mask=in_cols, other=0.0)[None, :].to(ACC)
    acc = activate(acc, ACTIVATION)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + first_col + cols, mask=in_cols, other=0.0)[None, :].to(ACC)
    inside = (rows < rows_left)[:, None] & in_cols[None, :]
    if residual_ptr is not None:
        r_base = residual_ptr + first_row * stride_rm + first_col * stride_rn
        r_offsets = rows[:, None] * stride_rm + cols[None, :] * stride_rn
        acc += tl.load(r_base + r_offsets, mask=inside, other=0.0).to(ACC)
    y_base = y_ptr + first_row * stride_ym + first_col
    y_offsets = rows[:, None] * stride_ym + cols[None, :]
    tl.store(y_base + y_offsets, acc.to(y_ptr.dtype.element_ty), mask=inside)
