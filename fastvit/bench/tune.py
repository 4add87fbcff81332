"""Measure tiles on this GPU, and keep the fastest for `kernels/_tuning.py` to look up.

For each shape of the benchmarks a search in steps: the first tries tile sizes, each later one other
fields of the fastest so far. A candidate that does not compile, does not fit the card or does not
pass the numerics policy is dropped. What is done is written after every case, so that a search may
be stopped at any time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit import numerics, ops
from fastvit.bench import timing
from fastvit.bench.tables import Table, tile_fields, write_file
from fastvit.bench.tiles import SPACES, Space, candidates, canonical, fits, label
from fastvit.check.environment import environment
from fastvit.kernels import _backend, _device, _tuning
from fastvit.kernels import specs as op_specs
from fastvit.kernels._spec import Case, OpSpec
from fastvit.kernels._tuning import Query, TileConfig

Measure = Callable[..., dict[str, timing.Timing]]  # as timing.interleaved

HALF = (torch.bfloat16, torch.float16)
BEAM = 3  # tiles that a step goes on from
FINALISTS = 5
NOISE = 0.02  # by how much, of its time, a tile has to beat the present one
MAX_WORKERS = 16  # threads that compile
# of an H200 in bfloat16: how a case that computes ranks with one that moves bytes
FLOPS_PER_BYTE = 180
# those not of their own folder
_TABLES = {"fp8_linear": "linear", "fp8_layer_norm": "layer_norm", "fp8_attention": "attention"}


# --------------------------------------------------------------------------- one case


@dataclass
class Tuned:
    """One case: the present tile, the tile to take, and what became of the others."""

    spec: str
    case: str
    query: Query
    present: TileConfig
    tile: TileConfig | None = None  # None: nothing was measured, `note` says why
    times: dict[TileConfig, timing.Timing] = field(default_factory=dict)
    dropped: dict[TileConfig, str] = field(default_factory=dict)
    note: str = ""

    @property
    def gain(self) -> float | None:
        """The present tile's time over that of the tile to take."""
        if self.tile is None or self.present not in self.times:
            return None
        return self.times[self.present].median / self.times[self.tile].median

    def fastest(self, count: int) -> list[TileConfig]:
        """The tiles of least median."""
        return sorted(self.times, key=lambda tile: self.times[tile].median)[:count]

    def as_json(self) -> dict[str, Any]:
        """For a record; times in seconds, of the ten fastest and the present tile."""
        shown = self.fastest(10)
        if self.present in self.times:
            shown = list(dict.fromkeys((*shown, self.present)))
        return {
            "op": self.spec,
            "case": self.case,
            "table": self.query.op,
            "arch": self.query.arch,
            "dtype": self.query.dtype,
            "shape": dict(self.query.shape),
            "present": label(self.present),
            "chosen": None if self.tile is None else label(self.tile),
            "tile": None if self.tile is None else tile_fields(self.tile),
            "gain": self.gain,
            "times": {label(t): dataclasses.asdict(self.times[t]) for t in shown},
            "measured": len(self.times),
            "dropped": {label(tile): reason for tile, reason in self.dropped.items()},
            "note": self.note,
        }


