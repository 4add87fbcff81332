"""`linear`'s launcher.

The tuning table chooses a backend with the tile: ``cublas`` is PyTorch's own product with its
epilogue in separate passes, ``tma`` our kernel with operands brought by the tensor memory
accelerator, "" the same with plain pointers. ``pingpong`` and ``coop`` are Hopper's kernel with
that tile, ``hopper`` the same with one of its own choice (`hopper_plan`); where it cannot run, what
stands behind ``hopper`` does, with the table's tile.

Legend: M rows, N output features, K input features.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels import _launch
from fastvit.kernels._backend import Meta, prepare_and_run
from fastvit.kernels._device import architecture, cached
from fastvit.kernels._hopper import refuse
from fastvit.kernels._launch import Box, Prepared, maker, row_count, rows_of
from fastvit.kernels._tuning import TileConfig, cdiv, lookup
from fastvit.kernels.linear import hopper_plan
from fastvit.kernels.linear.reference import finish_reference, linear_reference

GROUP_M = 8


class Linear(NamedTuple):
    """A prepared `linear`."""

    launch: Prepared | None  # None: PyTorch's product, or an empty result
    shape: tuple[int, ...]  # of y, [..., N]
    dtype: torch.dtype
    activation: str
    keep: bool  # a second result is what goes into the activation
    copies: bool  # x or the residual is no matrix in memory, or a vector is not packed


@cached
def prepare(
    x: Meta, weight: Meta, bias: Meta | None, scale: Meta | None, residual: Meta | None,
    row_scale: Meta | None, activation: str, precision: str, *, keep: bool = False,
    dtype: torch.dtype | None = None,
) -> Linear:  # fmt: skip
    """act(x W^T + b) * scale * row_scale + residual, arguments as in `fastvit.ops.linear`.

    Args:
        precision: as `matmul_precision` gives it.
        keep: what goes into the activation is wanted too.
        dtype: of the result; promotion's by default.
    """
    from fastvit.kernels._tiles import Matrix
    from fastvit.kernels.linear.kernel import Finish, Training, finish, finish_and_keep

    n = weight.shape[0]
    dtype = dtype or result_dtype(x, scale, residual)
    residual_strides = _launch.packed_rows(residual, n)
    copies = not _launch.is_packed(bias, scale, row_scale) or None in (rows_of(x), residual_strides)
    y = Linear(None, (*x.shape[:-1], n), dtype, activation, keep, copies)
    if 0 in y.shape:
        return y
    activation = exact_activation(activation, dtype)
    by_row, by_col = residual_strides or (n, 1)
    matrix, finishing, training = map(maker, (Matrix, Finish, Training))

    def operands(
        bias: Any, scale: Any, residual: Any, row_scale: Any, y: Tensor, pre: Tensor | None
    ) -> Any:
        added = None if residual is None else matrix((residual, by_row, by_col))
        out = finishing((matrix((y, n, 1)), bias, scale, row_scale, added))
        return out if pre is None else training((out, matrix((pre, n, 1))))

    epilogue = finish_and_keep if keep else finish

    def portable(tile: TileConfig) -> Prepared:
        return prepare_product(x, weight, tile, operands, epilogue, activation, precision)

    choice = looked_up(x, weight)
    variant = hopper_plan.hopper_variant(x, weight, residual, row_scale, dtype, choice, keep=keep)
    if isinstance(variant, hopper_plan.Variant):
        launch = hopper_plan.prepare_hopper(variant, x, weight, residual, activation, keep=keep)
        spare = hopper_plan.portable_tile(choice, x, weight, hopper_plan.LARGE_TILE)
        launch.spare = lambda error: refuse(error) or portable(spare)
        return y._replace(launch=launch)
    tile = hopper_plan.portable_tile(choice, x, weight)
    return y if tile.backend == "cublas" else y._replace(launch=portable(tile))


def run(
    prepared: Linear, x: Tensor, weight: Tensor, bias: Tensor | None = None,
    scale: Tensor | None = None, residual: Tensor | None = None, row_scale: Tensor | None = None,
) -> Any:  # fmt: skip
    """y, or with `keep` (y, what goes into the activation)."""
    shape, keep = prepared.shape, prepared.keep
    if prepared.launch is None and not _launch.idle():
        pre = linear_reference(x, weight, bias)
        y = finish_reference(pre, prepared.activation, scale, residual, row_scale)
        y = y.to(prepared.dtype).contiguous()
        return (y, pre) if keep else y
    if prepared.copies:
        x, residual = x.reshape(-1, x.shape[-1]), _launch.as_rows(residual)
        bias, scale, row_scale = map(_launch.as_vector, (bias, scale, row_scale))
    y = torch.empty(shape, dtype=prepared.dtype, device=x.device)
    pre = torch.empty(shape, dtype=x.dtype, device=x.device) if keep else None
    if prepared.launch is not None:
        _launch.run(prepared.launch, x, weight, bias, scale, residual, row_scale, y, pre)
    return (y, pre) if keep else y


def launch_training(*args: Any) -> tuple[Tensor, Tensor]:
    """Of the op's arguments: y, and what goes into an activation, which the backward needs; without
    one an empty tensor."""
    *tensors, activation = args
    keep = activation != "none"
    y = prepare_and_run(prepare, run, tuple(tensors), activation, keep=keep)
    return y if keep else (y, y.new_empty(0, dtype=tensors[0].dtype))


# --------------------------------------------------------------------------- any epilogue


def looked_up(x: Meta, weight: Meta) -> TileConfig:
    """What the tuning table says."""
    n, k = weight.shape
    return lookup("linear", architecture(x.device), x.dtype, M=row_count(x), N=n, K=k)


def prepare_product(
    x: Meta, weight: Meta, tile: TileConfig, operands: Callable[..., Any], epilogue: Any,
    activation: str, precision: str,
) -> Prepared:  # fmt: skip
    """`linear_kernel` with any epilogue. `run` is given x, weight and what `operands` takes, which
    makes the epilogue's NamedTuple of it."""
    from fastvit.kernels._tiles import Matrix
    from fastvit.kernels.linear.kernel import linear_kernel

    (n, k), m = weight.shape, row_count(x)
    x_row, x_col = rows_of(x) or (k, 1)
    w_row, w_col = weight.strides
    matrix, tma = maker(Matrix), tile.backend == "tma"
    constants = (
        m, n, k, epilogue, activation, "rows" if tma else "",
        _launch.product_precision(x.dtype, precision), _launch.accumulator(x.dtype),
        k % tile.BLOCK_K == 0, tile.subtiles, GROUP_M, tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K,
    )  # fmt: skip

    def by_pointers(x: Tensor, weight: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
        x_rows, w_rows = matrix((x, x_row, x_col)), matrix((weight, w_row, w_col))
        return (x_rows, w_rows, operands(*rest), *constants)

    programs = cdiv(m, tile.BLOCK_M) * cdiv(n, tile.BLOCK_N)
    launch = Prepared(linear_kernel, programs, tile, by_pointers)
    if tma:
        launch.arguments = lambda x, weight, *rest: (x, weight, operands(*rest), *constants)
        x_box = matrix_box((m, k), (x_row, x_col), (tile.BLOCK_M, tile.BLOCK_K))
        launch.boxes = x_box, matrix_box((n, k), (w_row, w_col), (tile.BLOCK_N, tile.BLOCK_K))
    return launch


def matrix_box(shape: tuple[int, int], strides: tuple[int, ...], block: tuple[int, int]) -> Box:
    """A matrix read through TMA descriptors."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return Box(lambda tensor: TensorDescriptor(tensor, [*shape], [*strides], [*block]))


def exact_activation(activation: str, dtype: torch.dtype) -> str:
    """GELU's polynomial where the result's own rounding is larger than its error."""
    if activation == "gelu" and dtype in (torch.bfloat16, torch.float8_e4m3fn):
        return "gelu_polynomial"
    return activation


def result_dtype(x: Any, *others: Any) -> torch.dtype:
    """What PyTorch's promotion gives for x and those of `others` that are there."""
    dtypes = [other.dtype for other in others if other is not None]
    return functools.reduce(torch.promote_types, dtypes, x.dtype)
