"""`fastvit coverage`: which architectures run on our kernels, and with whose numbers; with --arch,
which kernel each of their linears and attentions takes on a GPU that is not here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import torch
import typer
from rich.table import Table
from rich.text import Text

from fastvit.cli._shared import console, errors, finite, print_json, progress_bar

if TYPE_CHECKING:
    from fastvit.check.coverage import Covered
    from fastvit.check.kernel_choice import Chosen

PACKAGES = ("torch", "timm", "transformers", "torchvision", "open_clip_torch")


def coverage(
    pattern: Annotated[
        str, typer.Argument(help="Architectures to cover; * stands for anything.")
    ] = "*",
    *,
    library: Annotated[
        list[str] | None,
        typer.Option(
            help="timm, transformers, torchvision or open_clip; repeatable. Installed ones."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write coverage.md and coverage.json to.")
    ] = None,
    arch: Annotated[
        Literal["sm90"] | None,
        typer.Option(help="Instead: why Hopper's kernels are taken or not, by timm's own sizes."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of one forward, with --arch.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Accelerate every architecture of timm's ViT modules, transformers, torchvision and open_clip.

    Each is built small with random parameters and compared with itself before. Exits with status 1
    if one raises or is further off than 1e-5 of its largest output in float32. With --arch timm's
    are built whole, and launched nowhere: what is printed is the kernel that each linear and
    attention of a bfloat16 forward would take.
    """
    from fastvit.check import coverage as covering

    if arch is not None:
        _kernels(pattern, library, arch, batch, as_json)
    with errors("coverage"):
        pairs, absent = covering.select(library, pattern)
    with progress_bar() as bar:
        task = bar.add_task("", total=len(pairs))
        rows: list[Covered] = []
        for name, architecture in pairs:
            bar.update(task, description=f"{name} {architecture}")
            rows.append(covering.cover(name, architecture))
            bar.advance(task)
    record = _record(rows, absent)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(finite(record), indent=1, allow_nan=False)
        (out / "coverage.json").write_text(text + "\n", encoding="utf-8")
        (out / "coverage.md").write_text(markdown(rows, record), encoding="utf-8")
    if as_json:
        print_json(record)
    else:
        _print(rows, record, out)
    raise typer.Exit(0 if record["passed"] else 1)


def _record(rows: list[Covered], absent: list[str]) -> dict[str, Any]:
    from fastvit.check.coverage import TOLERANCE
    from fastvit.check.environment import version

    return {
        "passed": all(row.sound for row in rows),
        "tolerance": TOLERANCE,
        "versions": {package: version(package) for package in PACKAGES},
        "not_installed": absent,
        "summary": {name: _summary(found) for name, found in _by_library(rows).items()},
        "architectures": [dataclasses.asdict(row) for row in rows],
    }


def _by_library(rows: list[Covered]) -> dict[str, list[Covered]]:
    return {
        name: [row for row in rows if row.library == name]
        for name in dict.fromkeys(row.library for row in rows)
    }


def _summary(rows: list[Covered]) -> dict[str, Any]:
    errors = torch.tensor([row.error for row in rows if row.error is not None])
    return {
        "architectures": len(rows),
        "fully_fused": sum(row.fully_fused for row in rows),
        "raised": sum(row.raised is not None for row in rows),
        "worst_error": float(errors.max()) if len(errors) else None,  # NaN if any is
    }


