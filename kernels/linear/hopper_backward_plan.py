"""Which of Hopper's kernels gives a gradient of y = x W^T + b, and its launches.

Proven right on an H200 and not timed (2026-11-27, `proven/sm90.json`): tiles of 128x128 in
turns and shared ones of 128x256 for G W, pieces of 128x256 and 256x128 for G^T x. So the choice
follows rules: of G W as `hopper_plan` has it, where act(pre) is wanted too shared tiles, for which
alone the registers suffice; of G^T x fewest tiles.

Legend: M rows, N output features, K input features of the layer.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels import _launch
from fastvit.kernels._backend import Meta, describe
from fastvit.kernels._device import SHARED_MEMORY, architecture, cached, multiprocessors
from fastvit.kernels._hopper import answer, give_up, hopper_problem
from fastvit.kernels._launch import Prepared, fits_tma, row_count, rows_of
from fastvit.kernels._tuning import TileConfig, cdiv, lookup
from fastvit.kernels.linear.hopper_plan import (
    BARRIERS,
    COOP_TILE,
    GROUP_M,
    HALF,
    LOAD_REGISTERS,
    MAX_STAGES,
    PINGPONG_TILES,
    REGISTERS,
    STEP,
    Variant,
    box_of,
    microseconds,
    wants_hopper,
)

BLOCK = STEP // 2  # values of a half dtype in a slot's row: N of G W, M of G^T x
FORMS = ("plain", "slope", "hidden")  # G W; times act'(pre), with sums; that and act(pre)
PIECE_TILES = ((128, 256), (256, 128))  # of G^T x, [N, K]
PIECE_STAGES = 4
LEAST = 6  # steps of a piece
PIECE_COST = 8  # of its first loads and its store, in steps
MOST_PIECES = 64  # of a tile; `sum_pieces_kernel` has a load for each, and 256 spill registers
SUM_ROWS = 8  # of a tile, for each program of `sum_pieces_kernel`


# --------------------------------------------------------------------------- gradient of the input


def input_variant(
    g: Meta, weight: Meta, pre: Meta | None, activation: str, *, hidden: bool = False
) -> Variant | str:
    """Hopper's kernel for G W, or why another one runs: the table, the machine, the operands.
    Arguments as of `input_choice`. The table is the forward's of the same product."""
    n, k = weight.shape
    tile = lookup("linear", architecture(g.device), g.dtype, M=row_count(g), N=k, K=n)
    choice = _by_table(tile, g) or input_choice(g, weight, pre, activation, hidden=hidden)
    return answer("linear_input_gradient", (row_count(g), n, k), choice)


def _by_table(tile: TileConfig, g: Meta) -> str | None:
    if wants_hopper(tile):
        return hopper_problem(g.device)
    named = tile.backend or "a portable tile"
    return f"the tuning table of {architecture(g.device)} names {named} for M={row_count(g):,} rows"


def input_choice(
    g: Meta, weight: Meta, pre: Meta | None, activation: str, *, hidden: bool = False
) -> Variant | str:
    """The variant for G W, or why Hopper's kernel cannot take it. Pure: asks no GPU, imports
    nothing.

    Args:
        g: [..., N], weight: [N, K].
        pre: [..., K] of g's dtype, for an activation.
        activation: as `exact_activation` gives it.
        hidden: act(pre) is wanted too.
    """
    (n, k), m = weight.shape, row_count(g)
    problem = _problem({"G": g, "weight": weight, "pre": pre}, n, k)
    if problem is None and pre is not None and activation == "none":
        problem = "there is no activation"
    if problem is not None:
        return problem
    form = FORMS[(pre is not None) + hidden]
    tiles = [("coop", *COOP_TILE)] if hidden else [("pingpong", *t) for t in PINGPONG_TILES]
    if pre is not None:  # sums want bands of 64 columns, erf beside 128 rows in turns registers
        tiles = [tile for tile in tiles if tile[2] >= 128]
        if activation == "gelu":
            tiles = [tile for tile in tiles if tile[:2] != ("pingpong", 128)]
    variants = [input_variant_of(*tile, form) for tile in tiles]
    processors = multiprocessors(g.device)
    return min(variants, key=lambda v: microseconds(v, m, k, n * g.dtype.itemsize, processors))


