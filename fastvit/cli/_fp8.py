"""The part of `fastvit numerics` on fp8: trained weights, real images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from fastvit.cli._shared import console, progress_bar

if TYPE_CHECKING:
    from fastvit.cli.numerics import Settings

# of DINOv2-S; emulated on a CPU half a minute of one core
SMALL: tuple[dict[str, Any], ...] = ({"data": "photographs", "count": 60},)
WHOLE: tuple[dict[str, Any], ...] = (
    {"data": "photographs", "count": 200}, {"data": "digits", "count": 1797},
)  # fmt: skip
POLICY = (
    "a ViT trained on digits, and DINOv2-S on a labelled set: mean of 1 - cosine of the features "
    "with float32's, and share of images that float32's head, or a linear probe, gives the class "
    "that float32's features get"
)
COLUMNS = ("model, images", "1 - cosine, mean", "worst", "bfloat16's mean", "same top-1",
           "accuracy", "float32's", "")  # fmt: skip


def fp8_entries(settings: Settings) -> list[dict[str, Any]]:
    """The entries of the certificate, one a study. What does not run does not pass."""
    from fastvit import ops
    from fastvit.check import fp8 as fp8_numerics

    gpu = settings.device == "cuda"
    depth = {} if settings.depth is None else {"depth": settings.depth}
    # on a CPU the emulation: what the interpreter gives, much faster
    backend = settings.backend if gpu else "torch"
    studies: list[Callable[..., fp8_numerics.Fp8Report]] = [fp8_numerics.fp8_digits]
    studies += [
        functools.partial(fp8_numerics.fp8_accuracy, **options, **depth)
        for options in (WHOLE if gpu else SMALL)
    ]
    entries = []
    with progress_bar() as bar, ops.backend(backend):
        task = bar.add_task("fp8", total=len(studies))
        for study in studies:
            entry = {"study": "fp8", "dtype": "float8_e4m3fn", "emulated": backend == "torch"}
            try:
                report = study(device=settings.device)
                entry |= dataclasses.asdict(report) | {"passed": report.passed}
            except Exception as error:
                message = " ".join(f"{type(error).__name__}: {error}".split())
                entry |= {"passed": False, "error": message[:500]}
            entries.append(entry)
            bar.advance(task)
    return entries


def print_fp8(entries: list[dict[str, Any]], settings: Settings) -> None:
    """The entries as a table."""
    out = console()
    how = "emulated" if entries[0]["emulated"] else "on the GPU"
    table = Table(title=f"fp8 {how} beside float32")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left")
    for entry in entries:
        if "error" in entry:
            out.print(Text(f"fp8 raised: {entry['error']}", "red"))
        else:
            table.add_row(*_cells(entry))
    out.print(table)
    out.print(f"path: {settings.path}")


def _cells(entry: dict[str, Any]) -> list[str | Text]:
    sizes = f"{entry['images']} of {entry['img_size']} px, {entry['classes']} classes"
    distances = ("mean_distance", "max_distance", "half_mean_distance")
    shares = ("agreement", "accuracy", "float32_accuracy")
    return [
        f"{entry['model']}, {entry['depth']} blocks; {entry['data']}, {sizes}",
        *(f"{entry[name]:.1e}" for name in distances),
        *(f"{entry[name]:.1%}" for name in shares),
        Text("pass", "green") if entry["passed"] else Text("FAIL", "bold red"),
    ]
