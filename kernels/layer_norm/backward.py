"""Gradients of y = n * weight + bias with n = (x - mean) * rstd (RMS norm: n = x * rstd, no bias).

With g the gradient of y, h = g * weight and means over a row:

    dx = rstd * (h - mean(h) - n * mean(h * n))    (RMS norm: without mean(h))
    dweight = colsum(g * n)    dbias = colsum(g)

Nothing but x is kept: mean and rstd are computed again, which reads no more. The column sums are
taken over the rows of each program, and then over programs.

Shape legend: M rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.kernels._device import architecture, multiprocessors
from fastvit.kernels._library import launch
from fastvit.kernels._tuning import cdiv, lookup

PROGRAMS = 4  # a multiprocessor, at most: each leaves a row of partial sums


def layer_norm_backward(
    grad: Tensor,
    output: None,
    kept: Sequence[Tensor],
    args: tuple[Tensor, Tensor | None, Tensor | None, float],
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `_library.Gradient` has it."""
    x, weight, bias, eps = args
    grads = norm_gradients(grad, x, weight, bias, eps, (needs[0], needs[1], needs[2]))
    return [g for g in grads if g is not None]


def rms_norm_backward(
    grad: Tensor,
    output: None,
    kept: Sequence[Tensor],
    args: tuple[Tensor, Tensor | None, float],
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `_library.Gradient` has it."""
    x, weight, eps = args
    wanted = (needs[0], needs[1], False)
    grads = norm_gradients(grad, x, weight, None, eps, wanted, center=False)
    return [g for g in grads if g is not None]


def norm_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: tuple[bool, bool, bool],
    *,
    center: bool = True,
    add: Tensor | None = None,
    normal: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those that `needs` names and that are there.

    Args:
        grad: of the norm, [..., D] or [M, D].
        x: [..., D].
        center: layer norm, else RMS norm.
        add: [..., D], added to the gradient of x.
        normal: [..., D], contiguous: gets the norm's result again.
    """
    import triton.language as tl

    from fastvit.kernels.layer_norm.backward_kernel import norm_backward_kernel

    d = x.shape[-1]
    x2, g = x.reshape(-1, d), grad.reshape(-1, d)
    add2 = None if add is None else add.reshape(-1, d)
    m = x2.shape[0]
    width = 1 << (d - 1).bit_length()
    tile = lookup("layer_norm_backward", architecture(x.device), x.dtype, M=m, D_POW2=width)
    steps = cdiv(m, tile.BLOCK_M)
    rows = cdiv(steps, PROGRAMS * multiprocessors(x.device)) * tile.BLOCK_M
    programs = cdiv(m, rows) if m else 0
    dx = x.new_empty(x.shape) if needs[0] else None
    affine = [
        None if parameter is None or not need else x.new_empty(programs, d, dtype=torch.float64)
        for parameter, need in ((weight, needs[1]), (bias, needs[2]))
    ]
    if m:
        launch(
            norm_backward_kernel,
            programs,
            tile,
            grad_ptr=g,
            x_ptr=x2,
            weight_ptr=None if weight is None else weight.contiguous(),
            bias_ptr=None if bias is None or normal is None else bias.contiguous(),
            add_ptr=add2,
            dx_ptr=dx,
            normal_ptr=normal,
            dweight_ptr=affine[0],
            dbias_ptr=affine[1],
            M=m,
            D=d,
            ROWS=rows,
            stride_gm=g.stride(0),
            stride_gd=g.stride(1),
            stride_xm=x2.stride(0),
            stride_xd=x2.stride(1),
            stride_am=0 if add2 is None else add2.stride(0),
            stride_ad=0 if add2 is None else add2.stride(1),
            EPS=eps,
            CENTER=center,
            ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=width,
        )
    dweight, dbias = (
        None if sums is None or parameter is None else sums.sum(0).to(parameter.dtype)
        for parameter, sums in zip((weight, bias), affine, strict=True)
    )
    return dx, dweight, dbias
