"""Which tiles `hopper_small_linear_kernel` takes, and its launch. For inference, without
registration: whoever calls it sees to it that nothing differentiates or traces.

Untimed. Until a GPU has measured it, tiles follow a rule: fewest microseconds by `_microseconds`,
with what an H200's multiprocessor was measured to take in from the L2 cache; and `MOST_ROWS` is
about where, by the same count, tiles of 64 rows stop paying for the norms and launches that they
save. The parts of a block's sum are those of one multiprocessor at a time: most tiles take more
than half of its shared memory.

Legend: M rows, N output features, K input features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels._backend import Meta, describe
from fastvit.kernels._device import SHARED_MEMORY, cached, multiprocessors
from fastvit.kernels._launch import Box, Prepared, row_count, run
from fastvit.kernels._tuning import TileConfig, cdiv
from fastvit.kernels.linear.launch import exact_activation

ROWS = 64  # of a tile
BANDS = 32  # that a row's statistics have room for
UNIT = 512  # bytes
HALF = (torch.bfloat16, torch.float16)
MOST_ROWS = 800  # 4 images of 197 tokens, 1 of 577
MOST_TILES = 2048  # that are counted where K is cut
COLUMNS = ((128, 0), (64, 32), (64, 8), (64, 0), (32, 16), (32, 0), (16, 8), (16, 0))
SPLITS = (1, 2, 4)
BARRIERS = 1024  # bytes of shared memory that is left for them
BYTES = 90e3  # that a multiprocessor takes in within a microsecond
START, ADDING = 1.3, 0.5  # microseconds of a tile's first bytes and end, and of the last one's turn


class Variant(NamedTuple):
    """One configuration of the kernel."""

    p0: int  # columns of a tile, of its two products
    p1: int
    splits: int
    chunks: int  # of 64 of K in a slot
    stages: int
    steps: int

    @property
    def columns(self) -> int:
        """Of a tile."""
        return self.p0 + self.p1

    def tiles(self, m: int, n: int) -> int:
        """How many cover y."""
        return cdiv(m, ROWS) * (n // self.columns)


class Statistics(NamedTuple):
    """Of the rows of a matrix, for the norm of whoever reads it."""

    values: Tensor  # float32 [2, M rounded up to whole tiles, BANDS]
    bands: int  # of equal width; the rest of `values` is not written


def small_choice(
    m: int, n: int, k: int, processors: int, *, keep: bool = False
) -> Variant | str:  # fmt: skip
    """The variant for M, N, K, or why there is none. Pure: asks no GPU, imports nothing.

    Args:
        keep: of y's rows the statistics are wanted, so that no more than `BANDS` tiles make a row.
    """
    if m > MOST_ROWS:
        return f"{m:,} rows are more than {MOST_ROWS}"
    found = [
        variant
        for p0, p1 in COLUMNS
        for splits in SPLITS
        if n % (p0 + p1) == 0
        and not (keep and n // (p0 + p1) > BANDS)
        and (variant := _variant(p0, p1, splits, k)) is not None
        and (splits == 1 or variant.tiles(m, n) <= MOST_TILES)
    ]
    if not found:
        return f"no tile fits N={n:,} and K={k:,}"
    return min(found, key=lambda v: _microseconds(v, m, n, k, processors))


def _variant(p0: int, p1: int, splits: int, k: int) -> Variant | None:
    """With as much of K at a time as allows three slots, or all of it."""
    room = (SHARED_MEMORY["sm90"] - BARRIERS) // ((ROWS + p0 + p1) * 128)  # chunks
    for chunks in (4, 2, 1):
        steps, rest = divmod(k, 64 * chunks * splits)
        stages = min(room // chunks, steps)
        if rest == 0 and steps and (stages == steps or stages >= 3):
            return Variant(p0, p1, splits, chunks, stages, steps)
    return None


def _microseconds(v: Variant, m: int, n: int, k: int, processors: int) -> float:
    work = (ROWS + v.columns) * k // v.splits * 2 / BYTES + START
    if v.splits > 1:
        work += v.splits * ROWS * v.columns * 4 / BYTES + ADDING
    return cdiv(v.tiles(m, n) * v.splits, processors) * work


# --------------------------------------------------------------------------- launch


@cached
def prepare(
    x: Meta, weight: Meta, bias: Meta | None, colsum: Meta | None, scale: Meta | None,
    residual: Meta | None, coming: Meta | None, activation: str, eps: float, *, keep: bool,
    early: bool,
) -> tuple[Prepared, Variant]:  # fmt: skip
    """The launch, whose `run` is given the tensors of the kernel in its order, the weight once, and
    the bands of x's statistics.

    Raises:
        ValueError: there is no variant.
    """
    from fastvit.kernels.linear.hopper_small import hopper_small_linear_kernel

    (n, k), m = weight.shape, row_count(x)
    choice = small_choice(m, n, k, multiprocessors(x.device), keep=keep)
    if isinstance(choice, str):
        raise ValueError(choice)
    units = 0 if coming is None else coming.shape[0] * coming.shape[1] * 2 // UNIT
    constants = (
        n, k, eps, exact_activation(activation, x.dtype), choice.steps, choice.stages,
        choice.splits,
    )  # fmt: skip

    def arguments(x: Any, weight: Any, *rest: Any) -> tuple[Any, ...]:
        *tensors, bands = rest
        second = weight if choice.p1 else None
        return (x, weight, second, *tensors, units, m, bands, *constants)

    boxes = (
        _box(m, k, choice.chunks, ROWS, x.dtype),
        _box(n, k, choice.chunks, choice.p0, x.dtype),
        _box(n, k, choice.chunks, choice.p1, x.dtype) if choice.p1 else None,
    )
    tile = TileConfig(ROWS, choice.p0, 64 * choice.chunks, 4, choice.stages, "small")
    programs = choice.tiles(m, n) * choice.splits
    launch = Prepared(hopper_small_linear_kernel, programs, tile, arguments, boxes, early=early)
    return launch, choice


def _box(rows: int, k: int, chunks: int, block: int, dtype: torch.dtype) -> Box:
    """Of a packed [rows, K] as [K / 64, rows, 64]: what lies side by side in memory is what one
    instruction brings."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    shape, strides, box = [k // 64, rows, 64], [64, k, 1], [chunks, block, 64]
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    layout: Any = gl.NVMMASharedLayout.get_default_for(box, element)
    return Box(lambda tensor: TensorDescriptor(tensor, shape, strides, box, layout))


