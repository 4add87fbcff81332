"""Bench records on disk: what of them may be drawn, merged by machine.

A record is what `fastvit bench` and `benchmarks/gpu.py` write: ``environment``, ``device``,
``dtype``, ``seed``, ``notes``, ``roof`` and ``results``. A result has its numerics, its contenders'
times, and ``techniques``: of a contender, what is switched on, as a list. `waterfall` reads those.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read(folder: Path) -> tuple[list[Record], list[str]]:
    """Measured records below `folder`, one for each machine, GPUs first; and what was passed over.

    A machine's record has the newest result of each case. Dry runs, predictions and results
    without a measured time are never in it.

    Raises:
        FileNotFoundError: no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    machines: dict[str, list[Record]] = {}
    passed_over = []
    for path in sorted(folder.rglob("*.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            passed_over.append(f"{path}: {error}")
            continue
        obstacle = _obstacle(record)
        if obstacle is None:
            record = record | {"results": list(_timed(record)), "source": str(path)}
            machines.setdefault(machine(record), []).append(record)
        elif obstacle:
            passed_over.append(f"{path}: {obstacle}")
    merged = [_merge(records) for records in machines.values()]
    return sorted(merged, key=lambda record: record["device"] != "cuda"), passed_over


def machine(record: Record) -> str:
    """The GPU's or CPU's name, and torch's version."""
    environment = record["environment"]
    name = environment["gpu"] if record["device"] == "cuda" else environment["cpu"]
    return f"{name}, torch {environment['torch']}"


def _obstacle(record: Any) -> str | None:
    """Why nothing of it is drawn; empty for a file that is no bench record; None if it may be."""
    if not isinstance(record, dict) or not isinstance(record.get("results"), list):
        return ""
    environment = record.get("environment") or {}
    obstacles = {
        "a dry run": record.get("dry_run"),
        "a prediction": record.get("predicted"),
        "": not any(_timed(record)),
        "it does not say when it was measured": not environment.get("date"),
        "it does not say beside what roof it was measured": not record.get("roof"),
        "it does not say on what GPU it was measured": (
            record.get("device") == "cuda" and not environment.get("gpu")
        ),
    }
    return next((why for why, applies in obstacles.items() if applies), None)


def _timed(record: Record) -> Iterator[Record]:
    """Results with measured times, in today's form: earlier versions wrote fewer fields."""
    for result in record["results"]:
        contenders = result.get("contenders") or {}
        if not contenders or not all(timing.get("rounds") for timing in contenders.values()):
            continue
        fastest = contenders.get(result.get("fastest_peer"), {}).get("median")
        contenders = {
            name: {"speedup": fastest and fastest / timing["median"], **timing}
            for name, timing in contenders.items()
        }
        yield {"bounds": [], "techniques": {}, **result, "contenders": contenders}


def _merge(records: list[Record]) -> Record:
    """The newest record with the newest of every result."""
    records = sorted(records, key=lambda record: record["environment"]["date"])
    results = {
        tuple(result[key] for key in ("kind", "name", "case", "dtype")): result
        for record in records
        for result in record["results"]
    }
    used = [record for record in records if any(r in results.values() for r in record["results"])]
    sources = ", ".join(Path(record["source"]).name for record in used)
    notes = dict.fromkeys(note for record in used for note in record["notes"])
    return {
        **records[-1],
        "results": list(results.values()),
        "notes": [*notes, f"From {len(used)} record{'s' * (len(used) > 1)}: {sources}."],
    }


def waterfall(result: Record) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Steps that `techniques` of a result make, each with its contender.

    Returns:
        Cumulative steps, from the fewest techniques upwards, each naming what it adds, of equally
        many the fastest; and leave-one-out steps, each naming what it lacks of the last one, of
        which it has all else and nothing more.
    """
    known = {
        name: frozenset(techniques)
        for name, techniques in result["techniques"].items()
        if name in result["contenders"]
    }
    if not known:
        return [], []
    times = {name: result["contenders"][name]["median"] for name in known}
    ordered = sorted(known, key=lambda name: (len(known[name]), times[name]))
    chain = [ordered[0]]
    for name in ordered[1:]:
        if known[name] > known[chain[-1]]:
            chain.append(name)
    added = [
        (" + ".join(t for t in result["techniques"][name] if t not in known[before]), name)
        for before, name in itertools.pairwise(chain)
    ]
    full = known[chain[-1]]
    left_out = [
        (min(full - known[name]), name)
        for name in ordered
        if name not in chain and known[name] < full and len(full - known[name]) == 1
    ]
    return [(chain[0], chain[0]), *added], left_out
