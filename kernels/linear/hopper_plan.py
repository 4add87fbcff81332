"""Which of Hopper's linear kernels runs a shape, and its launch.

Measured on an H200 (2026-11-27, M = 50,432, bfloat16; `proven/sm90.json`): tiles of 128x128 in
turns win for K = 768, shared tiles of 128x256 with a residual for K = 3,072 by 2 %. The rest, all
of e4m3 with it, follows a rule until it is measured: fewest microseconds by `microseconds`, which
fits those. Operands count by the byte: an e4m3 product is a half product of half the K.

Legend: M rows, N output features, K input features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels._backend import Meta
from fastvit.kernels._device import SHARED_MEMORY, architecture, multiprocessors
from fastvit.kernels._hopper import answer, hopper_problem
from fastvit.kernels._launch import Box, Prepared, fits_tma, row_count, rows_of
from fastvit.kernels._tuning import TileConfig, cdiv

GROUP_M = 8
STEP = 128  # bytes of K in a slot
REGISTERS = 232  # a thread of a consumer; the rest of 168 a thread goes to the loading warps
LOAD_REGISTERS = 40
BARRIERS = 1024  # bytes of shared memory that is left for them
MAX_STAGES = 12  # all of K = 768
# the first of those that cost the same is taken
PINGPONG_TILES = ((128, 128), (64, 128), (64, 64))
COOP_TILE = (128, 256)
COOP_BYTES = 4096  # of a row of x, from which a shared tile's long epilogue is worth its few bytes
PORTABLE_TILE = TileConfig(64, 64, BLOCK_K=32)  # for operands that a table's ``tma`` cannot read
LARGE_TILE = TileConfig(128, 128, 64, 8, 3)  # in the place of ``cublas`` or of these kernels
NAMES = ("pingpong", "coop")  # backends that a tuning table may name with a tile
HALF = (torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn
# of an e4m3 y's scale, between which float16 holds GELU(x) and its product as exactly as e4m3 asks
GELU_INVERSES = (2.0**-14, 2.0**11)


class Variant(NamedTuple):
    """One configuration of `hopper_linear_kernel`."""

    name: str  # one of `NAMES`
    block_m: int  # of a tile
    block_n: int
    cols: int  # of a band of y
    stages: int
    bufs: int  # of y, for each consumer
    lag: int

    @property
    def rows(self) -> int:
        """Of one consumer."""
        return self.block_m if self.name == "pingpong" else self.block_m // 2

    def tiles(self, m: int, n: int) -> int:
        """How many cover y."""
        return cdiv(m, self.block_m) * cdiv(n, self.block_n)


def hopper_variant(
    x: Meta, weight: Meta, residual: Meta | None, row_scale: Meta | None, dtype: torch.dtype,
    tile: TileConfig, *, keep: bool = False,
) -> Variant | str:  # fmt: skip
    """Hopper's kernel for a linear, or why another one runs: the table, the machine, the operands.
    Arguments as of `prepare`; `tile` is what the table says."""
    m = row_count(x)
    if wants_hopper(tile):
        choice = hopper_problem(x.device) or hopper_choice(
            x, weight, residual, row_scale, dtype, keep=keep, tile=tile
        )
    else:
        named = tile.backend or "a portable tile"
        choice = f"the tuning table of {architecture(x.device)} names {named} for M={m:,} rows"
    return answer("linear", (m, *weight.shape), choice)


def wants_hopper(tile: TileConfig) -> bool:
    """Whether a table asks for Hopper's kernel."""
    return tile.backend in NAMES or tile.backend.startswith("hopper")


def portable_tile(
    tile: TileConfig, x: Meta, weight: Meta, fallback: TileConfig | None = None
) -> TileConfig:
    """A table's tile for the portable kernel, as far as the operands allow it; `fallback` instead
    of ``cublas``."""
    if tile.backend in NAMES:
        tile = LARGE_TILE
    if wants_hopper(tile):
        tile = replace(tile, backend=tile.backend.removeprefix("hopper").lstrip())
    if tile.backend == "cublas" and fallback is not None:
        tile = fallback
    if tile.backend == "tma" and not (fits_tma(x) and fits_tma(weight)):
        tile = PORTABLE_TILE
    return tile


