"""Gradients of `linear`; the derivation stands in `kernels/linear/launch_backward.py`.

Sums of columns end in float64: so few additions cost nothing, and theirs would be the largest
rounding.

Legend: M rows (batch x tokens), N output features, K input features.
"""

import triton
import triton.language as tl

from fastvit.kernels._activations import activate_with_slope
from fastvit.kernels._tiles import Matrix, product, store, tile_of


@triton.jit
def pre_gradient_kernel(
    grad,  # Matrix [M, N]
    pre_ptr,  # [M, N] or None without an activation
    scale_ptr,  # [N] or None; for an activation only
    row_scale_ptr,  # [M] or None
    out_ptr,  # [M, N] or None: gets the gradient of what goes into the activation
    hidden_ptr,  # [M, N] or None: gets act(pre)
    sums_ptr,  # [parts, N] or None: sums over ROWS rows of `out`, before it is rounded
    scale_sums_ptr,  # [parts, N] or None: of the gradient of scale
    M, N,
    ROWS: tl.constexpr,  # of a program, a multiple of BLOCK_M
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
        g_ptrs = grad.ptr + wide_rows * grad.stride_m + cols[None, :] * grad.stride_n
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
    grad,  # Matrix [N, M], or the TMA descriptor of its transpose with boxes [BLOCK_M, BLOCK_N]
    x,  # Matrix [K, M], or the TMA descriptor of its transpose with boxes [BLOCK_M, BLOCK_K]
    partial_ptr,  # [SPLIT, N, K] of ACC
    sums_ptr,  # [SPLIT * column tiles, N] or None: sums of grad's rows
    SPLIT, M, N, K,
    TMA: tl.constexpr,  # "columns" for descriptors, or ""
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    ACC: tl.constexpr,  # accumulator dtype
    EVEN: tl.constexpr,  # M is a multiple of BLOCK_M
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of grad x^T (both as they lie in memory, transposed: linear's product), summed over
    one of SPLIT parts of M (the last may be shorter or empty: zeros). The column tiles of one part
    share the sums of grad's rows among them: each adds up every so many blocks, in a loop of its
    own, because a tile that feeds a product may not feed a sum in the same loop (see
    `fastvit/check/audit.py`)."""
    pid = tl.program_id(0)
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    split = pid // tiles
    tile = tile_of(pid % tiles, N, K, BLOCK_N, BLOCK_K, GROUP)
    part = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLIT) * BLOCK_M
    start = split * part
    end = tl.minimum(start + part, M)
    if sums_ptr is not None:
        ms = tl.arange(0, BLOCK_M)
        ns = tile.row + tl.arange(0, BLOCK_N)
        tile_k = tile.col // BLOCK_K
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for m in range(start + tile_k * BLOCK_M, end, tiles_k * BLOCK_M):
            if TMA == "columns":
                values = grad.load([m, tile.row])  # zero past M
            else:
                wide = (m + ms).to(tl.int64)[:, None] * grad.stride_n
                mask = (m + ms < end)[:, None] & (ns < N)[None, :]
                values = tl.load(
                    grad.ptr + wide + ns[None, :] * grad.stride_m, mask=mask, other=0.0
                )
            sums += values.to(ACC)
        total = tl.sum(sums.to(tl.float64), axis=0)
        sums_base = sums_ptr + (split * tiles_k + tile_k).to(tl.int64) * N
        tl.store(sums_base + ns, total, mask=ns < N)
    acc = product(
        grad, x, tile, start, end, TMA, PRECISION, ACC, EVEN, BLOCK_N, BLOCK_K, BLOCK_M
    )  # fmt: skip
    store(Matrix(partial_ptr + split.to(tl.int64) * N * K, K, 1), tile, acc)


@triton.jit
def weight_gradient_kernel(
    partial_ptr,  # [SPLIT, N, K]
    weight,  # Matrix [N, K]
    bias_ptr,  # [N] or None
    scale_ptr,  # [N] or None
    colsum_ptr,  # [N] with bias_ptr: sums of the gradient's columns
    dweight_ptr,  # [N, K] or None
    dscale_ptr,  # [N] or None
    SPLIT, N, K, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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
            w_ptrs = weight.ptr + wide_rows * weight.stride_m + cols[None, :] * weight.stride_n
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
