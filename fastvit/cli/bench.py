"""`fastvit bench`: speed beside peers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from rich.table import Table
from rich.text import Text

from fastvit.cli._shared import Dtype, console, finite, print_json, progress_bar

if TYPE_CHECKING:
    from fastvit.bench.report import Result

OP_BUDGET, MODEL_BUDGET = (2.0, 0.4), (15.0, 4.0)  # seconds of timing a case: full, quick
ANY_MODEL = "vit_base_patch16_224"
Job = tuple[str, Callable[[], "Result"]]


def bench(
    what: Annotated[
        Literal["all", "ops", "models", "train", "host"],
        typer.Argument(
            help="ops, models (inference), train (a training step), host (what a forward costs it, "
            "with nothing computed); all: ops, models."
        ),
    ] = "all",
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="As --model.")
    ] = None,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Small cases, about a minute.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for JSON, PNG and HTML.")] = Path(
        "fastvit-bench"
    ),
    model: Annotated[list[str] | None, typer.Option(help="A timm model; repeatable.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images in a batch, of models; repeatable.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="bfloat16 on a GPU, float32 on a CPU by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the inputs; fresh by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Time fastvit beside eager PyTorch, torch.compile, timm, transformers and torchvision:
    interleaved, in one run.

    What fails the numerics is not timed, and makes the exit status 1.
    """
    from fastvit.bench import report, timing
    from fastvit.check.environment import environment

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and (device.type == "cuda" or what == "host"):
        raise typer.BadParameter("unset TRITON_INTERPRET: interpreted kernels have no speed")
    model = [*(names or ()), *(model or ())]
    if what == "host":
        _host(model or [ANY_MODEL], batch or [1], as_json=as_json)
        return
    dtype = dtype or (Dtype.bfloat16 if device.type == "cuda" else Dtype.float32)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    common = {"dtype": dtype.torch, "device": device, "seed": seed}
    notes = report.notes(device)
    jobs: list[Job] = []
    if what in ("all", "ops"):
        jobs, left_out = _op_jobs(common, quick=quick)
        notes += left_out
    if what != "ops":
        kind = "train" if what == "train" else "model"
        jobs += _model_jobs(kind, model, batch, common, quick=quick)
    with progress_bar() as bar:
        task = bar.add_task("measuring the roof", total=len(jobs))
        roof = timing.roof(device, dtype.torch)
        results = []
        for name, job in jobs:
            bar.update(task, description=name)
            results.append(report.as_json(job(), roof))
            bar.advance(task)
    record = finite(
        {
            "environment": environment(),
            "device": device.type,
            "dtype": dtype.value,
            "seed": seed,
            "quick": quick,
            "notes": notes,
            "roof": roof,
            "results": results,
        }
    )
    paths = report.write(record, out)
    if as_json:
        print_json(record)
    else:
        _print(record, paths)
    raise typer.Exit(0 if all(result["numerics"]["passed"] for result in results) else 1)


def _host(names: list[str], batches: list[int], *, as_json: bool) -> None:
    from fastvit.cli.numerics import check_timm_model

    for name in names:  # before what needs timm is imported
        check_timm_model(name)
    from fastvit.bench.host import host_cost

    pairs = [(name, batch) for name in names for batch in batches]
    with progress_bar() as bar:
        found = [
            {"model": name, "batch": batch, **host_cost(name, batch)}
            for name, batch in bar.track(pairs, description="calling")
        ]
    if as_json:
        print_json(found[0] if len(found) == 1 else found)
        return
    table = Table("model, batch", "whose", title="a forward's cost to the host, nothing computed")
    columns = {"calls": "Python calls", "launches": "launches", "us": "us", "gpu_us": "us on a GPU"}
    for header in columns.values():
        table.add_column(header, justify="right")
    for row in found:
        table.add_section()
        for whose, library in (("ours", "fastvit"), ("theirs", "timm")):
            costs = [row[whose].get(key) for key in columns]
            cells = ("" if cost is None else f"{cost:,.0f}" for cost in costs)
            table.add_row(f"{row['model']}, {row['batch']}", library, *cells)
    console().print(table)


def _op_jobs(common: dict[str, Any], *, quick: bool) -> tuple[list[Job], list[str]]:
    """Jobs, and a note of what is left out."""
    from fastvit.bench import ops

    cases, left_out = ops.plan(common["device"], quick=quick)
    jobs = [
        (
            f"{spec.name} {case.name}",
            partial(ops.bench_op, spec, case, budget_s=OP_BUDGET[quick], **common),
        )
        for spec, case in cases
    ]
    return jobs, [left_out] if left_out else []


def _model_jobs(
    kind: Literal["model", "train"],
    names: list[str] | None,
    batches: list[int] | None,
    common: dict[str, Any],
    *,
    quick: bool,
) -> list[Job]:
    from fastvit.cli.numerics import check_timm_model

    for name in names or (ANY_MODEL,):  # before what needs timm is imported
        check_timm_model(name)
    from fastvit.bench import models

    device = common["device"]
    return [
        (
            f"{kind} {name} batch {batch}",
            partial(
                models.bench_model,
                kind,
                name,
                batch,
                level="few" if quick else "all",
                budget_s=MODEL_BUDGET[quick],
                **common,
            ),
        )
        for name in names or models.default_models(device, quick=quick)
        for batch in batches or models.default_batches(device, quick=quick)
    ]


def _print(record: dict[str, Any], paths: list[Path]) -> None:
    from fastvit.bench import report, timing

    table = Table(
        "contender", title="time of a call, interleaved; vs peer: speed over the fastest peer's"
    )
    for header in ("median", "p10 to p90", "rate", "roof", "vs peer"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in record["results"]:
        table.add_section()
        table.add_row(Text(report.title(result), "bold"))
        for row in report.rows(result):
            table.add_row(*row, style="green" if timing.is_ours(row[0]) else None)
        for remark in report.remarks(result):
            table.add_row(Text(remark, "yellow"))
    out = console()
    out.print(table)
    roof = record["roof"]
    out.print(
        f"roof: {report.flops_rate(roof['matmul_flops_per_s'])} in a {roof['matmul_side']}^3 "
        f"matmul, {roof['copy_bytes_per_s'] / 1e9:.3g} GB/s in a copy"
        + (f", {report.seconds(roof['launch_s'])} in an empty launch" if "launch_s" in roof else "")
    )
    out.print(report.conditions(record))
    for note in record["notes"]:
        out.print(note)
    out.print("wrote " + ", ".join(str(path) for path in paths), soft_wrap=True)
