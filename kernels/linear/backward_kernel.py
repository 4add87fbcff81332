"""Gradients of `linear`; the derivation stands in `kernels/linear/backward.py`.

Sums of columns end in float64: so few additions cost nothing, and theirs would be the largest
rounding.

Legend: M rows (batch x tokens), N output features, K input features.
"""

import triton
import triton.language as tl

from fastvit.kernels._epilogue import activate_with_slope, tile_of


@triton.jit
def pre_gradient_kernel(
    grad_ptr,  # [M, N]
    pre_ptr,  # [M, N] or None without an activation
    scale_ptr,  # [N] or None; for an activation only
    row_scale_ptr,  # [M] or None
    out_ptr,  # [M, N] or None: gets the gradient of what goes into the activation
    hidden_ptr,  # [M, N] or None: gets act(pre)
    sums_ptr,  # [parts, N] or None: sums over ROWS rows of `out`, before it is rounded
    scale_sums_ptr,  # [parts, N] or None: of the gradient of scale
    M,
    N,
    stride_gm,
    stride_gn,
    ROWS: tl.constexpr,  # of a program, a multiple of BLOCK_M
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // tiles_n
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    scale_sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, ROWS, BLOCK_M):
        rows = part * ROWS + start + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & in_cols[None, :]
        wide_rows = rows.to(tl.int64)[:, None]
        g_ptrs = grad_ptr + wide_rows * stride_gm + cols[None, :] * stride_gn
        g = tl.load(g_ptrs, mask=inside, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_N]
        if row_scale_ptr is not None:
            g *= tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)[:, None].to(ACC)
        offsets = wide_rows * N + cols[None, :]
        if pre_ptr is not None:
            pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(ACC)
            hidden, slope = activate_with_slope(pre, ACTIVATION)
            if hidden_ptr is not None:
                hidden_out = hidden.to(hidden_ptr.dtype.element_ty)
                tl.store(hidden_ptr + offsets, hidden_out, mask=inside)
            if scale_sums_ptr is not None:
                scale_sums += g * hidden
            if scale_ptr is not None:
                g *= tl.load(scale_ptr + cols, mask=in_cols, other=0.0)[None, :].to(ACC)
            g *= slope
        sums += g
        if out_ptr is not None:
            tl.store(out_ptr + offsets, g.to(out_ptr.dtype.element_ty), mask=inside)
    out_cols = part.to(tl.int64) * N + cols
    if sums_ptr is not None:
        tl.store(sums_ptr + out_cols, tl.sum(sums.to(tl.float64), axis=0), mask=in_cols)
    if scale_sums_ptr is not None:
        total = tl.sum(scale_sums.to(tl.float64), axis=0)
        tl.store(scale_sums_ptr + out_cols, total, mask=in_cols)


