"""Tile choice: a pure function of (op, architecture, dtype, shape).

A checked-in table first (`kernels/<op>/tuning/<arch>.json`, data only), then a heuristic, so the
first call never searches.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes of one launch. Matmuls: rows, columns and depth of a tile; attention: queries
    and keys of a step; layer_norm: rows of a program (BLOCK_N is not read)."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("BLOCK") and value & (value - 1):
                raise ValueError(f"{field.name} must be a power of two; got {value}")


def cdiv(total: int, block: int) -> int:
    """Blocks that cover `total`."""
    return -(-total // block)


def lookup(op: str, arch: str, dtype: torch.dtype, **shape: int) -> TileConfig:
    """The tiles for `op` on `arch`: the first matching row of its table, else the heuristic.

    Args:
        op: folder name under `kernels/`.
        arch: as `_device.architecture` gives it; an architecture without a table takes its
            family's nearest older one.
        dtype: of the multiplied operands.
        shape: named sizes, such as ``M=197, N=768, K=768``.
    """
    return _lookup(op, arch, str(dtype).removeprefix("torch."), tuple(sorted(shape.items())))


@functools.lru_cache(maxsize=4096)
def _lookup(op: str, arch: str, dtype: str, shape: tuple[tuple[str, int], ...]) -> TileConfig:
    sizes = dict(shape)
    for row in load_table(op, nearest_table(op, arch)):
        if dtype in row["dtype"] and all(
            low <= sizes[name] <= high for name, (low, high) in row.get("when", {}).items()
        ):
            return TileConfig(**row["tile"])
    return _heuristic(op, dtype, sizes)


def nearest_table(op: str, arch: str) -> str | None:
    """`arch` itself if it has a table, else the newest older one of its family, else None."""
    tables = {path.stem for path in table_folder(op).glob("*.json")}
    if arch in tables:
        return arch
    if not arch.startswith("sm"):
        return None
    older = [int(table[2:]) for table in tables if table.startswith("sm")]
    older = [number for number in older if number <= int(arch[2:])]
    return f"sm{max(older)}" if older else None


def table_folder(op: str) -> Path:
    """Where the tables of `op` lie."""
    return Path(__file__).parent / op / "tuning"


@functools.cache
def load_table(op: str, arch: str | None) -> list[dict[str, Any]]:
    """The rows of one table: ``dtype`` names, ``when`` inclusive size ranges, ``tile`` sizes."""
    return json.loads((table_folder(op) / f"{arch}.json").read_text())["rows"] if arch else []


def _heuristic(op: str, dtype: str, sizes: dict[str, int]) -> TileConfig:
    """Tiles that fit 64 KiB of shared memory, for a GPU that no table covers."""
    wide = dtype in ("float32", "float64")
    if op == "attention":
        return TileConfig(32, 16 if sizes["D"] > 128 or wide else 32, num_stages=1)
    if op == "layer_norm":
        return TileConfig(max(1, 2048 // sizes["D_POW2"]), 1)
    return TileConfig(64, 64, BLOCK_K=32)
