"""The part of `fastvit numerics` on folded norms and fp8: trained weights, real images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from fastvit.cli._shared import console, progress_bar

if TYPE_CHECKING:
    from fastvit.cli.numerics import Settings

# what the interpreter, or e4m3 emulated on a CPU, does in a minute or two
SMALL_FOLDED: dict[str, Any] = {"depth": 2, "img_size": 70, "count": 4}
SMALL_FP8: dict[str, Any] = {"data": "faces", "count": 200}
POLICY = {
    "folded": "DINOv2-S on crops of photographs: the worst image's relative error of the features "
    "against float64 is at most allowed_ratio times that of eager PyTorch's worst image",
    "fp8": "DINOv2-S on a labelled set: mean of 1 - cosine of the features with float32's, and "
    "share of images that a linear probe gives the class that float32's features get",
}


def inference_entries(folded: bool, fp8: bool, settings: Settings) -> list[dict[str, Any]]:
    """One entry a dtype for `folded`, one for `fp8`. What does not run does not pass."""
    from fastvit import inference_numerics, ops

    gpu = settings.device == "cuda"
    if folded and settings.backend == "torch":
        raise typer.BadParameter("--folded: plain PyTorch folds no norms; use --path triton")
    common: dict[str, Any] = {"device": settings.device}
    chosen = {} if settings.depth is None else {"depth": settings.depth}
    jobs: list[tuple[dict[str, Any], str, Any]] = []
    for dtype in settings.dtypes if folded else ():
        options = common | ({} if gpu else SMALL_FOLDED) | chosen | {"dtype": dtype.torch}
        entry = {"study": "folded", "dtype": dtype.value}
        jobs.append(
            (entry, settings.backend, lambda o=options: inference_numerics.folded_tail(**o))
        )
    if fp8:
        options: dict[str, Any] = common | ({"count": 1797} if gpu else SMALL_FP8) | chosen
        # on a CPU the emulation: what the interpreter gives, much faster
        backend = settings.backend if gpu else "torch"
        entry = {"study": "fp8", "dtype": "float8_e4m3fn", "emulated": backend == "torch"}
        jobs.append((entry, backend, lambda: inference_numerics.fp8_accuracy(**options)))
    entries = []
    with progress_bar() as bar:
        task = bar.add_task("", total=len(jobs))
        for entry, backend, check in jobs:
            bar.update(task, description=f"{entry['study']} {entry['dtype']}")
            with ops.backend(backend):
                entries.append(entry | _completed(check))
            bar.advance(task)
    return entries


def _completed(check: Any) -> dict[str, Any]:
    try:
        report = check()
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return {"passed": False, "error": message[:500]}
    return {**dataclasses.asdict(report), "passed": report.passed}


def print_inference(entries: list[dict[str, Any]], settings: Settings) -> None:
    """A table for each kind of entry."""
    out = console()
    for entry in entries:
        verdict = Text("pass", "green") if entry["passed"] else Text("FAIL", "bold red")
        if "error" in entry:
            out.print(Text(f"{entry['study']} {entry['dtype']} raised: {entry['error']}", "red"))
        elif entry["study"] == "folded":
            out.print(_folded_table(entry), verdict)
        else:
            out.print(_fp8_table(entry), verdict)
    out.print(f"path: {settings.path}")


def _sizes(entry: dict[str, Any]) -> str:
    return (
        f"{entry['images']} images of {entry['img_size']} px, {entry['depth']} blocks of DINOv2-S"
    )


def _folded_table(entry: dict[str, Any]) -> Table:
    title = f"relative error of the features against float64, {entry['dtype']}, {_sizes(entry)}"
    table = Table(title=title)
    for column in ("form", "worst image", "median", "worst ratio to eager of an image"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in entry["rows"]:
        errors = (f"{row[name]:.2e}" for name in ("largest", "median"))
        table.add_row(row["form"], *errors, f"{row['worst_ratio']:.2f}")
    return table


def _fp8_table(entry: dict[str, Any]) -> Table:
    how = "emulated" if entry["emulated"] else "on the GPU"
    data = f"{entry['data']}, {entry['classes']} classes"
    table = Table(title=f"fp8 {how} beside float32, {data}, {_sizes(entry)}")
    for column in ("1 - cosine, mean", "worst", "bfloat16's mean", "same top-1", "accuracy",
                   "float32's"):  # fmt: skip
        table.add_column(column, justify="right")
    distances = ("mean_distance", "max_distance", "half_mean_distance")
    shares = ("agreement", "accuracy", "float32_accuracy")
    table.add_row(
        *(f"{entry[name]:.1e}" for name in distances), *(f"{entry[name]:.1%}" for name in shares)
    )
    return table
