"""The launchers of `layer_norm` and `rms_norm`.

Gradients of y = n * weight + bias with n = (x - mean) * rstd (RMS norm: n = x * rstd, no bias).

With g the gradient of y, h = g * weight and means over a row:

    dx = rstd * (h - mean(h) - n * mean(h * n))    (RMS norm: without mean(h))
    dweight = colsum(g * n)    dbias = colsum(g)

Nothing but x is kept: mean and rstd are computed again, which reads no more. The column sums are
taken over the rows of each program, and then over programs.

Legend: M rows, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels import _launch
from fastvit.kernels._backend import Grads, Meta, describe
from fastvit.kernels._device import architecture, cached, multiprocessors
from fastvit.kernels._launch import Output, Prepared, accumulator, as_rows, as_vector
from fastvit.kernels._tuning import cdiv, lookup

PROGRAMS = 4  # a multiprocessor, at most: each leaves a row of partial sums


@cached
def prepare(
    x: Meta, weight: Meta | None, bias: Meta | None, eps: float, _precision: str = "", *,
    center: bool = True, out_scale: float | None = None, dtype: torch.dtype | None = None,
) -> Output:  # fmt: skip
    """A layer norm (without `center` an RMS norm, of no bias) of x [..., D], for `run_to_output`:
    stored in `dtype`, by default x's, or as e4m3 over `out_scale`."""
    y = Output(None, x.shape, torch.float8_e4m3fn if out_scale is not None else dtype or x.dtype)
    if 0 in x.shape:
        return y
    from fastvit.kernels._tiles import Matrix
    from fastvit.kernels.layer_norm.kernel import layer_norm_kernel

    m, d, strides = _launch.row_count(x), x.shape[-1], _launch.rows_of(x)
    width = padded_width(d)
    tile = lookup("layer_norm", architecture(x.device), x.dtype, M=m, D_POW2=width)
    by_row, by_col = strides or (d, 1)
    matrix, no_bias = _launch.maker(Matrix), () if center else (None,)
    inverse = None if out_scale is None else 1.0 / out_scale
    constants = (m, inverse, d, eps, center, accumulator(x.dtype), tile.BLOCK_M, width)
    launch = Prepared(
        layer_norm_kernel, cdiv(m, tile.BLOCK_M), tile,
        lambda x, w, *rest: (matrix((x, by_row, by_col)), w, *no_bias, *rest, *constants),
    )  # fmt: skip
    if strides is None or not _launch.is_packed(weight, bias):
        y = y._replace(adapt=lambda x, *affine: (as_rows(x), *map(as_vector, affine)))
    return y._replace(launch=launch)


def padded_width(d: int) -> int:
    """The power of two that a row is loaded as."""
    return 1 << (d - 1).bit_length()


def norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    needs: Sequence[bool], *, center: bool = True, add: Tensor | None = None,
    normal: Tensor | None = None,
) -> Grads:  # fmt: skip
    """Gradients of x, weight and bias, those that `needs` names first and that are there, from grad
    [..., D] or [M, D], that of the norm of x [..., D].

    Args:
        add: [..., D], added to the gradient of x.
        normal: [..., D], contiguous: gets the norm's result again.
    """
    inputs = (
        as_rows(grad), as_rows(x), as_vector(weight), None if normal is None else as_vector(bias),
        as_rows(add),
    )  # fmt: skip
    dx = x.new_empty(x.shape) if needs[0] else None
    launch, programs = _prepare_gradients(*describe(*inputs, normal), eps, center, tuple(needs[:3]))
    affine = [
        None if p is None or not need else x.new_empty(programs, p.shape[0], dtype=torch.float64)
        for p, need in ((weight, needs[1]), (bias, needs[2]))
    ]
    if launch is not None:
        _launch.run(launch, *inputs, dx, normal, *affine)
    dweight, dbias = (
        None if sums is None or parameter is None else sums.sum(0).to(parameter.dtype)
        for parameter, sums in zip((weight, bias), affine, strict=True)
    )
    return dx, dweight, dbias


@cached
def _prepare_gradients(
    g: Meta, x: Meta, weight: Meta | None, bias: Meta | None, add: Meta | None,
    normal: Meta | None, eps: float, center: bool, _needs: tuple[bool, ...],
) -> tuple[Prepared | None, int]:  # fmt: skip
    """The launch for the gradients of `_needs` (None without rows), for which a kernel is compiled,
    and how many programs it has."""
    m, d = x.shape
    if m == 0:
        return None, 0
    from fastvit.kernels._tiles import Matrix
    from fastvit.kernels.layer_norm.kernel_backward import norm_backward_kernel

    width = padded_width(d)
    tile = lookup("layer_norm_backward", architecture(x.device), x.dtype, M=m, D_POW2=width)
    steps = cdiv(m, tile.BLOCK_M)
    rows = cdiv(steps, PROGRAMS * multiprocessors(x.device)) * tile.BLOCK_M
    constants = (m, rows, d, eps, center, accumulator(x.dtype), tile.BLOCK_M, width)
    g_strides, x_strides, add_strides = g.strides, x.strides, () if add is None else add.strides

    def arguments(g: Any, x: Any, weight: Any, bias: Any, add: Any, *rest: Any) -> tuple[Any, ...]:
        added = None if add is None else Matrix(add, *add_strides)
        first = Matrix(g, *g_strides), Matrix(x, *x_strides)
        return (*first, weight, bias, added, *rest, *constants)

    programs = cdiv(m, rows)
    return Prepared(norm_backward_kernel, programs, tile, arguments), programs
