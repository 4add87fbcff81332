"""`fastvit tune`: measure tiles on this GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fastvit.cli._shared import Dtype, console, finite, print_json, progress_bar


def tune(
    *,
    op: Annotated[list[str] | None, typer.Option(help="An op; repeatable. All by default.")] = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="Repeatable. bfloat16 and float16 by default.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Stop after so many.")] = 10.0,
    write: Annotated[
        bool, typer.Option("--write", help="Into the package's tables, not the cache.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="A file for the record, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Measure the tiles of every kernel on this GPU and use the fastest from now on.

    The winners go to a cache of this machine (FASTVIT_CACHE, else ~/.cache/fastvit) that every
    process reads before the package's tables. Slowest shapes first; results so far are kept.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("unset TRITON_INTERPRET: interpreted kernels have no speed")
    from fastvit.bench import tune as tuning
    from fastvit.kernels._backend import gpu_problem

    problem = gpu_problem()
    if problem is not None:
        typer.echo(f"fastvit tune needs a GPU: {problem}", err=True)
        raise typer.Exit(1)
    dtypes = [each.torch for each in dtype] if dtype else tuning.HALF
    with progress_bar() as bar:
        task = bar.add_task("", total=None)
        try:
            record = tuning.tune(
                op, minutes=minutes, dtypes=dtypes, write=write, out=out,
                progress=lambda text, done, total: bar.update(
                    task, description=text, completed=done, total=total
                ),
            )  # fmt: skip
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    if as_json:
        print_json(record)
    else:
        _print(finite(record))


def _print(record: dict[str, Any]) -> None:
    table = Table("case", title=f"tiles on {record['environment']['gpu']}")
    for header in ("present", "us", "fastest", "us", "gain", "tried", "dropped"):
        table.add_column(header, justify="right", no_wrap=header not in ("present", "fastest"))
    for result in record["results"]:
        case = f"{result['op']}, {result['case']}, {result['dtype']}"
        counts = (str(result["measured"]), str(len(result["dropped"])))
        present, chosen = result["present"], result["chosen"]
        times = result["times"]
        if chosen is None:
            table.add_row(case, present, "", Text(result["note"], "yellow"), "", "", *counts)
            continue
        gain = result["gain"]
        table.add_row(
            case, present, _us(times.get(present)), chosen, _us(times[chosen]),
            "" if gain is None else f"{gain:.2f}x", *counts,
            style="green" if gain is None or gain > 1 else None,
        )  # fmt: skip
    out = console()
    out.print(table)
    if record["left_out"]:
        out.print(f"no time for {len(record['left_out'])} more: {'; '.join(record['left_out'])}")
    for path in record["written"]:
        out.print(f"wrote {path}", soft_wrap=True)


def _us(timing: dict[str, float] | None) -> str:
    return "" if timing is None else f"{timing['median'] * 1e6:.1f}"