@triton.jit
def weight_product_kernel(
    grad,  # pointer to [M, N], or where TMA a descriptor of it with boxes [BLOCK_M, BLOCK_N]
    x,  # pointer to [M, K], or a descriptor with boxes [BLOCK_M, BLOCK_K]
    partial_ptr,  # [SPLIT, N, K] of ACC
    sums_ptr,  # [SPLIT * column tiles, N] or None: sums of grad's columns
    SPLIT,
    M,
    N,
    K,
    stride_gm,
    stride_gn,
    stride_xm,
    stride_xk,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    ACC: tl.constexpr,  # accumulator dtype
    EVEN_M: tl.constexpr,  # M is a multiple of BLOCK_M
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of grad^T x, summed over one of SPLIT parts of the rows (the last may be shorter or
    empty: zeros). The column tiles of one part share the sums of grad's columns among them: each
    adds up every so many blocks of rows, in a loop of its own, because a tile that feeds a product
    may not feed a sum in the same loop (see `fastvit/audit.py`)."""
    pid = tl.program_id(0)
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    split = pid // tiles
    tile_n, tile_k = tile_of(pid % tiles, N, K, BLOCK_N, BLOCK_K, GROUP)
    first_n = tile_n * BLOCK_N
    first_k = tile_k * BLOCK_K
    part = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLIT) * BLOCK_M
    start = split * part
    end = tl.minimum(start + part, M)
    ms = tl.arange(0, BLOCK_M)
    ns = tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    if sums_ptr is not None:
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for m in range(start + tile_k * BLOCK_M, end, tiles_k * BLOCK_M):
            if TMA:
                g_rows = grad.load([m, first_n])  # rows past M are zero
            else:
                wide = (m + ms).to(tl.int64)[:, None] * stride_gm
                g_ptrs = grad + wide + (first_n + ns)[None, :] * stride_gn
                mask = (m + ms < end)[:, None] & (first_n + ns < N)[None, :]
                g_rows = tl.load(g_ptrs, mask=mask, other=0.0)
            sums += g_rows.to(ACC)
        sums_base = sums_ptr + (split * tiles_k + tile_k).to(tl.int64) * N
        total = tl.sum(sums.to(tl.float64), axis=0)
        tl.store(sums_base + first_n + ns, total, mask=first_n + ns < N)

    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    if TMA:
        for m in range(start, end, BLOCK_M):
            g_tile = grad.load([m, first_n])  # [BLOCK_M, BLOCK_N]
            x_tile = x.load([m, first_k])  # [BLOCK_M, BLOCK_K]
            acc = tl.dot(g_tile.T, x_tile, acc)
    else:
        # columns past the end read the first ones instead, and nothing of them is stored; the
        # compiler sees through a remainder that 16 columns stay side by side, not through a minimum
        g_cols = (first_n + ns) % N
        x_cols = (first_k + ks) % K
        g_base = grad + start.to(tl.int64) * stride_gm
        x_base = x + start.to(tl.int64) * stride_xm
        g_offsets = g_cols[:, None] * stride_gn + ms[None, :] * stride_gm
        x_offsets = ms[:, None] * stride_xm + x_cols[None, :] * stride_xk
        for m in range(start, end, BLOCK_M):
            if EVEN_M:
                g_tile = tl.load(g_base + g_offsets)  # [BLOCK_N, BLOCK_M]
                x_tile = tl.load(x_base + x_offsets)  # [BLOCK_M, BLOCK_K]
            else:
                g_tile = tl.load(g_base + g_offsets, mask=ms[None, :] < end - m, other=0.0)
                x_tile = tl.load(x_base + x_offsets, mask=ms[:, None] < end - m, other=0.0)
            acc = tl.dot(g_tile, x_tile, acc, input_precision=PRECISION, out_dtype=ACC)
            g_base += BLOCK_M * stride_gm
            x_base += BLOCK_M * stride_xm
    rows = first_n + ns
    inside = (rows < N)[:, None] & (first_k + ks < K)[None, :]
    base = partial_ptr + split.to(tl.int64) * N * K
    tl.store(base + rows.to(tl.int64)[:, None] * K + (first_k + ks)[None, :], acc, mask=inside)


@triton.jit
def weight_gradient_kernel(
    partial_ptr,  # [SPLIT, N, K]
    weight_ptr,  # [N, K] with dscale_ptr
    bias_ptr,  # [N] or None
    scale_ptr,  # [N] or None
    colsum_ptr,  # [N] with bias_ptr: sums of the gradient's columns
    dweight_ptr,  # [N, K] or None
    dscale_ptr,  # [N] or None
    SPLIT,
    N,
    K,
    stride_wn,
    stride_wk,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum P of `weight_product_kernel`'s parts, always in the same order; scale * P, and each
    row's sum of P * W, plus bias * colsum."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    wide_rows = rows.to(tl.int64)[:, None]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + rows, mask=in_rows, other=0.0).to(ACC)
    dscale = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        inside = in_rows[:, None] & (cols < K)[None, :]
        offsets = wide_rows * K + cols[None, :]
        source = partial_ptr + offsets
        total = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
        for _ in range(SPLIT):
            total += tl.load(source, mask=inside, other=0.0).to(ACC)
            source += tl.cast(N, tl.int64) * K
        if dscale_ptr is not None:
            w_ptrs = weight_ptr + wide_rows * stride_wn + cols[None, :] * stride_wk
            dscale += total * tl.load(w_ptrs, mask=inside, other=0.0).to(ACC)
        if dweight_ptr is not None:
            if scale_ptr is not None:
                total *= scale[:, None]
            tl.store(dweight_ptr + offsets, total.to(dweight_ptr.dtype.element_ty), mask=inside)
    if dscale_ptr is not None:
        out = tl.sum(dscale, axis=1)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + rows, mask=in_rows, other=0.0).to(ACC)
            out += bias * tl.load(colsum_ptr + rows, mask=in_rows, other=0.0).to(ACC)
        tl.store(dscale_ptr + rows, out.to(dscale_ptr.dtype.element_ty), mask=in_rows)
