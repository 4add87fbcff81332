"""y = act(x W^T + b) * scale * row_scale + residual, one tile of y per program.

Legend: M rows (batch x tokens), N output features, K input features.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastvit.kernels._activations import activate, activate_with_slope
from fastvit.kernels._tiles import (
    Matrix,
    in_bands,
    load,
    of_columns,
    of_rows,
    product,
    store,
    tile_of,
)


@triton.jit
def linear_kernel(
    x,  # Matrix [M, K], or its TMA descriptor with boxes [BLOCK_M, BLOCK_K]
    weight,  # Matrix [N, K], or its TMA descriptor with boxes [BLOCK_N, BLOCK_K]
    out,  # what EPILOGUE reads and writes
    M, N, K,
    EPILOGUE: tl.constexpr,  # `finish`, `finish_and_keep` or `through_activation`
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,  # "rows" for descriptors, or ""
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    ACC: tl.constexpr,  # accumulator dtype
    EVEN: tl.constexpr,  # K is a multiple of BLOCK_K
    BANDS: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = product(
        x, weight, tile, tl.zeros((), tl.int32), K, TMA, PRECISION, ACC, EVEN,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    in_bands(acc, tile, out, EPILOGUE, ACTIVATION, BANDS)


class Finish(NamedTuple):
    """Operands of `finish`."""

    y: Matrix
    bias: Any  # [N] or None
    scale: Any  # [N] or None: LayerScale
    row_scale: Any  # [M] or None: stochastic depth
    residual: Any  # Matrix or None


@triton.jit
def finish(acc, tile, out, ACTIVATION: tl.constexpr):
    """y = act(acc + b) * scale * row_scale + residual"""
    if out.bias is not None:
        acc += of_columns(out.bias, tile, acc)
    store(out.y, tile, scale_and_add(activate(acc, ACTIVATION), tile, out))


@triton.jit
def scale_and_add(y, tile, out):
    """y * scale * row_scale + residual"""
    if out.scale is not None:
        y *= of_columns(out.scale, tile, y)
    if out.row_scale is not None:
        y *= of_rows(out.row_scale, tile, y)
    if out.residual is not None:
        y += load(out.residual, tile, y)
    return y


class Training(NamedTuple):
    """Operands of `finish_and_keep`."""

    finish: Finish
    pre: Matrix


@triton.jit
def finish_and_keep(acc, tile, out, ACTIVATION: tl.constexpr):
    """`finish`, and pre = acc + b for the backward."""
    pre = acc
    if out.finish.bias is not None:
        pre += of_columns(out.finish.bias, tile, acc)
    store(out.pre, tile, pre)
    store(out.finish.y, tile, scale_and_add(activate(pre, ACTIVATION), tile, out.finish))


class Hidden(NamedTuple):
    """Operands of `through_activation`."""

    pre: Matrix
    hidden: Matrix
    grad: Matrix
    scale: Any  # [N] or None


@triton.jit
def through_activation(acc, tile, out, ACTIVATION: tl.constexpr):
    """An MLP's backward, acc the gradient of act(pre): grad = acc * act'(pre) * scale, and
    hidden = act(pre) once more."""
    hidden, slope = activate_with_slope(load(out.pre, tile, acc), ACTIVATION)
    store(out.hidden, tile, hidden)
    grad = acc * slope
    if out.scale is not None:
        grad *= of_columns(out.scale, tile, grad)
    store(out.grad, tile, grad)
