"""Gradients of layer norm and RMS norm, derived in `kernels/layer_norm/launch.py`. Legend: M rows,
D width."""

import triton
import triton.language as tl

from fastvit.kernels.layer_norm.kernel import affine, mean_of, normalise


@triton.jit
def norm_backward_kernel(
    grad,  # Matrix [M, D]
    x,  # Matrix [M, D]
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None; with normal_ptr only
    add,  # Matrix [M, D] or None: added to dx
    dx_ptr,  # [M, D] or None
    normal_ptr,  # [M, D] or None: gets the norm's result again
    dweight_ptr,  # [programs, D] or None: sums over a program's rows
    dbias_ptr,  # [programs, D] or None
    M,
    ROWS,  # of a program, a multiple of BLOCK_M
    D: tl.constexpr, EPS: tl.constexpr,
    CENTER: tl.constexpr,  # layer norm; else RMS norm
    ACC: tl.constexpr,  # dtype of the statistics and sums
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # power of two, at least D
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    in_row = cols[None, :] < D
    first = tl.program_id(0) * ROWS
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, ROWS, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        in_rows = (rows < M)[:, None]
        inside = in_rows & in_row
        wide_rows = rows.to(tl.int64)[:, None]
        x_ptrs = x.ptr + wide_rows * x.stride_m + cols[None, :] * x.stride_n
        g_ptrs = grad.ptr + wide_rows * grad.stride_m + cols[None, :] * grad.stride_n
        values = tl.load(x_ptrs, mask=inside, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_N]
        g = tl.load(g_ptrs, mask=inside, other=0.0).to(ACC)
        normal, rstd = normalise(values, in_row, D, EPS, CENTER)
        normal = tl.where(in_rows, normal, 0.0)  # without eps rows past M are not finite
        offsets = wide_rows * D + cols[None, :]
        if normal_ptr is not None:
            y = affine(normal, weight_ptr, bias_ptr, D)
            tl.store(normal_ptr + offsets, y.to(normal_ptr.dtype.element_ty), mask=inside)
        if dweight_ptr is not None:
            dweight += g * normal
        if dbias_ptr is not None:
            dbias += g
        if dx_ptr is not None:
            g = affine(g, weight_ptr, None, D)
            dx = g - normal * mean_of(g * normal, D)
            if CENTER:
                dx -= mean_of(g, D)
            dx *= rstd
            if add is not None:
                a_ptrs = add.ptr + wide_rows * add.stride_m + cols[None, :] * add.stride_n
                dx += tl.load(a_ptrs, mask=inside, other=0.0).to(ACC)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    out = tl.program_id(0).to(tl.int64) * D + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + out, tl.sum(dweight.to(tl.float64), axis=0), mask=cols < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + out, tl.sum(dbias.to(tl.float64), axis=0), mask=cols < D)