class _Search:
    """Compiles, checks and times the tiles of one case."""

    def __init__(
        self, spec: OpSpec, case: Case, tuned: Tuned, *, device: torch.device, deadline: float,
        seed: int, measure: Measure, workers: int,
    ) -> None:  # fmt: skip
        self.spec, self.tuned = spec, tuned
        self.device, self.deadline, self.measure = device, deadline, measure
        self.workers = workers
        dtype = getattr(torch, tuned.query.dtype)
        self.inputs, self.others = (
            spec.inputs(case, dtype, str(device), seed + i) for i in range(2)
        )
        self.reference = _once(spec.reference)

    def run(self, tile: TileConfig, inputs: Mapping[str, Any]) -> Tensor:
        with torch.no_grad(), _tuning.forced(self.tuned.query.op, tile):
            return self.spec.op(**inputs)

    def try_out(self, tiles: Sequence[TileConfig], *, budget_s: float, min_rounds: int) -> None:
        """Time those of `tiles` that work, all in one race."""
        times, dropped = self.tuned.times, self.tuned.dropped
        new = [tile for tile in tiles if tile not in times and tile not in dropped]
        self._compile(new)
        ready = [tile for tile in tiles if tile not in dropped and self._passes(tile)]
        works = {label(tile): functools.partial(self.run, tile, self.inputs) for tile in ready}
        if works:
            measured = self.measure(
                works, budget_s=budget_s, min_rounds=min_rounds, device=self.device, cold=True
            )
            times.update({tile: measured[label(tile)] for tile in ready})

    def _compile(self, tiles: Sequence[TileConfig]) -> None:
        """First calls, in threads, since most of a compilation runs outside of Python."""

        def first_call(tile: TileConfig) -> None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a thread starts on the first GPU
            self.run(tile, self.inputs)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        pool = ThreadPoolExecutor(self.workers)
        calls = {pool.submit(first_call, tile): tile for tile in tiles}
        done, late = wait(calls, timeout=max(0.0, self.deadline - time.monotonic()))
        pool.shutdown(wait=False, cancel_futures=True)
        for call in done:
            error = call.exception()
            if error is not None:
                self.tuned.dropped[calls[call]] = timing.reason(error)  # pyright: ignore
        for call in late:
            self.tuned.dropped[calls[call]] = "the time was over"

    def _passes(self, tile: TileConfig) -> bool:
        """Whether the numerics policy holds; looked at once."""
        if tile in self.tuned.times:
            return True
        report = numerics.compare(functools.partial(self._call, tile), self.reference, self.inputs)
        if not report.passed:
            self.tuned.dropped[tile] = f"numerics: {report}"
        return report.passed

    def _call(self, tile: TileConfig, **inputs: Any) -> Tensor:
        return self.run(tile, inputs)

    def holds_again(self, tile: TileConfig) -> bool:
        """Whether it passes on other inputs too, twice with the same bits."""
        report = numerics.compare(
            functools.partial(self._call, tile), self.spec.reference, self.others
        )
        first, second = (self.run(tile, self.others) for _ in range(2))
        same = torch.equal(first, second)
        if not (report.passed and same):
            del self.tuned.times[tile]
            why = f"numerics: {report}" if same else "two runs gave different bits"
            self.tuned.dropped[tile] = f"on other inputs, {why}"
        return report.passed and same


