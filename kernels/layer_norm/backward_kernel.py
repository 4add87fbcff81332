"""Gradients of layer norm and RMS norm: the derivation stands in `kernels/layer_norm/backward.py`.

Legend: M rows, D width.
"""

import triton
import triton.language as tl


@triton.jit
def norm_backward_kernel(
    grad_ptr,  # [M, D]
    x_ptr,  # [M, D]
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None; with normal_ptr only
    add_ptr,  # [M, D] or None: added to dx
    dx_ptr,  # [M, D] or None
    normal_ptr,  # [M, D] or None: gets the norm's result again
    dweight_ptr,  # [programs, D] or None: sums over a program's rows
    dbias_ptr,  # [programs, D] or None
    M,
    D,
    ROWS,  # of a program, a multiple of BLOCK_M
    stride_gm,
    stride_gd,
    stride_xm,
    stride_xd,
    stride_am,
    stride_ad,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,  # layer norm; else RMS norm
    ACC: tl.constexpr,  # dtype of the statistics and sums
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # power of two, at least D
):
    cols = tl.arange(0, BLOCK_N)
    in_row = cols[None, :] < D
    first = tl.program_id(0) * ROWS
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0)[None, :].to(ACC)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, ROWS, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        in_rows = rows < M
        inside = in_rows[:, None] & in_row
        wide_rows = rows.to(tl.int64)[:, None]
        x_ptrs = x_ptr + wide_rows * stride_xm + cols[None, :] * stride_xd
        g_ptrs = grad_ptr + wide_rows * stride_gm + cols[None, :] * stride_gd
        x = tl.load(x_ptrs, mask=inside, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_N]
        g = tl.load(g_ptrs, mask=inside, other=0.0).to(ACC)
        if CENTER:
            x = tl.where(in_row, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + EPS)
        rstd = tl.where(in_rows, rstd, 0.0)[:, None]
        x *= rstd
        offsets = wide_rows * D + cols[None, :]
        if normal_ptr is not None:
            y = x
            if weight_ptr is not None:
                y *= weight
            if bias_ptr is not None:
                y += tl.load(bias_ptr + cols, mask=cols < D, other=0.0)[None, :].to(ACC)
            tl.store(normal_ptr + offsets, y.to(normal_ptr.dtype.element_ty), mask=inside)
        if dweight_ptr is not None:
            dweight += g * x
        if dbias_ptr is not None:
            dbias += g
        if dx_ptr is not None:
            if weight_ptr is not None:
                g *= weight
            dx = g - x * (tl.sum(g * x, axis=1) / D)[:, None]
            if CENTER:
                dx -= (tl.sum(g, axis=1) / D)[:, None]
            dx *= rstd
            if add_ptr is not None:
                a_ptrs = add_ptr + wide_rows * stride_am + cols[None, :] * stride_ad
                dx += tl.load(a_ptrs, mask=inside, other=0.0).to(ACC)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    out = tl.program_id(0).to(tl.int64) * D + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + out, tl.sum(dweight.to(tl.float64), axis=0), mask=cols < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + out, tl.sum(dbias.to(tl.float64), axis=0), mask=cols < D)
