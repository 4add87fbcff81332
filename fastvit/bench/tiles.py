"""Which tiles are worth measuring: data for each op, and what fits a shape and a card."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastvit.kernels._tuning import Query, TileConfig, cdiv

MANY_PROGRAMS = 192  # fill a GPU of today (108 to 148 multiprocessors)
Fields = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Space:
    """The tiles of one op: where the search starts (the present tile where that does not fit), the
    values of each step, and the sizes for which a result holds in a neighbourhood of this factor
    (others hold as they are)."""

    start: TileConfig
    steps: tuple[Fields, ...]
    stretch: Mapping[str, float]


_MATMUL = Space(
    start=TileConfig(128, 128, BLOCK_K=64, num_warps=8, num_stages=3),
    steps=(
        {
            "BLOCK_M": (16, 32, 64, 128, 256),
            "BLOCK_N": (32, 64, 128, 256),
            "num_warps": (4, 8),
        },
        {"BLOCK_K": (32, 64, 128), "num_stages": (2, 3, 4, 5)},
    ),
    stretch={"M": 4.0},
)
SPACES = {
    "linear": dataclasses.replace(
        _MATMUL,
        steps=(
            {
                **_MATMUL.steps[0],
                "backend": ("", "tma", "device_tma", "cublas"),
                "warp_specialize": (False, True),
            },
            _MATMUL.steps[1],
            {"subtiles": (1, 2, 4), "persistent": (0, 1, 2)},
            {"split_k": (1, 2, 3, 4, 6, 8)},
        ),
    ),
    "patch_embed": _MATMUL,
    "attention": Space(
        start=TileConfig(64, 64),
        steps=(
            {"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128), "num_warps": (4, 8)},
            {"num_stages": (1, 2, 3, 4)},
        ),
        # the cost of a sequence depends on what is left over of the last tile
        stretch={"N": 1.25, "M": 1.25},
    ),
    "layer_norm": Space(
        start=TileConfig(1, 1),
        steps=({"BLOCK_M": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8, 16)},),
        stretch={"M": 4.0},
    ),
}


def candidates(
    query: Query, tiles: Iterable[TileConfig], step: Fields, shared_memory: int
) -> list[TileConfig]:
    """`tiles` with every combination of the values of `step` that `fits`, once each."""
    found = (
        canonical(dataclasses.replace(tile, **dict(zip(step, values, strict=True))))
        for tile in tiles
        for values in itertools.product(*step.values())
    )
    return list(dict.fromkeys(tile for tile in found if fits(query, tile, shared_memory)))


def canonical(tile: TileConfig) -> TileConfig:
    """cuBLAS reads no tile sizes, so all its tiles are one. Specialised warps gain by going from
    tile to tile, one block to a multiprocessor, and 128 columns at a time keep the epilogue from
    spilling."""
    if tile.backend == "cublas":
        return TileConfig(128, 128, backend="cublas")
    if tile.warp_specialize:
        subtiles = max(tile.subtiles, tile.BLOCK_N // 128)
        return dataclasses.replace(tile, persistent=1, subtiles=subtiles)
    return tile


def fits(query: Query, tile: TileConfig, shared_memory: int) -> bool:
    """Whether a tile makes sense for the sizes of `query`, and may fit a card with so many bytes of
    shared memory a block. The compiler has the last word."""
    sizes = dict(query.shape)
    block_m, block_n, block_k = tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K
    itemsize = getattr(torch, query.dtype).itemsize
    threads = tile.num_warps * (64 if query.arch.startswith("gfx") else 32)
    threads *= 2 if tile.warp_specialize else 1  # two groups of warps multiply
    if tile.backend == "cublas":
        return True
    if query.op == "layer_norm":
        kept = block_m * sizes["D_POW2"]
        return threads <= kept <= 64 * threads and block_m <= _power_of_two(sizes["M"])
    if query.op == "attention":
        rows, columns, depth = sizes["N"], sizes["M"], block_k
        width = -(-sizes["D"] // 16) * 16
        kept = block_m * (width + block_n)  # in float32: the sums and the scores
        staged = tile.num_stages * 2 * block_n * width + block_m * width
    else:
        rows, columns, depth = sizes["M"], sizes["N"], sizes["K"]
        kept = block_m * block_n
        staged = tile.num_stages * (block_m + block_n) * block_k
    tma = tile.backend in ("tma", "device_tma")
    hopper = query.arch.startswith("sm") and int(query.arch[2:]) >= 90
    return (
        8 * threads <= kept <= 192 * threads
        and staged * itemsize <= shared_memory
        and block_m <= max(16, _power_of_two(rows))
        and block_n <= max(16, _power_of_two(columns))
        and block_k <= max(16, _power_of_two(depth))
        and block_n // tile.subtiles >= 16
        and (tma or not tile.persistent)
        and (not tma or (hopper and itemsize == 2))
        and (not tile.warp_specialize or _specializes(query, tile))
        and (tile.split_k == 1 or _splits(tile, rows, columns, depth))
    )


def _specializes(query: Query, tile: TileConfig) -> bool:
    """Whether warp specialisation takes effect and two groups share the rows; on sm_100 it spills
    (`fastvit/audit.py`)."""
    return (
        query.arch == "sm90"
        and tile.backend == "device_tma"
        and tile.num_warps == 4
        and tile.BLOCK_M >= 128
    )


def _splits(tile: TileConfig, rows: int, columns: int, depth: int) -> bool:
    """Whether splitting the sum may pay: it fills a GPU that the tiles alone do not, with some
    steps left for each part."""
    programs = cdiv(rows, tile.BLOCK_M) * cdiv(columns, tile.BLOCK_N)
    return (
        tile.backend in ("", "tma")
        and not tile.persistent
        and programs <= MANY_PROGRAMS
        and tile.split_k * programs <= 4 * MANY_PROGRAMS
        and depth >= 2 * tile.split_k * tile.BLOCK_K
    )


def _power_of_two(size: int) -> int:
    """The least one that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def label(tile: TileConfig) -> str:
    """A tile on a few columns: ``128x64x32 w4 s3 tma /2 p1``."""
    if tile.backend == "cublas":
        return "cublas"
    sizes = "x".join(str(n) for n in (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K) if n)
    extras = [tile.backend] if tile.backend else []
    extras += [f"/{tile.subtiles}"] if tile.subtiles > 1 else []
    extras += [f"p{tile.persistent}"] if tile.persistent else []
    extras += ["ws"] if tile.warp_specialize else []
    extras += [f"k{tile.split_k}"] if tile.split_k > 1 else []
    return " ".join([sizes, f"w{tile.num_warps}", f"s{tile.num_stages}", *extras])
