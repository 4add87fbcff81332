"""`fastvit report`: pictures of what was measured, or the floor by arithmetic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from fastvit.cli._shared import console, errors, print_json, progress_bar

Gpu = Literal["h200", "a100", "h100", "b200", "mi300x"]


def report(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Searched for records.")] = Path(
        "benchmarks/results"
    ),
    *,
    out: Annotated[Path, typer.Option(help="Folder for PNG files and index.html.")] = Path(
        "fastvit-report"
    ),
    floor: Annotated[
        bool, typer.Option("--floor", help="Instead: the least time by arithmetic; no records.")
    ] = False,
    model: Annotated[str, typer.Option(help="With --floor: one of `fastvit list`.")] = (
        "vit_base_patch16_224"
    ),
    batch: Annotated[int, typer.Option(min=1, help="With --floor: images in a batch.")] = 256,
    gpu: Annotated[Gpu, typer.Option(help="With --floor: whose peak rates.")] = "h200",
    tflops: Annotated[
        float | None, typer.Option(min=1e-3, help="With --floor: this compute rate instead.")
    ] = None,
    tbytes: Annotated[
        float | None, typer.Option(min=1e-3, help="With --floor: this bandwidth, TB/s, instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Draw measured records: bars beside peers, latency, roofline, waterfall; PNG and one page."""
    if floor:
        _floor(model, batch, gpu, tflops, tbytes, as_json)
        return
    from fastvit.bench import gallery

    with errors("report"), progress_bar() as bar:
        bar.add_task("drawing", total=None)
        paths, notes = gallery.write(folder, out)
    if as_json:
        print_json({"files": [str(path) for path in paths], "notes": notes})
        return
    for note in notes:
        console().print(note, soft_wrap=True, highlight=False)
    console().print("wrote " + ", ".join(str(path) for path in paths), soft_wrap=True)


def _floor(
    model: str, batch: int, gpu: Gpu, tflops: float | None, tbytes: float | None, as_json: bool
) -> None:
    from fastvit.bench.floor import GPUS, layers

    peak = GPUS[gpu]
    if tflops or tbytes:
        peak = dataclasses.replace(
            peak,
            flops=1e12 * tflops if tflops else peak.flops,
            bandwidth=1e12 * tbytes if tbytes else peak.bandwidth,
            source=f"as given; else {peak.source}",
        )
    try:
        table = layers(model, batch)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    total = sum(layer.seconds(peak) for layer in table)
    rows = [
        {**dataclasses.asdict(layer), "floor_s": layer.seconds(peak), "bound": layer.bound(peak)}
        for layer in table
    ]
    record = {
        "predicted": True,
        "model": model,
        "batch": batch,
        "peak": dataclasses.asdict(peak),
        "layers": rows,
        "floor_s": total,
        "images_per_s": batch / total,
    }
    if as_json:
        print_json(record)
    else:
        _print_floor(record)


def _print_floor(record: dict[str, Any]) -> None:
    peak, rows = record["peak"], record["layers"]
    table = Table(
        title=f"{record['model']}, batch {record['batch']}: arithmetic, not a measurement"
    )
    table.add_column("layer")
    for header in ("times", "GFLOP", "MB", "floor, us", "bound by"):
        table.add_column(header, justify="right")
    for row in rows:
        size = f"{row['bytes'] / 1e6:,.1f}"
        floor = f"{row['floor_s'] * 1e6:,.1f}"
        gflop = f"{row['flops'] / 1e9:,.2f}"
        table.add_row(row["name"], str(row["count"]), gflop, size, floor, row["bound"])
    table.add_section()
    flops, size = (sum(row[key] for row in rows) for key in ("flops", "bytes"))
    total = f"{record['floor_s'] * 1e6:,.1f}"
    table.add_row("all layers", "", f"{flops / 1e9:,.2f}", f"{size / 1e6:,.1f}", total, "")
    out = console()
    out.print(table)
    out.print(
        f"no more than {record['images_per_s']:,.0f} images/s on one {peak['gpu']}, at "
        f"{peak['flops'] / 1e12:g} TFLOP/s dense bfloat16 and {peak['bandwidth'] / 1e12:g} TB/s "
        f"({peak['source']}). Bytes: each operand read once, each result written once, 2 bytes a "
        "value. Launches cost nothing here.",
        highlight=False,
    )
