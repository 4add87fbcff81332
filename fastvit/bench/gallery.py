"""The report over all records: pictures and one page that needs no other file."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvit.bench import records, report

NO_GPU = "No record in {folder} was measured on a GPU, so no speed on a GPU is shown."
NO_MATPLOTLIB = "No pictures: matplotlib is not installed (pip install matplotlib)."
KINDS = {"model": "models", "train": "training", "op": "ops"}


def write(folder: Path, out: Path) -> tuple[list[Path], list[str]]:
    """Draw what was measured, as PNG files and ``index.html`` in `out`.

    Args:
        folder: searched for records, with the folders in it.
        out: made if it is not there.

    Returns:
        The files, and what a reader has to know.

    Raises:
        FileNotFoundError: there is no `folder`.
    """
    machines, passed_over = records.read(folder)
    notes = [f"Not drawn: {text}" for text in passed_over]
    if not any(record["device"] == "cuda" for record in machines):
        notes.insert(0, NO_GPU.format(folder=folder))
    if importlib.util.find_spec("matplotlib") is None:
        notes.insert(0, NO_MATPLOTLIB)
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    body = ["<h1>fastvit report</h1>", *map(report.html_note, notes)]
    for record in machines:
        name = records.machine(record)
        body += [f"<h2>{report.escape(name)}</h2>", report.html_note(report.conditions(record))]
        body += [report.html_note(note) for note in record["notes"]]
        if importlib.util.find_spec("matplotlib") is not None:
            for title, path in _pictures(record, out, re.sub(r"[^A-Za-z0-9.]+", "-", name)):
                paths.append(path)
                body += [f"<h3>{report.escape(title)}</h3>", report.html_picture(path, title)]
        body += report.html_results(record["results"])
        body += report.html_environment(record)
    page = out / "index.html"
    page.write_text(report.html_page("fastvit report", body), encoding="utf-8")
    return [*paths, page], notes


def _pictures(record: dict[str, Any], out: Path, stem: str) -> list[tuple[str, Path]]:
    """Titles and files of all there is to draw."""
    from fastvit.bench import figures

    drawn: list[tuple[str, Path]] = []

    def add(title: str, draw: Callable[[dict[str, Any], Path], bool], part: dict[str, Any]) -> None:
        path = out / f"{stem}_{title.split(maxsplit=1)[0]}.png"
        if draw(part, path):
            drawn.append((title, path))

    for kind, title in KINDS.items():
        part = [r for r in record["results"] if r["kind"] == kind and r["speedup"]]
        if part:
            add(f"{title} beside their peers", report.draw, record | {"results": part})
    add("latency against batch", figures.latency, record)
    add("roofline", figures.roofline, record)
    add("waterfall of techniques", figures.waterfall, record)
    return drawn
