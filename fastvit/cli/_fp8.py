"""The part of `fastvit numerics` on fp8: trained weights, real images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from fastvit.cli._shared import console, progress_bar

if TYPE_CHECKING:
    from fastvit.cli.numerics import Settings

SMALL: dict[str, Any] = {"data": "faces", "count": 200}  # a minute or two, emulated on a CPU
POLICY = (
    "DINOv2-S on a labelled set: mean of 1 - cosine of the features with float32's, and share of "
    "images that a linear probe gives the class that float32's features get"
)


def fp8_entry(settings: Settings) -> dict[str, Any]:
    """One entry of the certificate. What does not run does not pass."""
    from fastvit import ops
    from fastvit.check import fp8 as fp8_numerics

    gpu = settings.device == "cuda"
    options: dict[str, Any] = {"count": 1797} if gpu else SMALL
    if settings.depth is not None:
        options = options | {"depth": settings.depth}
    # on a CPU the emulation: what the interpreter gives, much faster
    backend = settings.backend if gpu else "torch"
    entry = {"study": "fp8", "dtype": "float8_e4m3fn", "emulated": backend == "torch"}
    with progress_bar() as bar, ops.backend(backend):
        task = bar.add_task("fp8", total=1)
        try:
            report = fp8_numerics.fp8_accuracy(device=settings.device, **options)
            entry |= dataclasses.asdict(report) | {"passed": report.passed}
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            entry |= {"passed": False, "error": message[:500]}
        bar.advance(task)
    return entry


def print_fp8(entry: dict[str, Any], settings: Settings) -> None:
    """The entry as a table."""
    out = console()
    if "error" in entry:
        out.print(Text(f"fp8 raised: {entry['error']}", "red"))
    else:
        verdict = Text("pass", "green") if entry["passed"] else Text("FAIL", "bold red")
        out.print(_table(entry), verdict)
    out.print(f"path: {settings.path}")


def _table(entry: dict[str, Any]) -> Table:
    how = "emulated" if entry["emulated"] else "on the GPU"
    data = f"{entry['data']}, {entry['classes']} classes"
    sizes = f"{entry['images']} images of {entry['img_size']} px, {entry['depth']} blocks"
    table = Table(title=f"fp8 {how} beside float32, {data}, {sizes} of DINOv2-S")
    for column in ("1 - cosine, mean", "worst", "bfloat16's mean", "same top-1", "accuracy",
                   "float32's"):  # fmt: skip
        table.add_column(column, justify="right")
    distances = ("mean_distance", "max_distance", "half_mean_distance")
    shares = ("agreement", "accuracy", "float32_accuracy")
    table.add_row(
        *(f"{entry[name]:.1e}" for name in distances), *(f"{entry[name]:.1%}" for name in shares)
    )
    return table