def _once(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`reference` with its result for each dtype kept: all calls are for the same inputs."""
    results: dict[torch.dtype, Tensor] = {}

    def call(**inputs: Any) -> Tensor:
        dtype = next(
            value.dtype
            for value in inputs.values()
            if isinstance(value, Tensor) and value.is_floating_point()
        )
        if dtype not in results:
            results[dtype] = reference(**inputs)
        return results[dtype]

    return call


def _search(search: _Search, space: Space, relatives: Sequence[TileConfig], shared: int) -> None:
    """Fill in `search.tuned`. `relatives` are what was fastest in the other half dtype: then only
    they are tried."""
    tuned, present = search.tuned, search.tuned.present
    if relatives:
        search.try_out(list(dict.fromkeys((present, *relatives))), budget_s=0.3, min_rounds=5)
    else:
        tiles = [space.start if fits(tuned.query, space.start, shared) else present]
        for step in space.steps:
            tiles = list(dict.fromkeys((present, *candidates(tuned.query, tiles, step, shared))))
            search.try_out(tiles, budget_s=0.3, min_rounds=5)
            tiles = tuned.fastest(BEAM)
            if time.monotonic() > search.deadline:
                break
    final = [t for t in dict.fromkeys((*tuned.fastest(FINALISTS), present)) if t in tuned.times]
    search.try_out(final, budget_s=1.0, min_rounds=20)
    for tile in sorted(final, key=lambda tile: tuned.times[tile].median):
        best = tuned.times[tile].median
        stays = present in tuned.times and best > (1 - NOISE) * tuned.times[present].median
        choice = present if stays else tile
        if search.holds_again(choice):
            tuned.tile = choice
            return
    tuned.note = "no tile works"


# --------------------------------------------------------------------------- all of it


def tune(
    names: Sequence[str] | None = None,
    *,
    minutes: float = 10.0,
    dtypes: Sequence[torch.dtype] = HALF,
    write: bool = False,
    out: Path | None = None,
    device: torch.device | None = None,
    seed: int = 0,
    measure: Measure = timing.interleaved,
    progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> dict[str, Any]:
    """Search tiles for the shapes of the benchmarks, the most work first, and keep the fastest.

    Args:
        names: ops of `specs.all_specs`; all that have tiles by default.
        minutes: no case begins and no compilation is waited for after them.
        dtypes: in this order; of the second half dtype only what is fastest in the first.
        write: into the package's tables; else into this machine's cache.
        out: a file for the record as JSON, rewritten after every case.
        device: this process's GPU by default. Another device is taken as it is (tests).
        seed: of the inputs.
        measure: as `timing.interleaved`.
        progress: told what is next, how many cases are done, and of how many.

    Returns:
        The record: environment, results, cases that the time did not suffice for, files written.

    Raises:
        ValueError: a name of no op that has tiles.
        RuntimeError: Triton does not run on a GPU of this machine.
    """
    deadline = time.monotonic() + 60 * minutes
    specs = _tunable(names)
    if device is None:
        problem = _backend.gpu_problem()
        if problem is not None:
            raise RuntimeError(f"fastvit tune needs a GPU: {problem}")
        device = torch.device("cuda", torch.cuda.current_device())
    jobs = _jobs(specs, dtypes)
    record: dict[str, Any] = {
        "environment": environment(), "seed": seed, "minutes": minutes,
        "results": [], "left_out": [], "written": [],
    }  # fmt: skip
    tuned: list[Tuned] = []
    files: dict[str, Table] = {}  # by op
    with ops.backend("triton"):  # no silent way around a tile that does not work
        for done, (spec, case, dtype) in enumerate(jobs):
            name = f"{spec.name}, {case.name}, {str(dtype).removeprefix('torch.')}"
            if time.monotonic() > deadline:
                record["left_out"].append(name)
                continue
            progress(name, done, len(jobs))
            result = _tune_case(
                spec, case, dtype, tuned, device=device, deadline=deadline, seed=seed,
                measure=measure,
            )  # fmt: skip
            if result is None:
                continue
            tuned.append(result)
            record["results"].append(result.as_json())
            if result.tile is not None:
                op, arch = result.query.op, result.query.arch
                if op not in files:
                    files[op] = Table.open(op, arch, checked_in=write)
                    record["written"].append(str(files[op].path))
                found = [(t.query, t.tile) for t in tuned if t.query.op == op and t.tile]
                files[op].add(found, SPACES[op].stretch, record["environment"])
            _save(record, out)
    progress("", len(jobs), len(jobs))
    _save(record, out)
    return record


def _save(record: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        write_file(out, json.dumps(record, indent=2))


def table_of(spec: OpSpec) -> str:
    """The folder under `kernels/` whose tables `spec` reads."""
    return _TABLES.get(spec.name, spec.op.__module__.split(".")[2])


def _tunable(names: Sequence[str] | None) -> list[OpSpec]:
    specs = {name: spec for name, spec in op_specs.all_specs().items() if table_of(spec) in SPACES}
    for name in names or ():
        if name not in specs:
            raise ValueError(f"no op {name!r} has tiles to tune; {', '.join(specs)} have")
    return [spec for name, spec in specs.items() if not names or name in names]


def _jobs(
    specs: Sequence[OpSpec], dtypes: Sequence[torch.dtype]
) -> list[tuple[OpSpec, Case, torch.dtype]]:
    """Cases in the order of their worth: the time that they take at best, all in one dtype before
    the next."""

    def worth(job: tuple[OpSpec, Case]) -> float:
        spec, case = job
        return max(spec.flops(case.sizes), FLOPS_PER_BYTE * spec.bytes(case.sizes, 2))

    cases = [(spec, case) for spec in specs for case in spec.bench_cases]
    cases.sort(key=worth, reverse=True)
    return [(spec, case, dtype) for dtype in dtypes for spec, case in cases]


def _tune_case(
    spec: OpSpec, case: Case, dtype: torch.dtype, before: Sequence[Tuned], *,
    device: torch.device, deadline: float, seed: int, measure: Measure,
) -> Tuned | None:  # fmt: skip
    """None where an earlier case asked the tables for the same."""
    space = SPACES[table_of(spec)]
    with torch.no_grad(), _tuning.observed() as queries:
        try:
            spec.op(**spec.inputs(case, dtype, str(device), seed))
        except Exception:  # the present tile may not work here
            if not queries:
                raise
    (query,) = set(queries)
    if any(query == other.query for other in before):
        return None
    present = _tuning.lookup(query.op, query.arch, getattr(torch, query.dtype), **dict(query.shape))
    result = Tuned(spec.name, case.name, query, canonical(present))
    relatives = [
        tile
        for other in before
        if other.query._replace(dtype=query.dtype) == query
        and {dtype, getattr(torch, other.query.dtype)} <= {*HALF}
        for tile in other.fastest(BEAM)
    ]
    interpreted = _backend.current_path() == "interpret"  # which knows one thread
    workers = 1 if interpreted else min(MAX_WORKERS, os.cpu_count() or 1)
    try:
        search = _Search(
            spec, case, result, device=device, deadline=deadline, seed=seed, measure=measure,
            workers=workers,
        )  # fmt: skip
        _search(search, space, relatives, shared_memory(query.arch, device))
    except Exception as error:  # of the GPU or its memory: the next case shows which
        result.note = timing.reason(error)
    return result


def shared_memory(arch: str, device: torch.device) -> int:
    """Bytes that a block may use."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        limit = getattr(properties, "shared_memory_per_block_optin", None)
        if limit is not None:
            return limit
    return _device.SHARED_MEMORY.get(arch, 2**16)
