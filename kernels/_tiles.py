"""Matrices, tiles of them and products of tiles, as kernels see them.

Legend: M rows and N columns of a result, K the depth of a product.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Matrix(NamedTuple):
    """[M, N] in memory; with the strides swapped, its transpose."""

    ptr: Any
    stride_m: Any
    stride_n: Any


class Tile(NamedTuple):
    """The rectangle from (row, col) on, of a result that ends at (M, N)."""

    row: Any
    col: Any
    M: Any
    N: Any


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile of a program: column tiles of GROUP_M row tiles run next to one another, so that
    they share both operands in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return Tile((first_m + within % rows) * BLOCK_M, within // rows * BLOCK_N, M, N)


@triton.jit
def _inside(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS) < tile.M - tile.row
    return rows[:, None] & (tl.arange(0, COLS) < tile.N - tile.col)[None, :]


@triton.jit
def _pointers(matrix, tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    # one 64-bit base a tile and 32-bit offsets within it, to save registers
    base = matrix.ptr + tile.row.to(tl.int64) * matrix.stride_m
    base += tile.col.to(tl.int64) * matrix.stride_n
    rows = tl.arange(0, ROWS)[:, None] * matrix.stride_m
    return base + (rows + tl.arange(0, COLS)[None, :] * matrix.stride_n)


@triton.jit
def load(matrix, tile, like):
    """`tile` of a matrix, of `like`'s shape and dtype; zero outside."""
    ptrs = _pointers(matrix, tile, like.shape[0], like.shape[1])
    inside = _inside(tile, like.shape[0], like.shape[1])
    return tl.load(ptrs, mask=inside, other=0.0).to(like.dtype)


@triton.jit
def store(matrix, tile, value):
    """`value` to `tile` of a matrix, rounded to its dtype."""
    ptrs = _pointers(matrix, tile, value.shape[0], value.shape[1])
    inside = _inside(tile, value.shape[0], value.shape[1])
    tl.store(ptrs, value.to(matrix.ptr.dtype.element_ty), mask=inside)


@triton.jit
def of_columns(ptr, tile, like):
    """[1, COLS]: one value of `ptr` [N] for each column of `like`."""
    cols = tl.arange(0, like.shape[1])
    values = tl.load(ptr + tile.col + cols, mask=cols < tile.N - tile.col, other=0.0)
    return values[None, :].to(like.dtype)


@triton.jit
def of_rows(ptr, tile, like):
    """[ROWS, 1]: one value of `ptr` [M] for each row of `like`."""
    rows = tl.arange(0, like.shape[0])
    values = tl.load(ptr + tile.row + rows, mask=rows < tile.M - tile.row, other=0.0)
    return values[:, None].to(like.dtype)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. In exact float32 a b is summed by itself and then added: a single chain of
    multiply-adds over all of K would lose to cuBLAS's several."""
    if a.dtype == tl.float32 and PRECISION == "ieee":
        # any max_num_imprecise_acc keeps the compiler from making one chain of both sums
        acc += tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def product(
    a, b, tile, start, end, TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of a b^T in ACC, summed over [start, end) of K.

    Args:
        a, b: Matrix [M, K] and [N, K].
        TMA: "rows": descriptors with boxes [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K] in their
            place; "columns": descriptors of the transposed matrices, with transposed boxes; "":
            neither.
        EVEN: BLOCK_K divides what is summed over.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if TMA == "rows":
        for k in range(start, end, BLOCK_K):
            acc = multiply(a.load([tile.row, k]), b.load([tile.col, k]).T, acc, PRECISION)
    elif TMA == "columns":
        for k in range(start, end, BLOCK_K):
            acc = multiply(a.load([k, tile.row]).T, b.load([k, tile.col]), acc, PRECISION)
    else:
        # past the end the rows of this tile are read again: no mask in the loop, and nothing of
        # them is stored; the compiler sees through a remainder that rows may lie side by side
        rows = tl.arange(0, BLOCK_M) % (tile.M - tile.row)
        cols = tl.arange(0, BLOCK_N) % (tile.N - tile.col)
        ks = tl.arange(0, BLOCK_K)
        a_base = a.ptr + tile.row.to(tl.int64) * a.stride_m + start.to(tl.int64) * a.stride_n
        b_base = b.ptr + tile.col.to(tl.int64) * b.stride_m + start.to(tl.int64) * b.stride_n
        a_offsets = rows[:, None] * a.stride_m + ks[None, :] * a.stride_n
        b_offsets = ks[:, None] * b.stride_n + cols[None, :] * b.stride_m
        for k in range(start, end, BLOCK_K):
            if EVEN:
                a_tile = tl.load(a_base + a_offsets)  # [BLOCK_M, BLOCK_K]
                b_tile = tl.load(b_base + b_offsets)  # [BLOCK_K, BLOCK_N]
            else:
                a_tile = tl.load(a_base + a_offsets, mask=ks[None, :] < end - k, other=0.0)
                b_tile = tl.load(b_base + b_offsets, mask=ks[:, None] < end - k, other=0.0)
            acc = multiply(a_tile, b_tile, acc, PRECISION)
            a_base += BLOCK_K * a.stride_n
            b_base += BLOCK_K * b.stride_n
    return acc


@triton.jit
def in_bands(acc, tile, out, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, BANDS: tl.constexpr):
    """An epilogue in BANDS (1, 2 or 4) bands of columns one after another, to need fewer registers
    at a time. An epilogue is a function of the sums of a tile, the tile, the NamedTuple of what it
    reads and writes, and the name of an activation."""
    if BANDS == 1:
        EPILOGUE(acc, tile, out, ACTIVATION)
    else:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))
        in_bands(left, tile, out, EPILOGUE, ACTIVATION, BANDS // 2)
        beside = Tile(tile.row, tile.col + HALF, tile.M, tile.N)
        in_bands(right, beside, out, EPILOGUE, ACTIVATION, BANDS // 2)
