"""Tile choice: a pure function of (op, architecture, dtype, shape).

What `fastvit tune` measured on this machine first (``$FASTVIT_CACHE``, else ``~/.cache/fastvit``,
then ``tuning/<op>/<arch>.json``), then a checked-in table (`kernels/<op>/tuning/<arch>.json`, data
only), then a heuristic, so the first call never searches.
"""

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvit.kernels._device import forget


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes of one launch. Matmuls: rows, columns and depth of a tile; attention: queries
    and keys of a step; layer_norm: rows of a program (BLOCK_N is not read). `backend` is one of the
    op's own (linear has ``tma`` and ``cublas``), "" for plain pointers; `subtiles` the bands of
    columns that linear's epilogue takes one after another."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 2
    backend: str = ""
    subtiles: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("BLOCK") and value & (value - 1):
                raise ValueError(f"{field.name} must be a power of two; got {value}")


def cdiv(total: int, block: int) -> int:
    """Blocks that cover `total`."""
    return -(-total // block)


class Query(NamedTuple):
    """What one `lookup` was asked."""

    op: str
    arch: str
    dtype: str
    shape: tuple[tuple[str, int], ...]


_forced: ContextVar[tuple[str, TileConfig] | None] = ContextVar("forced", default=None)
_observed: ContextVar[list[Query] | None] = ContextVar("observed", default=None)


@contextlib.contextmanager
def forced(op: str, tile: TileConfig) -> Iterator[None]:
    """Give `tile` to every `lookup` of `op` in this thread: for tuning."""
    token = _forced.set((op, tile))
    forget()
    try:
        yield
    finally:
        _forced.reset(token)
        forget()


@contextlib.contextmanager
def observed() -> Iterator[list[Query]]:
    """Collect what every `lookup` of this thread is asked."""
    queries: list[Query] = []
    token = _observed.set(queries)
    forget()  # or nothing would be looked up
    try:
        yield queries
    finally:
        _observed.reset(token)


def lookup(op: str, arch: str, dtype: torch.dtype, **shape: int) -> TileConfig:
    """The tiles for `op` on `arch`: the first matching row, of this machine's cache and then of the
    table, else the heuristic.

    Args:
        op: folder name under `kernels/`, or with ``_backward`` behind it.
        arch: as `_device.architecture` gives it; an architecture without a table takes its
            family's nearest older one.
        dtype: of the multiplied operands.
        shape: named sizes, such as ``M=197, N=768, K=768``.
    """
    query = Query(op, arch, str(dtype).removeprefix("torch."), tuple(sorted(shape.items())))
    if (queries := _observed.get()) is not None:
        queries.append(query)
    choice = _forced.get()
    return choice[1] if choice is not None and choice[0] == op else _lookup(query)


@functools.lru_cache(maxsize=4096)
def _lookup(query: Query) -> TileConfig:
    table = load_table(query.op, nearest_table(query.op, query.arch))
    row = first_match(query, (*load_cache(query.op, query.arch), *table))
    if row is not None:
        return TileConfig(**row["tile"])
    return _heuristic(query.op, query.dtype, dict(query.shape))


def first_match(query: Query, rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of `rows` that speaks for the dtype and sizes of `query`."""
    sizes = dict(query.shape)
    for row in rows:
        if query.dtype in row["dtype"] and all(
            low <= sizes.get(name, -1) <= high for name, (low, high) in row.get("when", {}).items()
        ):
            return row
    return None


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
    """Where the tables of `op` lie; those of ``linear_backward`` beside linear's own."""
    folder = op.removesuffix("_backward")
    return Path(__file__).parent / folder / ("tuning" if op == folder else "tuning_backward")


@functools.cache
def load_table(op: str, arch: str | None) -> list[dict[str, Any]]:
    """The rows of one table: ``dtype`` names, ``when`` inclusive size ranges, ``tile`` sizes."""
    return json.loads((table_folder(op) / f"{arch}.json").read_text())["rows"] if arch else []


def cache_folder() -> Path:
    """Where fastvit keeps what it found out on this machine."""
    return Path(os.environ.get("FASTVIT_CACHE") or os.path.expanduser("~/.cache/fastvit"))


def cache_path(op: str, arch: str) -> Path:
    """Where `fastvit tune` keeps what it measured for `op` on this machine's `arch`."""
    return cache_folder() / "tuning" / op / f"{arch}.json"


@functools.cache
def load_cache(op: str, arch: str) -> list[dict[str, Any]]:
    """The rows that `fastvit tune` measured, as `load_table`; a file that does not hold such rows
    is ignored with a warning."""
    path = cache_path(op, arch)
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            _check_row(row)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        warnings.warn(f"fastvit ignores {path}: {problem}", RuntimeWarning, stacklevel=2)
        return []
    return rows


def _check_row(row: dict[str, Any]) -> None:
    """Raises one of the errors that `load_cache` catches for anything but a row of a table."""
    tile = TileConfig(**row["tile"])
    sizes = [tile.BLOCK_M, tile.BLOCK_N, tile.num_warps, tile.num_stages]
    ranges = row.get("when", {}).values()
    if not isinstance(row["dtype"], list) or not all(low <= high for low, high in ranges):
        raise ValueError(f"no row of a table: {row}")
    if min(sizes) < 1 or not isinstance(tile.backend, str):
        raise ValueError(f"no tile: {row['tile']}")


def reload() -> None:
    """Read tables and caches afresh, after `fastvit tune` has changed them."""
    for keeps in (_lookup, load_table, load_cache):
        keeps.cache_clear()
    forget()


def _heuristic(op: str, dtype: str, sizes: dict[str, int]) -> TileConfig:
    """Tiles that fit 64 KiB of shared memory, for a GPU that no table covers."""
    wide = dtype in ("float32", "float64")
    if op.startswith("attention"):
        return TileConfig(32, 16 if sizes["D"] > 128 or wide else 32, num_stages=1)
    if op.startswith("layer_norm"):
        return TileConfig(max(1, 2048 // sizes["D_POW2"]), 1)
    return TileConfig(64, 64, BLOCK_K=32)
