"""`fastvit audit`: compile every kernel for GPUs that are not here, and read what came out."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fastvit.cli._shared import console, print_json, progress_bar

if TYPE_CHECKING:
    from fastvit.check.audit import Audited


def audit(
    *,
    op: Annotated[list[str] | None, typer.Option(help="An op; repeatable. All by default.")] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(help="sm80, sm90, sm100 or gfx942; repeatable. All by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compile every kernel with every tile offline: matrix instructions, spills, shared memory.

    Exits with status 1 if a kernel does not compile or should not run on its card.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("unset TRITON_INTERPRET: interpreted kernels do not compile")
    from fastvit.check import audit as auditing

    specs = auditing.specs_with_kernels()
    _check("op", op, specs)
    _check("arch", arch, auditing.ARCHITECTURES)
    rows: list[Audited] = []
    broken: list[str] = []
    jobs = [(name, target) for target in arch or auditing.ARCHITECTURES for name in op or specs]
    with progress_bar() as bar:
        task = bar.add_task("compiling", total=len(jobs))
        for (name, target), result in auditing.audit(jobs):
            if isinstance(result, Exception):  # whatever the compiler raises, the rest is audited
                broken.append(f"{name} for {target}: {type(result).__name__}: {result}"[:500])
            else:
                rows += result
            bar.update(task, advance=1, description=f"{target} {name}")
    order = {name: at for at, name in enumerate((*auditing.ARCHITECTURES, *specs))}
    rows.sort(key=lambda row: (order[row.compiled.arch], order[row.op]))
    passed = not broken and not any(row.problems for row in rows)
    held = None
    if any(row.compiled.fingerprint for row in rows):
        from fastvit.check import ledger

        held = ledger.state(compiling=not op)
    if as_json:
        kernels = [_record(row) for row in rows]
        print_json({"passed": passed, "broken": broken, "ledger": held, "kernels": kernels})
    else:
        _print(rows, broken)
        if held is not None:
            console().print(held)
    raise typer.Exit(0 if passed else 1)


def _check(option: str, chosen: list[str] | None, known: Any) -> None:
    for name in chosen or ():
        if name not in known:
            raise typer.BadParameter(f"unknown {option} {name!r}; known: {', '.join(known)}")


def _record(row: Audited) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "blocks": row.compiled.blocks, "ledger": _proof(row)}


def _proof(row: Audited) -> str | None:
    """Whether a GPU has proven the machine code of a Hopper kernel; None of another."""
    if row.compiled.fingerprint is None:
        return None
    import triton

    from fastvit.check import ledger

    return ledger.verdict_of(row.compiled.fingerprint, triton.__version__)


def _print(rows: list[Audited], broken: list[str]) -> None:
    table = Table(title="offline compile")
    table.add_column("arch, op, case", overflow="fold")
    table.add_column("dtype")
    for header in ("regs", "stack", "shared", "matrix", "spills", "blocks"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    group = None
    for row in rows:
        c = row.compiled
        if group != (c.arch, row.op):
            group = (c.arch, row.op)
            table.add_section()
            table.add_row(Text(", ".join(group), "bold"))
        numbers = (c.registers, c.stack, c.shared, c.matrix_ops, c.loop_spills, c.blocks)
        sound = Text(", ".join(filter(None, ("ok", _proof(row)))), "green")
        verdict = Text("; ".join(row.problems), "bold red") if row.problems else sound
        table.add_row(row.case, row.dtype, *map(str, numbers), verdict)
    out = console()
    out.print(table)
    for line in broken:
        out.print(Text(f"did not compile: {line}", "bold red"))
    bad = sum(bool(row.problems) for row in rows)
    out.print(
        f"{len(rows) - bad} of {len(rows)} compiled kernels are sound. regs, stack (bytes): per "
        "thread; shared (bytes): per block; matrix, spills: instructions, spills in loops; blocks: "
        "per multiprocessor."
    )
