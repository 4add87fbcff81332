"""Launchers of the ops that read or write e4m3, for `run_to_output`. Legend: M rows, N output
features, K input features."""

import math
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels import _launch
from fastvit.kernels._backend import Meta, packed
from fastvit.kernels._device import cached, check_fp8_device
from fastvit.kernels._hopper import refuse
from fastvit.kernels._launch import Output, Prepared, as_rows, as_vector
from fastvit.kernels._tuning import TileConfig, cdiv
from fastvit.kernels.layer_norm import launch as layer_norm
from fastvit.kernels.linear import hopper_plan
from fastvit.kernels.linear import launch as linear
from fastvit.kernels.linear_fp8.reference import E4M3

# values a program: 16 bytes of bfloat16 for each of 4 x 128 loads
QUANTIZE_TILE = TileConfig(1, 4096)


@cached
def prepare(
    x: Meta, weight: Meta, factor: Meta, bias: Meta | None, scale: Meta | None,
    residual: Meta | None, activation: str, out_scale: float | None, dtype: torch.dtype,
    _precision: str,
) -> Output:  # fmt: skip
    """Arguments as in `fp8_linear`."""
    check_fp8_device("fp8_linear", x.device)
    n = weight.shape[0]
    y = Output(None, (*x.shape[:-1], n), dtype if out_scale is None else E4M3)
    if 0 in y.shape:
        return y
    from fastvit.kernels._tiles import Matrix
    from fastvit.kernels.linear.kernel import Finish
    from fastvit.kernels.linear_fp8.kernel import FinishFp8, finish_fp8

    residual_strides = _launch.packed_rows(residual, n)
    by_row, by_col = residual_strides or (n, 1)
    matrix, finishing, finishing_fp8 = map(_launch.maker, (Matrix, Finish, FinishFp8))
    inverse = None if out_scale is None else 1.0 / out_scale

    def operands(factor: Tensor, bias: Any, scale: Any, residual: Any, y: Tensor) -> Any:
        added = None if residual is None else matrix((residual, by_row, by_col))
        out = finishing((matrix((y, n, 1)), bias, scale, None, added))
        return finishing_fp8((out, factor, inverse))

    def adapt(x: Tensor, weight: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        *vectors, residual = others
        return (as_rows(x), weight, *map(as_vector, vectors), as_rows(residual))

    choice = linear.looked_up(x, weight)
    tile = hopper_plan.portable_tile(choice, x, weight, hopper_plan.LARGE_TILE)
    exact = linear.exact_activation(activation, y.dtype)
    launch = linear.prepare_product(x, weight, tile, operands, finish_fp8, exact, "highest")
    variant = hopper_plan.hopper_variant(x, weight, residual, None, y.dtype, choice)
    if isinstance(variant, hopper_plan.Variant):
        portable, form = launch, hopper_plan.e4m3_activation(exact, scale, inverse)
        sides = x, weight, residual
        launch = hopper_plan.prepare_hopper(variant, *sides, form, dtype=y.dtype, inverse=inverse)
        launch.spare = lambda error: refuse(error) or portable
    in_place = residual_strides is not None and _launch.rows_of(x) is not None
    in_place = in_place and _launch.is_packed(factor, bias, scale)
    return y._replace(launch=launch, adapt=None if in_place else adapt)


@cached
def prepare_norm(*args: Any) -> Output:
    """Of x, weight, bias, eps and `out_scale`, which the layer norm is over."""
    check_fp8_device("fp8_layer_norm", args[0].device)
    return layer_norm.prepare(*args[:4], out_scale=args[4])


@cached
def prepare_quantize(x: Meta, out_scale: float, _precision: str) -> Output:
    """x [..., D] over `out_scale`."""
    check_fp8_device("fp8_quantize", x.device)
    y = Output(None, x.shape, E4M3)
    if 0 in x.shape:
        return y
    from fastvit.kernels.linear_fp8.kernel import quantize_kernel

    size = math.prod(x.shape)
    constants = (size, 1.0 / out_scale, QUANTIZE_TILE.BLOCK_N)
    programs = cdiv(size, QUANTIZE_TILE.BLOCK_N)
    launch = Prepared(quantize_kernel, programs, QUANTIZE_TILE, lambda x, y: (x, y, *constants))
    in_place = x.strides == packed(x.dtype, x.shape, x.device).strides
    return y._replace(launch=launch, adapt=None if in_place else lambda x: (x.contiguous(),))