def _problem(operands: dict[str, Meta | None], n: int, k: int) -> str | None:
    there = {name: matrix for name, matrix in operands.items() if matrix is not None}
    dtypes = {name: matrix.dtype for name, matrix in there.items()}
    unaligned = [name for name, matrix in there.items() if not fits_tma(matrix)]
    first = dtypes["G"]
    reasons = {
        f"operands are {first}, not bfloat16 or float16": first not in HALF,
        f"operands are of several dtypes: {dtypes}": len({*dtypes.values()}) > 1,
        f"rows of N={n:,} or K={k:,} values do not fill units of 16 bytes": n % 8 or k % 8,
        f"rows of {' and '.join(unaligned)} do not start at multiples of 16 bytes": unaligned,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def input_variant_of(name: str, block_m: int, block_k: int, form: str) -> Variant:
    """With as many slots as shared memory holds; `block_k` are a tile's columns, of K."""
    plain = form == "plain"
    rows = block_m if name == "pingpong" else block_m // 2
    cols = min(64, block_k // 2)
    bufs = 1 if name == "pingpong" and plain else 2
    bands = 2 * (bufs + (form == "hidden"))  # of both consumers
    ones = 0 if plain else 8 * rows
    room = SHARED_MEMORY["sm90"] - BARRIERS - 2 * (bands * rows * cols + ones)
    stages = min(room // ((block_m + block_k) * STEP), MAX_STAGES)
    return Variant(name, block_m, block_k, cols, stages, bufs, 0)


def sum_parts(choice: Variant, m: int) -> int:
    """Rows of `sums` of `hopper_input_gradient_kernel`."""
    return cdiv(m, choice.block_m) * (choice.block_m // choice.rows)


class InputGradient(NamedTuple):
    """Of what a linear reads, [M, K] each; G W by default."""

    grad: Tensor
    hidden: Tensor | None  # act(pre)
    sums: Tensor | None  # [K], float64: of the columns of grad, where they cost nothing


def input_gradient(
    g: Tensor, weight: Tensor, factor: Tensor | None, pre: Tensor | None = None,
    activation: str = "none", *, hidden: bool = False,
) -> InputGradient | None:  # fmt: skip
    """factor G W, times act'(pre) if that is given; None where another kernel has to run."""
    launch = _prepare_input(*describe(g, weight, pre, factor), activation, hidden)
    if launch is None:
        return None
    shape = g.shape[0], weight.shape[1]
    out, activated = g.new_empty(shape), g.new_empty(shape) if hidden else None
    sums = None
    if pre is not None:
        sums = g.new_empty(launch[1], shape[1], dtype=torch.float32)
    _launch.run(launch[0], g, weight, pre, factor, out, activated, sums)
    return InputGradient(out, activated, None if sums is None else sums.sum(0, dtype=torch.float64))


@cached
def _prepare_input(
    g: Meta, weight: Meta, pre: Meta | None, factor: Meta | None, activation: str, hidden: bool
) -> tuple[Prepared, int] | None:  # fmt: skip
    """The launch for G W, and into how many rows it sums columns; None where another kernel
    runs."""
    choice = input_variant(g, weight, pre, activation, hidden=hidden)
    if isinstance(choice, str):
        return None
    launch = prepare_input_gradient(choice, g, weight, pre, activation, hidden=hidden)
    return launch, sum_parts(choice, row_count(g))


def prepare_input_gradient(
    choice: Variant, g: Meta, weight: Meta, pre: Meta | None, activation: str, *,
    hidden: bool = False,
) -> Prepared:  # fmt: skip
    """`run` is given g, weight, pre, factor, out [M, K], hidden, and with pre sums [parts, K]."""
    from fastvit.kernels.linear.hopper_backward import hopper_input_gradient_kernel

    (n, k), m = weight.shape, row_count(g)
    constants = (
        m, n, k, activation, choice.name == "pingpong", GROUP_M, choice.stages, choice.bufs,
        REGISTERS, LOAD_REGISTERS,
    )  # fmt: skip

    def arguments(
        g: Tensor, weight: Tensor, pre: Any, factor: Any, out: Tensor, hidden: Any, sums: Any
    ) -> tuple[Any, ...]:
        return (g, weight, out, pre, hidden, sums, factor, *constants)

    def band(strides: tuple[int, int] | None = None) -> Any:
        return box_of((m, k), strides, (choice.rows, choice.cols), g.dtype)

    boxes = (
        box_of((m, n), rows_of(g), (choice.rows, BLOCK), g.dtype),
        box_of((n, k), rows_of(weight), (BLOCK, choice.block_n), g.dtype),
        band(),
        None if pre is None else band(rows_of(pre)),
        band() if hidden else None,
    )
    programs = min(choice.tiles(m, k), multiprocessors(g.device))
    tile = TileConfig(choice.block_m, choice.block_n, BLOCK, 4, choice.stages, choice.name)
    return Prepared(hopper_input_gradient_kernel, programs, tile, arguments, boxes, give_up)


# -------------------------------------------------------------------------- gradient of the weight


class Pieces(NamedTuple):
    """One configuration of `hopper_weight_product_kernel`."""

    block_n: int  # of a tile
    block_k: int

    name = "pieces"

    @property
    def rows(self) -> int:
        """Of N, for one consumer."""
        return self.block_n // 2


def weight_variant(g: Meta, x: Meta, tile: TileConfig) -> Pieces | str:
    """Hopper's kernel for G^T x, or why another one runs; `tile` is what the table of
    ``linear_backward`` says."""
    choice = _by_table(tile, g) or weight_choice(g, x)
    return answer("linear_weight_gradient", (*g.shape, x.shape[1]), choice)


def weight_choice(g: Meta, x: Meta) -> Pieces | str:
    """As `input_choice`, for g [M, N] and x [M, K]."""
    n, k = g.shape[1], x.shape[1]
    problem = _problem({"G": g, "x": x}, n, k)
    if problem is not None:
        return problem
    return min((Pieces(*t) for t in PIECE_TILES), key=lambda p: _grid(p, n, k)[2])


def _grid(choice: Pieces, n: int, k: int) -> tuple[int, int, int]:
    """Rows and columns of tiles, and how many they are."""
    rows, cols = cdiv(n, choice.block_n), cdiv(k, choice.block_k)
    return rows, cols, rows * cols


class WeightProduct(NamedTuple):
    """Two launches. The first is given g, x, pieces [slots, block_n, block_k] and sums [slots,
    block_n] or None, the second those two, the result [N, K] and its sums [N] or None."""

    product: Prepared
    total: Prepared
    slots: int
    choice: Pieces


def prepare_weight_product(choice: Pieces, g: Meta, x: Meta) -> WeightProduct:
    """G^T x and the sums of G's columns."""
    from fastvit.kernels.linear.hopper_backward import (
        hopper_weight_product_kernel,
        sum_pieces_kernel,
    )

    (m, n), k = g.shape, x.shape[1]
    tiles_n, tiles_k, tiles = _grid(choice, n, k)
    programs = min(multiprocessors(g.device), MOST_PIECES * tiles)
    table, rows, starts = _on_device(tiles_n, tiles_k, cdiv(m, BLOCK), programs, g.device)
    constants = rows.shape[1], PIECE_STAGES, REGISTERS, LOAD_REGISTERS
    boxes = (
        box_of((m, n), rows_of(g), (BLOCK, choice.rows), g.dtype),
        box_of((m, k), rows_of(x), (BLOCK, choice.block_k), g.dtype),
    )
    tile = TileConfig(*choice, BLOCK, 4, PIECE_STAGES, choice.name)
    product = Prepared(
        hopper_weight_product_kernel, programs, tile,
        lambda *tensors: (*tensors, rows, *constants), boxes, give_up,
    )  # fmt: skip
    # few shapes differ in these, and loads past the last are masked
    most = max(8, _power(table.most)), max(16, _power(table.most_of_row))
    shape = n, k, *most, *choice, SUM_ROWS
    total = Prepared(
        sum_pieces_kernel, tiles * (choice.block_n // SUM_ROWS), TileConfig(*choice, num_warps=4),
        lambda pieces, sums, out, total: (pieces, sums, starts, out, total, *shape),
    )  # fmt: skip
    return WeightProduct(product, total, table.starts[-1], choice)


def run_weight_product(
    launches: WeightProduct, g: Tensor, x: Tensor, wants_sums: bool, final: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """G^T x [N, K] and, if wanted, the sums of G's columns [N], both of dtype `final`; without one
    G^T x as [1, N, K], in float32."""
    product, total, slots, choice = launches
    n, dtype = g.shape[1], final or torch.float32
    pieces = g.new_empty(slots, *choice, dtype=torch.float32)
    of_pieces = sums = None
    if wants_sums:
        of_pieces = g.new_empty(slots, choice.block_n, dtype=torch.float32)
        sums = g.new_empty(n, dtype=dtype)
    out = g.new_empty(n, x.shape[1], dtype=dtype)
    _launch.run(product, g, x, pieces, of_pieces)
    _launch.run(total, pieces, of_pieces, out, sums)
    return out if final else out[None], sums


@functools.lru_cache(maxsize=4096)  # not `cached`: a CUDA graph that was captured reads them
def _on_device(
    tiles_n: int, tiles_k: int, steps: int, programs: int, device: torch.device
) -> tuple[Table, Tensor, Tensor]:
    """A `Table`, its rows with their counts [programs, width] and its starts."""
    table = tabulate(schedule(tiles_n, tiles_k, steps, programs), tiles_n, tiles_k, steps)
    width = max(map(len, table.rows))
    rows = [[len(row) // PIECE, *row] + [0] * (width - len(row)) for row in table.rows]
    options: dict[str, Any] = {"dtype": torch.int32, "device": device}
    return table, torch.tensor(rows, **options), torch.tensor(table.starts, **options)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


# --------------------------------------------------------------------------- pieces of tiles

PIECE = 7  # numbers of a piece, as `hopper_backward.PIECE` says
Piece = tuple[int, int, int, int]  # its tile's row and column, first step, one after the last


def schedule(tiles_n: int, tiles_k: int, steps: int, programs: int) -> list[list[Piece]]:
    """What each program does, in order.

    With fewer tiles than programs, each tile gets as many programs as all can have, each with its
    even share of the steps; the rest of the programs share what is left of the steps. With more, as
    many tiles as there are programs are done whole, again and again, and then as before. So all
    have about as many steps, and at one time all are at work on few windows of rows.
    """
    tiles = [(n, k) for n in range(tiles_n) for k in range(tiles_k)]
    even, idle = ([[] for _ in range(programs)] for _ in range(2))
    _share(even, tiles, 0, steps, list(range(programs)), rest=True)
    # the programs that would share the rest stay idle: it may be too many small pieces
    _share(idle, tiles, 0, steps, list(range(programs)), rest=False)
    return min(even, idle, key=lambda work: max(map(_cost, work)))


def _cost(pieces: list[Piece]) -> int:
    """Of one program, in steps."""
    return sum(last - first + PIECE_COST for _, _, first, last in pieces)


def _share(
    work: list[list[Piece]], tiles: list[tuple[int, int]], first: int, last: int, who: list[int],
    *, rest: bool,
) -> None:  # fmt: skip
    """Deal steps `first` to `last` of `tiles` to the programs `who`; without `rest`, the programs
    that are too few to be one more for each tile get nothing."""
    count = last - first
    if len(tiles) >= len(who):
        whole = len(tiles) // len(who) * len(who)
        for i, (n, k) in enumerate(tiles[:whole]):
            work[who[i % len(who)]].append((n, k, first, last))
        if tiles[whole:]:
            _share(work, tiles[whole:], first, last, who, rest=True)
        return
    each = len(who) // len(tiles)
    least = min(LEAST, count)
    if not rest or len(who) % len(tiles) == 0 or count * len(tiles) <= len(who) * least:
        part = max(cdiv(count, each), least)
    else:
        part = max(cdiv(count * len(tiles), len(who)), least)
    used = 0
    for _ in range(each):
        if first < last:
            for i, (n, k) in enumerate(tiles):
                work[who[used + i]].append((n, k, first, min(first + part, last)))
            used += len(tiles)
            first += part
    if first < last:
        _share(work, tiles, first, last, who[used:], rest=True)


class Table(NamedTuple):
    """A schedule as numbers.

    Attributes:
        rows: of each program, its pieces, `PIECE` numbers each.
        starts: each tile's first slot, and one after the last.
        most, most_of_row: pieces of a tile, and of a row of tiles.
    """

    rows: list[list[int]]
    starts: list[int]
    most: int
    most_of_row: int


def tabulate(work: list[list[Piece]], tiles_n: int, tiles_k: int, steps: int) -> Table:
    """Every step of a row of tiles has its sums taken by one of its pieces."""
    of_tile: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for program, pieces in enumerate(work):
        for i, (n, k, first, last) in enumerate(pieces):
            of_tile.setdefault((n, k), []).append((first, last, program, i))
    numbers = [[[0] * PIECE for _ in pieces] for pieces in work]
    starts = [0]
    for n in range(tiles_n):
        windows = [sorted(piece[:2] for piece in of_tile[n, k]) for k in range(tiles_k)]
        alike = all(window == windows[0] for window in windows)
        for k in range(tiles_k):
            pieces = sorted(of_tile[n, k])
            assert [first for first, *_ in pieces] == [0, *(last for _, last, *_ in pieces[:-1])]
            assert pieces[-1][1] == steps
            for j, (first, last, program, i) in enumerate(pieces):
                count = last - first
                if alike:  # each of the row takes a part of each window
                    sums = first + count * k // tiles_k, first + count * (k + 1) // tiles_k
                else:
                    sums = (first, last) if k == 0 else (first, first)
                if sums[0] == sums[1]:  # none: past the first step, which is treated apart
                    sums = last, last
                numbers[program][i] = [n, k, first, last, starts[-1] + j, *sums]
            starts.append(starts[-1] + len(pieces))
    return Table(
        [[number for piece in pieces for number in piece] for pieces in numbers], starts,
        max(after - start for start, after in itertools.pairwise(starts)),
        max(starts[i + tiles_k] - starts[i] for i in range(0, tiles_n * tiles_k, tiles_k)),
    )  # fmt: skip