def hopper_choice(
    x: Meta,
    weight: Meta,
    residual: Meta | None,
    row_scale: Meta | None,
    dtype: torch.dtype,
    *,
    keep: bool = False,
    tile: TileConfig | None = None,
) -> Variant | str:
    """The variant for x W^T with an epilogue, or why Hopper's kernel cannot take it. Pure: asks no
    GPU, imports nothing.

    Args:
        x, weight: of a half dtype or e4m3.
        residual, row_scale: of the epilogue; bias, scale and activation may be any.
        dtype: of the result.
        keep: what goes into the activation is stored too.
        tile: of a tuning table; its backend is one of `NAMES`, or anything else for the rule.
    """
    problem = _problem(x, weight, residual, dtype, keep)
    if problem is not None:
        return problem
    (n, k), m, added = weight.shape, row_count(x), residual is not None
    form = {"residual": added, "keep": keep, "e4m3": dtype == E4M3}
    row_bytes = k * x.dtype.itemsize
    if tile is not None and tile.backend in NAMES:
        choice = variant_of(tile.backend, tile.BLOCK_M, tile.BLOCK_N, **form)
        # triton spills registers of shared tiles with a row_scale; a lag counts on a full ring
        long = cdiv(row_bytes, STEP) > choice.stages
        if tile.backend == "pingpong" or (long and row_scale is None):
            return choice
    variants = [variant_of("pingpong", *t, **form) for t in PINGPONG_TILES]
    if added and row_scale is None and row_bytes >= COOP_BYTES:
        variants.insert(0, variant_of("coop", *COOP_TILE, residual=True))
    processors = multiprocessors(x.device)
    return min(variants, key=lambda v: microseconds(v, m, n, row_bytes, processors))


