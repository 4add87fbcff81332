"""`fastvit doctor`: what this machine uses, and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from fastvit.cli._shared import console, print_json


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say which path ops take on this machine and why; list versions, GPU and tuning tables."""
    facts = diagnosis()
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def diagnosis() -> dict[str, Any]:
    """The environment, the path of CPU and GPU tensors with its reason, and the tuning tables."""
    from fastvit.check import ledger
    from fastvit.check.environment import environment

    facts = environment()
    paths = {}
    for kind in ("cpu", "gpu"):
        path, reason = path_taken(kind)
        paths[kind] = {"path": path, "reason": reason}
    return {
        "environment": facts,
        "paths": paths,
        "hopper": {
            "problem": hopper_obstacle(),
            "ledger": ledger.state(),
            "few_tokens": few_tokens(),
        },
        "tuning_tables": tuning_tables(facts["gpu_arch"]),
        "tuning_cache": tuning_cache(),
    }


def path_taken(kind: str) -> tuple[str, str]:
    """``triton``, ``interpret``, ``torch`` or ``none``, and why our ops take it on `kind`, ``cpu``
    or ``gpu`` tensors."""
    from fastvit.kernels._backend import current_path, gpu_problem

    path = current_path()
    problem = gpu_problem()
    if path == "torch":
        return "torch", "FASTVIT_BACKEND=torch"
    if path == "interpret":
        return "interpret", "TRITON_INTERPRET=1: slow, to check numbers only"
    if kind == "gpu" and problem is None:
        return "triton", "Triton runs on this GPU"
    why = problem if kind == "gpu" else "Triton needs a GPU, or TRITON_INTERPRET=1"
    if path == "triton":
        return "none", f"FASTVIT_BACKEND=triton, but {why}"
    return "torch", str(why)


def hopper_obstacle() -> str | None:
    """Why Hopper's own kernels are not used on this machine, or None if they are."""
    import torch

    from fastvit.kernels._backend import gpu_problem
    from fastvit.kernels._hopper import hopper_problem

    return gpu_problem() or hopper_problem(torch.device("cuda", torch.cuda.current_device()))


def few_tokens() -> str:
    """What ``accelerate(cuda_graphs=True)`` captures on this machine for few tokens."""
    import torch

    from fastvit.accelerate import latency

    problem = hopper_obstacle()
    if problem is not None:
        return f"no kernels for few tokens: {problem}"
    return latency.in_words(torch.device("cuda", torch.cuda.current_device()))


def tuning_tables(arch: str | None) -> list[dict[str, Any]]:
    """Every table in the package, and whether a GPU of `arch` reads it."""
    from fastvit.check.environment import PACKAGE
    from fastvit.kernels import _tuning

    tables = []
    for path in sorted((PACKAGE / "kernels").glob("*/tuning/*.json")):
        op = path.parts[-3]
        rows = len(_tuning.load_table(op, path.stem))
        used = arch is not None and _tuning.nearest_table(op, arch) == path.stem
        tables.append({"op": op, "arch": path.stem, "rows": rows, "used_here": used})
    return tables


def tuning_cache() -> list[dict[str, Any]]:
    """What `fastvit tune` has kept on this machine; its rows go before the package's."""
    from fastvit.kernels import _tuning

    paths = _tuning.cache_path("*", "*").parent.parent.glob("*/*.json")
    return [
        {"op": path.parent.name, "arch": path.stem, "path": str(path), "rows": len(rows)}
        for path in sorted(paths)
        if (rows := _tuning.load_cache(path.parent.name, path.stem))
    ]


def _print(facts: dict[str, Any]) -> None:
    environment = facts["environment"]
    table = Table("", "this machine", title="fastvit doctor", show_header=False)
    for kind in ("cpu", "gpu"):
        taken = facts["paths"][kind]
        table.add_row(f"ops on {kind.upper()} tensors", f"{taken['path']}: {taken['reason']}")
    problem = facts["hopper"]["problem"]
    used = "used where a tuning table names them" if problem is None else f"not used: {problem}"
    table.add_row("Hopper's own kernels", used)
    table.add_row("their ledger", facts["hopper"]["ledger"])
    table.add_row("in CUDA graphs", facts["hopper"]["few_tokens"])
    table.add_section()
    for name, value in environment.items():
        if name != "date":
            table.add_row(
                name, "not set" if name.isupper() and value is None else _text(name, value)
            )
    table.add_section()
    for op in sorted({entry["op"] for entry in facts["tuning_tables"]}):
        entries = [entry for entry in facts["tuning_tables"] if entry["op"] == op]
        names = (
            f"{entry['arch']} ({entry['rows']} rows{', used here' * entry['used_here']})"
            for entry in entries
        )
        table.add_row(f"tuning of {op}", ", ".join(names))
    for entry in facts["tuning_cache"]:
        table.add_row(f"measured here, {entry['op']}", f"{entry['path']} ({entry['rows']} rows)")
    console().print(table)


def _text(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name == "gpu_memory":
        return f"{value / 2**30:.1f} GiB"
    if name == "gpu_shared_memory":
        return f"{value / 2**10:.0f} KiB a block"
    return str(value)
