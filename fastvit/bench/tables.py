"""Tuning tables from what was measured: rows, merging, files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit.kernels import _tuning
from fastvit.kernels._tuning import Query, TileConfig

Row = dict[str, Any]  # "dtype", "when", "tile"
Found = Sequence[tuple[Query, TileConfig]]

_ALWAYS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
_THE_REST = "; the rest: "  # in the source of a table that was measured in part


def measured_rows(found: Found, stretch: Mapping[str, float]) -> list[Row]:
    """A row for each tile and its sizes, the narrowest ranges first.

    Args:
        found: queries of one op, and the tile for each.
        stretch: sizes that hold in a neighbourhood of this factor, which ends half-way (in the
            geometric mean) to the next one measured. All others hold as they are.
    """
    rows: list[Row] = []
    for query, tile in found:
        when = {name: _reach(found, query, name, stretch) for name, _ in query.shape}
        row: Row = {"dtype": [query.dtype], "when": when, "tile": tile_fields(tile)}
        twin = next((r for r in rows if r["when"] == when and r["tile"] == row["tile"]), None)
        if twin is None:
            rows.append(row)
        else:
            twin["dtype"].append(query.dtype)
    return sorted(rows, key=lambda r: math.prod(high / low for low, high in r["when"].values()))


def _reach(found: Found, query: Query, name: str, stretch: Mapping[str, float]) -> list[int]:
    """[low, high] of one size."""
    size, factor = dict(query.shape)[name], stretch.get(name, 1.0)
    low, high = math.ceil(size / factor), math.floor(size * factor)
    for other, _ in found:
        if other.dtype == query.dtype and _exact(other, stretch) == _exact(query, stretch):
            rival = dict(other.shape)[name]
            middle = math.isqrt(size * rival)
            low = max(low, middle + 1) if rival < size else low
            high = min(high, middle) if rival > size else high
    return [low, high]


def _exact(query: Query, stretch: Mapping[str, float]) -> dict[str, int]:
    return {name: size for name, size in query.shape if name not in stretch}


def tile_fields(tile: TileConfig) -> dict[str, Any]:
    """As a table has it: the fields that are not at their defaults, and the common ones."""
    return {
        field.name: getattr(tile, field.name)
        for field in dataclasses.fields(tile)
        if field.name in _ALWAYS or getattr(tile, field.name) != field.default
    }


def merged(new: Sequence[Row], old: Sequence[Row]) -> list[Row]:
    """`new` before those of `old` that say something about other sizes or dtypes."""
    rows = list(new)
    for row in old:
        hidden = {
            name for r in new if _covers(r["when"], row.get("when", {})) for name in r["dtype"]
        }
        dtypes = [name for name in row["dtype"] if name not in hidden]
        if dtypes:
            rows.append({**row, "dtype": dtypes})
    return rows


def _covers(new: Mapping[str, Sequence[int]], old: Mapping[str, Sequence[int]]) -> bool:
    return all(
        name in old and low <= old[name][0] and old[name][1] <= high
        for name, (low, high) in new.items()
    )


def merged_source(environment: Mapping[str, Any], old: str | None) -> str:
    """What a table says of its origin: GPU, date and versions of the measurement, then what the
    table said before, without earlier measurements on that GPU."""
    by = f"measured by fastvit tune on {environment['gpu'] or environment['cpu']}"
    versions = f"torch {environment['torch']}, triton {environment['triton']}"
    parts = [f"{by}, {environment['date'][:10]}, {versions}"]
    parts += [part for part in (old or "").split(_THE_REST) if part and not part.startswith(by)]
    return _THE_REST.join(parts)


@dataclass(frozen=True)
class Table:
    """One file as it was before a search, to which `add` adds what the search has found so far."""

    path: Path
    source: str | None
    rows: list[Row]

    @classmethod
    def open(cls, op: str, arch: str, *, checked_in: bool) -> Table:
        """The package's table, or this machine's cache. An architecture without a table starts from
        the one that it has used till now; a broken cache is given up."""
        if not checked_in:
            path, rows = _tuning.cache_path(op, arch), _tuning.load_cache(op, arch)
            return cls(path, _source(path) if rows else None, rows)
        folder, nearest = _tuning.table_folder(op), _tuning.nearest_table(op, arch)
        source = None if nearest is None else _source(folder / f"{nearest}.json")
        return cls(folder / f"{arch}.json", source, _tuning.load_table(op, nearest))

    def add(
        self, found: Found, stretch: Mapping[str, float], environment: Mapping[str, Any]
    ) -> None:
        """Write the file, and let `lookup` see it."""
        source = merged_source(environment, self.source)
        write_file(self.path, dumps(source, merged(measured_rows(found, stretch), self.rows)))
        _tuning.reload()


def _source(path: Path) -> str:
    return json.loads(path.read_text())["source"]


def write_file(path: Path, text: str) -> None:
    """All of it or nothing, should the process be stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def dumps(source: str, rows: Sequence[Row]) -> str:
    """A table as JSON, a row a line."""
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    return f'{{\n  "source": {json.dumps(source)},\n  "rows": [\n{lines}\n  ]\n}}\n'