def markdown(rows: list[Covered], record: dict[str, Any]) -> str:
    """The table for docs."""
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items() if v)
    lines = [
        "# Coverage",
        "",
        "Written by `fastvit coverage --out docs`. Every architecture is built small (two blocks, "
        "few patches, random parameters), run, accelerated and run again in float32 on a CPU. "
        "*error* is the largest difference of any output from the library's own, over the largest "
        f"value of that output; above {record['tolerance']:.0e} the command fails.",
        "",
        f"With {versions}.",
        "",
        "| library | architectures | every block fused | raised | worst error |",
        "|---|---|---|---|---|",
    ]
    for name, summary in record["summary"].items():
        worst = _error(summary["worst_error"])
        counts = " | ".join(str(summary[k]) for k in ("architectures", "fully_fused", "raised"))
        lines.append(f"| {name} | {counts} | {worst} |")
    for name, found in _by_library(rows).items():
        lines += ["", f"## {name}", ""]
        lines += ["| architecture | blocks fused | blocks left | why | also left | error |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in found:
            cells = (
                f"`{row.architecture}`",
                *map(str, (row.fused, row.left)),
                "; ".join(row.why) or (f"raised {row.raised}" if row.raised else ""),
                ", ".join(f"`{part}`" for part in row.parts_left),
                _error(row.error),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _error(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if value else "0"


def _print(rows: list[Covered], record: dict[str, Any], out: Path | None) -> None:
    """What is not fully fused and sound by name, the rest by number."""
    table = Table(title="coverage")
    table.add_column("library, architecture", overflow="fold")
    for header in ("fused", "left", "error"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for name, found in _by_library(rows).items():
        table.add_section()
        summary = record["summary"][name]
        whole = f"{summary['fully_fused']} of {summary['architectures']}"
        table.add_row(Text(name, "bold"), whole, "", _error(summary["worst_error"]), "")
        for row in found:
            if row.fully_fused and row.sound:
                continue
            why = row.raised or "; ".join(row.why) or "no encoder block that we know"
            text = Text(why) if row.sound else Text(why, "bold red")
            table.add_row(row.architecture, str(row.fused), str(row.left), _error(row.error), text)
    console().print(table)
    bad = sum(not row.sound for row in rows)
    console().print(
        f"{len(rows) - bad} of {len(rows)} keep their numbers (within {record['tolerance']:.0e} of "
        "the largest output); only architectures with blocks left or a problem are listed"
    )
    if record["not_installed"]:
        console().print(f"not installed: {', '.join(record['not_installed'])}")
    if out is not None:
        written = f"wrote {out / 'coverage.md'} and {out / 'coverage.json'}"
        console().print(written, soft_wrap=True)


# --------------------------------------------------------------------------- kernels of a GPU


def _kernels(
    pattern: str, library: list[str] | None, arch: str, batch: int, as_json: bool
) -> NoReturn:
    """Asks every launcher; exits with status 1 where an architecture raises."""
    from fastvit.check import coverage as covering
    from fastvit.check import kernel_choice
    from fastvit.check.environment import version

    if library not in (None, [], ["timm"]):
        raise typer.BadParameter("--arch knows timm's architectures only")
    with errors("coverage"):
        pairs, _ = covering.select(["timm"], pattern)
    rows = []
    with progress_bar() as bar:
        task = bar.add_task("", total=len(pairs))
        for _, architecture in pairs:
            bar.update(task, description=architecture)
            rows.append(kernel_choice.kernels_of(architecture, arch, batch))
            bar.advance(task)
    found = kernel_choice.summary(rows)
    raised = [row for row in rows if row.raised]
    if as_json:
        print_json(
            {
                "passed": not raised, "arch": arch, "batch": batch, "dtype": "bfloat16",
                "versions": {name: version(name) for name in ("torch", "timm", "triton")},
                "summary": found, "architectures": [dataclasses.asdict(row) for row in rows],
            }
        )  # fmt: skip
    else:
        _print_kernels(found, rows, arch, batch)
    raise typer.Exit(bool(raised))


def _print_kernels(found: list[dict[str, Any]], rows: list[Chosen], arch: str, batch: int) -> None:
    table = Table(title=f"kernels on {arch}, bfloat16, batch {batch}: {len(rows)} architectures")
    table.add_column("Hopper's kernel, or why another", overflow="fold")
    for header in ("number", "models"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("among them", overflow="fold")
    for op in ("linear", "attention"):
        lines = [line for line in found if line["op"] == op]
        table.add_section()
        table.add_row(Text(op, "bold"), str(sum(line["count"] for line in lines)), "", "")
        # Hopper's first
        for line in sorted(lines, key=lambda line: line["kernel"] is None):
            what = Text(line["kernel"], "green") if line["kernel"] else Text(line["reason"])
            numbers = str(line["count"]), str(line["models"])
            table.add_row(what, *numbers, ", ".join(line["examples"]))
    console().print(table)
    for row in rows:
        if row.raised:
            console().print(Text(f"{row.architecture} raised {row.raised}", "bold red"))