def _problem(
    x: Meta, weight: Meta, residual: Meta | None, dtype: torch.dtype, keep: bool
) -> str | None:
    n, k = weight.shape
    added = None if residual is None else residual.dtype
    results = (*HALF, E4M3) if x.dtype == E4M3 else (x.dtype,)
    unaligned = [
        name
        for name, matrix in (("x", x), ("weight", weight), ("residual", residual))
        if matrix is not None and not fits_tma(matrix)
    ]
    reasons = {
        f"operands are {x.dtype}, not bfloat16, float16 or e4m3": x.dtype not in (*HALF, E4M3),
        f"operands are {x.dtype}, the result {dtype}": dtype not in results,
        f"the result is {dtype}, the residual {added}": added not in (None, dtype),
        f"rows of N={n:,} or K={k:,} values do not fill units of 16 bytes": (
            n * dtype.itemsize % 16 or k * x.dtype.itemsize % 16
        ),
        f"rows of {' and '.join(unaligned)} do not start at multiples of 16 bytes": unaligned,
        "the value before an activation is kept beside a residual": keep and added,
        "the result is e4m3 beside a residual": dtype == E4M3 and added,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def microseconds(v: Variant, m: int, n: int, row_bytes: int, processors: int) -> float:
    """Of the products: a multiprocessor of an H200 takes in 90 KB a microsecond from the L2 cache
    and multiplies 5.6 million bytes by a column, and the busiest one has as many tiles as there are
    waves."""
    step = max((v.block_m + v.block_n) / 90e3, v.block_m * v.block_n / 5.6e6)
    return cdiv(v.tiles(m, n), processors) * row_bytes * step


def variant_of(
    name: str, block_m: int, block_n: int, *, residual: bool = False, keep: bool = False,
    e4m3: bool = False,
) -> Variant:  # fmt: skip
    """With as many slots as shared memory holds; with `e4m3`, y is of that."""
    cols = min(64, block_n // 2) * (2 if e4m3 else 1)
    band = cols * (1 if e4m3 else 2)  # bytes of a row
    if name == "pingpong":
        bufs = 2 if residual or keep else 1
        y_bytes = 2 * bufs * block_m * band
    else:  # all of a tile's residual in advance
        bufs = block_n // cols if residual else 2
        y_bytes = bufs * block_m * band
    room = SHARED_MEMORY["sm90"] - BARRIERS - y_bytes
    stages = min(room // ((block_m + block_n) * STEP), MAX_STAGES)
    return Variant(name, block_m, block_n, cols, stages, bufs, stages if name == "coop" else 0)


def e4m3_activation(activation: str, scale: Meta | None, inverse: float | None) -> str:
    """Of Hopper's kernel, for `exact_activation`'s: GELU in float16 where y is e4m3 and that is as
    exact.

    Args:
        inverse: of y's scale, where y is e4m3.
    """
    low, high = GELU_INVERSES
    fits = activation == "gelu_polynomial" and inverse is not None and low <= inverse <= high
    return "gelu_e4m3" if fits and scale is None else activation


def prepare_hopper(
    choice: Variant, x: Meta, weight: Meta, residual: Meta | None, activation: str, *,
    keep: bool = False, dtype: torch.dtype | None = None, inverse: float | None = None,
) -> Prepared:  # fmt: skip
    """`run` is given x, weight, bias, scale, residual, row_scale, y [M, N] and pre; where operands
    are e4m3 x, weight, factor, bias, scale, residual and y.

    Args:
        dtype, inverse: of y; by default x's, and none.
    """
    from fastvit.kernels.linear.hopper import hopper_linear_kernel

    (n, k), m = weight.shape, row_count(x)
    dtype = dtype or x.dtype
    e4m3 = x.dtype == E4M3
    constants = (
        m, n, k, activation, choice.name == "pingpong", e4m3 and n % choice.block_n == 0, GROUP_M,
        choice.stages, choice.bufs, choice.lag, REGISTERS, LOAD_REGISTERS,
    )  # fmt: skip

    def of_half(
        x: Tensor, weight: Tensor, bias: Any, scale: Any, residual: Any, row_scale: Any,
        y: Tensor, pre: Tensor | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        return (x, weight, y, residual, pre, None, bias, scale, row_scale, None, *constants)

    def of_e4m3(
        x: Tensor, weight: Tensor, factor: Tensor, bias: Any, scale: Any, residual: Any, y: Tensor
    ) -> tuple[Any, ...]:
        return (x, weight, y, residual, None, factor, bias, scale, None, inverse, *constants)

    band, block_k = (choice.rows, choice.cols), STEP // x.dtype.itemsize
    boxes = (
        box_of((m, k), rows_of(x), (choice.rows, block_k), x.dtype),
        box_of((n, k), rows_of(weight), (choice.block_n, block_k), x.dtype),
        box_of((m, n), None, band, dtype),
        None if residual is None else box_of((m, n), rows_of(residual), band, dtype),
        box_of((m, n), None, band, dtype) if keep else None,
    )
    programs = min(choice.tiles(m, n), multiprocessors(x.device))
    tile = TileConfig(choice.block_m, choice.block_n, block_k, 4, choice.stages, choice.name)
    return Prepared(hopper_linear_kernel, programs, tile, of_e4m3 if e4m3 else of_half, boxes)


def box_of(
    shape: tuple[int, int],
    strides: tuple[int, int] | None,  # None: packed, or will be
    block: tuple[int, int],
    dtype: torch.dtype,
) -> Box:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, E4M3: gl.float8e4nv}[dtype]
    layout: Any = gl.NVMMASharedLayout.get_default_for([*block], element)
    sizes, steps = [*shape], [*(strides or (shape[1], 1))]
    return Box(lambda tensor: TensorDescriptor(tensor, sizes, steps, [*block], layout))
