"""Which tiles are worth measuring: data for each op, and what fits a shape and a card."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastvit.kernels._tuning import Query, TileConfig
from fastvit.kernels.attention import hopper_plan as attention_plan
from fastvit.kernels.linear import hopper_plan

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
            {**_MATMUL.steps[0], "backend": ("", "tma", "cublas", *hopper_plan.NAMES)},
            _MATMUL.steps[1],
            {"subtiles": (1, 2, 4)},
        ),
    ),
    "patch_embed": _MATMUL,
    "attention": Space(
        start=TileConfig(64, 64),
        steps=(
            {
                "BLOCK_M": (16, 32, 64, 128),
                "BLOCK_N": (16, 32, 64, 128),
                "num_warps": (4, 8),
                "backend": ("", *attention_plan.NAMES),
            },
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
    """cuBLAS reads no tile sizes, so all its tiles are one; Hopper's linear no more than two, and
    its attention for long sequences the keys of a block."""
    if tile.backend in attention_plan.NAMES:
        keys = tile.BLOCK_N if tile.backend in attention_plan.LONG else attention_plan.ROWS
        return TileConfig(attention_plan.ROWS, keys, backend=tile.backend)
    if tile.backend in hopper_plan.NAMES:
        return TileConfig(tile.BLOCK_M, tile.BLOCK_N, backend=tile.backend)
    return TileConfig(128, 128, backend="cublas") if tile.backend == "cublas" else tile


def fits(query: Query, tile: TileConfig, shared_memory: int) -> bool:
    """Whether a tile makes sense for the sizes of `query`, and may fit a card with so many bytes of
    shared memory a block. The compiler has the last word."""
    sizes = dict(query.shape)
    block_m, block_n, block_k = tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K
    itemsize = getattr(torch, query.dtype).itemsize
    threads = tile.num_warps * (64 if query.arch.startswith("gfx") else 32)
    if tile.backend == "cublas":
        return True
    if tile.backend.startswith("hopper"):  # which a table says where nothing is measured
        return False
    if tile.backend in hopper_plan.NAMES:
        pingpong = tile.backend == "pingpong"
        known = hopper_plan.PINGPONG_TILES if pingpong else (hopper_plan.COOP_TILE,)
        takes = getattr(torch, query.dtype) in (*hopper_plan.HALF, hopper_plan.E4M3)
        rows = sizes["N"] % 8 == 0 == sizes["K"] * itemsize % 16
        return takes and rows and query.arch == "sm90" and (block_m, block_n) in known
    if tile.backend in attention_plan.NAMES:
        short = tile.backend in attention_plan.SHORT
        keys = range(1, attention_plan.MOST_KEYS + 1) if short else range(64, 1 << 31)
        taken = (
            sizes["D"] in attention_plan.HEAD_DIMS and sizes["M"] in keys and not sizes.get("ROPE")
        )
        half = getattr(torch, query.dtype) in attention_plan.HALF and query.arch == "sm90"
        return half and taken and block_n in (64, 128) and not (short and sizes["D"] > 64)
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
    hopper = query.arch.startswith("sm") and int(query.arch[2:]) >= 90
    return (
        8 * threads <= kept <= 192 * threads
        and staged * itemsize <= shared_memory
        and block_m <= max(16, _power_of_two(rows))
        and block_n <= max(16, _power_of_two(columns))
        and block_k <= max(16, _power_of_two(depth))
        and block_n // tile.subtiles >= 16
        and (tile.backend != "tma" or (hopper and itemsize <= 2))
    )


def _power_of_two(size: int) -> int:
    """The least one that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def label(tile: TileConfig) -> str:
    """A tile on a few columns: ``128x64x32 w4 s3 tma /2``."""
    if tile.backend == "cublas":
        return "cublas"
    sizes = "x".join(str(n) for n in (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K) if n)
    extras = [tile.backend] if tile.backend else []
    extras += [f"/{tile.subtiles}"] if tile.subtiles > 1 else []
    return " ".join([sizes, f"w{tile.num_warps}", f"s{tile.num_stages}", *extras])
