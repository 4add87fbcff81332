"""Which of Hopper's linear kernels runs a shape, and its launch.

Measured on an H200 (2026-11-27, M = 50,432, bfloat16; `proven/sm90.json`): tiles of 128x128 in
turns win for K = 768, shared tiles of 128x256 with a residual for K = 3,072 by 2 %. The rest
follows a rule until it is measured: fewest microseconds by `_microseconds`, which fits those.

Legend: M rows, N output features, K input features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels._backend import Meta
from fastvit.kernels._device import SHARED_MEMORY, architecture, multiprocessors
from fastvit.kernels._hopper import hopper_problem
from fastvit.kernels._launch import Box, Prepared, fits_tma, row_count, rows_of
from fastvit.kernels._tuning import TileConfig, cdiv

GROUP_M = 8
BLOCK_K = 64
REGISTERS = 232  # a thread of a consumer; the rest of 168 a thread goes to the loading warps
LOAD_REGISTERS = 40
BARRIERS = 1024  # bytes of shared memory that is left for them
MAX_STAGES = 12  # all of K = 768
# the first of those that cost the same is taken
PINGPONG_TILES = ((128, 128), (64, 128), (64, 64))
COOP_TILE = (128, 256)
COOP_K = 2048  # from which a shared tile's longer epilogue is worth its fewer bytes
NAMES = ("pingpong", "coop")  # backends that a tuning table may name with a tile
HALF = (torch.bfloat16, torch.float16)


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
    if not wants_hopper(tile):
        named = tile.backend or "another tile"
        return f"the tuning table of {architecture(x.device)} names {named}"
    problem = hopper_problem(x.device)
    return problem or hopper_choice(x, weight, residual, row_scale, dtype, keep=keep, tile=tile)


def wants_hopper(tile: TileConfig) -> bool:
    """Whether a table asks for Hopper's kernel."""
    return tile.backend in NAMES or tile.backend.startswith("hopper")


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
        residual, row_scale: of the epilogue; bias, scale and activation may be any.
        dtype: of the result.
        keep: what goes into the activation is stored too.
        tile: of a tuning table; its backend is one of `NAMES`, or anything else for the rule.
    """
    problem = _problem(x, weight, residual, dtype, keep)
    if problem is not None:
        return problem
    (n, k), m, added = weight.shape, row_count(x), residual is not None
    if tile is not None and tile.backend in NAMES:
        choice = variant_of(tile.backend, tile.BLOCK_M, tile.BLOCK_N, residual=added, keep=keep)
        # triton spills registers of shared tiles with a row_scale; a lag counts on a full ring
        long = cdiv(k, BLOCK_K) > choice.stages
        if tile.backend == "pingpong" or (long and row_scale is None):
            return choice
    variants = [variant_of("pingpong", *t, residual=added, keep=keep) for t in PINGPONG_TILES]
    if added and row_scale is None and k >= COOP_K:
        variants.insert(0, variant_of("coop", *COOP_TILE, residual=True))
    processors = multiprocessors(x.device)
    return min(variants, key=lambda v: _microseconds(v, m, n, k, processors))


def _problem(
    x: Meta, weight: Meta, residual: Meta | None, dtype: torch.dtype, keep: bool
) -> str | None:
    n, k = weight.shape
    if x.dtype not in HALF:
        return f"operands are {x.dtype}, not bfloat16 or float16"
    if dtype != x.dtype or (residual is not None and residual.dtype != x.dtype):
        return f"operands are {x.dtype}, but the result or the residual is not"
    if n % 8 or k % 8:
        return f"rows of N={n:,} or K={k:,} values do not fill units of 16 bytes"
    for name, matrix in (("x", x), ("weight", weight), ("residual", residual)):
        if matrix is not None and not fits_tma(matrix):
            return f"{name}'s rows do not start at multiples of 16 bytes"
    if keep and residual is not None:
        return "the value before an activation is kept beside a residual"
    return None


def _microseconds(v: Variant, m: int, n: int, k: int, processors: int) -> float:
    """Of the products: a multiprocessor of an H200 takes in 90 KB a microsecond from the L2 cache
    and makes 5.6 million operations, and the busiest one has as many tiles as there are waves."""
    step = max((v.block_m + v.block_n) * 2 / 90e3, 2 * v.block_m * v.block_n / 5.6e6)
    return cdiv(v.tiles(m, n), processors) * k * step


def variant_of(
    name: str, block_m: int, block_n: int, *, residual: bool = False, keep: bool = False
) -> Variant:
    """With as many slots as shared memory holds."""
    cols = min(64, block_n // 2)
    if name == "pingpong":
        bufs = 2 if residual or keep else 1
        y_bytes = 2 * bufs * block_m * cols * 2
    else:  # all of a tile's residual in advance
        bufs = block_n // cols if residual else 2
        y_bytes = bufs * block_m * cols * 2
    room = SHARED_MEMORY["sm90"] - BARRIERS - y_bytes
    stages = min(room // ((block_m + block_n) * BLOCK_K * 2), MAX_STAGES)
    return Variant(name, block_m, block_n, cols, stages, bufs, stages if name == "coop" else 0)


def prepare_hopper(
    choice: Variant, x: Meta, weight: Meta, residual: Meta | None, activation: str, *, keep: bool
) -> Prepared:
    """`run` is given x, weight, bias, scale, residual, row_scale, y [M, N] and pre."""
    from fastvit.kernels.linear.hopper import hopper_linear_kernel

    (n, k), m = weight.shape, row_count(x)
    constants = (
        m, n, k, activation, choice.name == "pingpong", GROUP_M, choice.stages, choice.bufs,
        choice.lag, REGISTERS, LOAD_REGISTERS,
    )  # fmt: skip

    def arguments(
        x: Tensor, weight: Tensor, bias: Any, scale: Any, residual: Any, row_scale: Any,
        y: Tensor, pre: Tensor | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        return (x, weight, y, residual, pre, bias, scale, row_scale, *constants)

    band = choice.rows, choice.cols
    boxes = (
        _box((m, k), rows_of(x), (choice.rows, BLOCK_K), x.dtype),
        _box((n, k), rows_of(weight), (choice.block_n, BLOCK_K), x.dtype),
        _box((m, n), None, band, x.dtype),
        None if residual is None else _box((m, n), rows_of(residual), band, x.dtype),
        _box((m, n), None, band, x.dtype) if keep else None,
    )
    programs = min(choice.tiles(m, n), multiprocessors(x.device))
    tile = TileConfig(choice.block_m, choice.block_n, BLOCK_K, 4, choice.stages, choice.name)
    return Prepared(hopper_linear_kernel, programs, tile, arguments, boxes)


def _box(
    shape: tuple[int, int],
    strides: tuple[int, int] | None,  # None: packed, or will be
    block: tuple[int, int],
    dtype: torch.dtype,
) -> Box:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    layout: Any = gl.NVMMASharedLayout.get_default_for([*block], element)
    sizes, steps = [*shape], [*(strides or (shape[1], 1))]
    return Box(lambda tensor: TensorDescriptor(tensor, sizes, steps, [*block], layout))