def small_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None,
    scale: Tensor | None = None, residual: Tensor | None = None, colsum: Tensor | None = None,
    statistics: Statistics | None = None, eps: float = 0.0, count: Tensor | None = None,
    coming: Tensor | None = None, keep: bool = False, early: bool = True,
) -> tuple[Tensor, Statistics | None]:  # fmt: skip
    """act(LN(x) W^T + b) * scale + residual, and of its rows the statistics.

    Args:
        x, residual: [..., K] and [..., N], packed, of a half dtype as the packed weight [N, K].
        bias, scale: [N], of any floating dtype.
        colsum, statistics, eps: of a norm that `fold` put into weight and bias, and of x.
        count: int32 [MOST_TILES] of zeros, which one stream's launches share and leave as zeros;
            needed where K may be cut.
        coming: a packed weight that a later kernel reads.
        keep: the statistics are wanted.
        early: by programmatic dependent launch.

    Raises:
        ValueError: there is no variant.
    """
    metas = describe(x, weight, bias, colsum, scale, residual, coming)
    launch, choice = prepare(*metas, activation or "none", eps, keep=keep, early=early)
    n, m, device = weight.shape[0], row_count(metas[0]), x.device
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=device)
    kept = Statistics(_room(m, device), n // choice.columns) if keep else None
    work = None
    if choice.splits == 1:
        count = None
    else:
        size = choice.tiles(m, n) * choice.splits * ROWS * choice.columns
        work = torch.empty(size, dtype=torch.float32, device=device)
    of_x, bands = (None, 1) if statistics is None else statistics
    of_y = None if kept is None else kept.values
    tensors: list[Any] = [
        x, weight, y, bias, colsum, scale, residual, of_x, of_y, work, count, coming, bands
    ]  # fmt: skip
    run(launch, *tensors)
    return y, kept


def _room(m: int, device: torch.device) -> Tensor:
    shape = (2, cdiv(m, ROWS) * ROWS, BANDS)
    return torch.empty(shape, dtype=torch.float32, device=device)


@cached
def _prepare_statistics(x: Meta) -> Prepared:
    from fastvit.kernels.linear.hopper_small import row_statistics_kernel

    m, k = row_count(x), x.shape[-1]
    rows, wide = 4, 1 << (k - 1).bit_length()
    return Prepared(
        row_statistics_kernel, cdiv(m, rows), TileConfig(rows, wide, num_warps=4, num_stages=1),
        lambda x, out: (x, out, m, k, rows, wide),
    )  # fmt: skip


def row_statistics(x: Tensor) -> Statistics:
    """Of a packed x [..., K] that no `small_linear` made."""
    (meta,) = describe(x)
    values = _room(row_count(meta), x.device)
    run(_prepare_statistics(meta), x, values)
    return Statistics(values, 1)


def fold(
    gamma: Tensor | None, beta: Tensor | None, weights: Tensor, biases: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, bias, colsum) of a linear behind a LayerNorm with `gamma` and `beta` [K]: the weight
    in its own dtype, float32 [N] the others.

    Args:
        weights, biases: [N, K] and [N].
    """
    wide = weights.double()
    folded = (wide if gamma is None else wide * gamma.double()).to(weights.dtype).contiguous()
    bias = wide.new_zeros(len(wide)) if beta is None else wide @ beta.double()
    bias = bias if biases is None else bias + biases.double()
    return folded, bias.float(), folded.double().sum(1).float()
