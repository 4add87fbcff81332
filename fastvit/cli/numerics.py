"""`fastvit numerics`: the certificate."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from rich.table import Table
from rich.text import Text

from fastvit.cli._fp8 import POLICY, fp8_entries, print_fp8
from fastvit.cli._shared import Dtype, console, print_json, progress_bar
from fastvit.variants import unknown_model

if TYPE_CHECKING:
    from fastvit.numerics import Report

INTERPRETER_DEPTH = 2  # blocks of a model that the interpreter runs in reasonable time
TIMM_MODULES = ("vision_transformer", "deit")
ERRORS = ("max_error", "eager_max_error", "rms_error", "eager_rms_error")


@dataclass(frozen=True)
class Settings:
    """How to certify, and on what."""

    backend: str
    device: str
    dtypes: tuple[Dtype, ...]
    backward: bool
    seed: int
    depth: int | None  # of models; None for all blocks

    @property
    def path(self) -> str:
        """The path in words."""
        if self.backend == "torch":
            return "plain PyTorch"
        return "Triton on the GPU" if self.device == "cuda" else "Triton in its interpreter"


def numerics(
    *,
    op: Annotated[list[str] | None, typer.Option(help="An op; repeatable. All by default.")] = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="Repeatable. All three by default.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A timm model, instead of ops; repeatable.")
    ] = None,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Instead: accuracy of fp8, on labelled sets.")
    ] = False,
    depth: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Blocks of the model; {INTERPRETER_DEPTH} in the interpreter, else all."
        ),
    ] = None,
    path: Annotated[
        Literal["auto", "triton", "torch"],
        typer.Option(
            help="triton: kernels on the GPU, without one in Triton's interpreter. auto: the same, "
            "or plain PyTorch where triton is not installed. torch: plain PyTorch."
        ),
    ] = "auto",
    forward_only: Annotated[bool, typer.Option("--forward-only", help="No gradients.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the inputs; fresh by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every number as JSON.")] = False,
) -> None:
    """Certify ops or a model: errors against float64 beside eager PyTorch's own.

    Exits with status 1 if any of them fails.
    """
    if op and model:
        raise typer.BadParameter("--op and --model exclude each other")
    if fp8 and (op or model):
        raise typer.BadParameter("--fp8 excludes --op and --model")
    backend, device = choose_path(path)
    if model and depth is None and backend == "triton" and device == "cpu":
        depth = INTERPRETER_DEPTH
    settings = Settings(
        backend=backend,
        device=device,
        dtypes=tuple(dtype or Dtype),
        backward=not forward_only,
        seed=random.SystemRandom().randrange(2**31) if seed is None else seed,
        depth=depth,
    )
    if fp8:
        entries = fp8_entries(settings)
    else:
        jobs = model_jobs(model, settings) if model else op_jobs(op, settings)
        entries = certify(jobs, settings)
    passed = all(entry["passed"] for entry in entries)
    if as_json:
        print_json(_record(entries, settings, passed))
    elif fp8:
        print_fp8(entries, settings)
    else:
        _print(entries, settings)
    raise typer.Exit(0 if passed else 1)


def choose_path(path: str) -> tuple[str, str]:
    """The backend and the device that ``--path`` means on this machine.

    Where no GPU runs our kernels it starts this command again with TRITON_INTERPRET=1, which
    Triton reads when it is imported, and by now torch has imported it.
    """
    if path == "torch" or (path == "auto" and importlib.util.find_spec("triton") is None):
        return "torch", "cuda" if torch.cuda.is_available() else "cpu"
    if importlib.util.find_spec("triton") is None:
        raise typer.BadParameter("--path triton: triton is not installed")
    from fastvit.kernels._backend import gpu_problem

    if os.environ.get("TRITON_INTERPRET") == "1":
        return "triton", "cpu"
    if gpu_problem() is None:
        return "triton", "cuda"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


# --------------------------------------------------------------------------- certifying


# what an entry starts with, and the check that completes it
Job = tuple[dict[str, Any], Callable[[], "Report"]]


def op_jobs(chosen: list[str] | None, settings: Settings) -> list[Job]:
    """Every case of the chosen ops, or of all, in every dtype."""
    from fastvit.kernels._hopper_cases import certified
    from fastvit.kernels._spec import Case, OpSpec
    from fastvit.kernels.specs import all_specs
    from fastvit.numerics import compare_case

    specs = all_specs()
    for name in chosen or ():
        if name not in specs:
            raise typer.BadParameter(f"there is no op {name!r}; the ops are {', '.join(specs)}")

    def job(spec: OpSpec, dtype: Dtype, case: Case) -> Job:
        def check() -> Report:
            return compare_case(
                spec, case, dtype.torch, device=settings.device, seed=settings.seed,
                backward=settings.backward and not spec.inference,
            )  # fmt: skip

        return {
            "op": spec.name,
            "dtype": dtype.value,
            "case": case.name,
            "sizes": case.sizes,
        }, check

    return [
        job(spec, dtype, case)
        for spec in specs.values()
        if not chosen or spec.name in chosen
        for dtype in settings.dtypes
        if dtype.torch in spec.dtypes
        for case in certified(spec, dtype.torch, settings.device)
    ]


def model_jobs(names: list[str], settings: Settings) -> list[Job]:
    """Every model in every dtype."""
    from fastvit.numerics import certify_model

    def job(name: str, dtype: Dtype) -> Job:
        def check() -> Report:
            return certify_model(
                name,
                dtype.torch,
                device=settings.device,
                depth=settings.depth,
                backward=settings.backward,
                seed=settings.seed,
            )

        return {"model": name, "dtype": dtype.value}, check

    for name in names:
        check_timm_model(name)
    return [job(name, dtype) for name in names for dtype in settings.dtypes]


def check_timm_model(name: str) -> None:
    """Refuse a name that timm does not know, and any name where timm is not installed."""
    from fastvit._compat import import_timm

    try:
        timm = import_timm()
    except ImportError as error:
        raise typer.BadParameter(f"{name}: {error}") from error
    if not timm.is_model(name.partition(".")[0]):  # a tag may follow
        known = [m for module in TIMM_MODULES for m in timm.list_models(module=module)]
        raise typer.BadParameter(str(unknown_model(name, known)))


def certify(jobs: list[Job], settings: Settings) -> list[dict[str, Any]]:
    """The completed entries, in order. What does not run does not pass."""
    from fastvit import ops

    entries = []
    with ops.backend(settings.backend), progress_bar() as bar:
        task = bar.add_task("", total=len(jobs))
        for entry, check in jobs:
            subject = entry.get("op") or entry.get("model")
            bar.update(task, description=f"{subject} {entry['dtype']}")
            entries.append(entry | _completed(check))
            bar.advance(task)
    return entries


def _completed(check: Callable[[], Report]) -> dict[str, Any]:
    try:
        report = check()
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return {"passed": False, "error": message[:500], "rows": []}
    rows = [
        {**dataclasses.asdict(row), "ratio": row.ratio, "passed": row.passed} for row in report.rows
    ]
    # a model's report has counts beside its rows
    return {**dataclasses.asdict(report), "passed": report.passed, "rows": rows}


# --------------------------------------------------------------------------- output


def _record(entries: list[dict[str, Any]], settings: Settings, passed: bool) -> dict[str, Any]:
    from fastvit import numerics
    from fastvit.check.environment import environment

    policy = {
        "truth": "the reference in float64, on inputs rounded to the tested dtype",
        "yardstick": "the reference, or timm's model, in the tested dtype by eager PyTorch",
        "allowed_ratio": numerics.ALLOWED_RATIO,
        "rule": "maximum and RMS error each at most allowed_ratio times the yardstick's plus one "
        "unit in the last place of the largest true value; output and every gradient",
        "fp8": POLICY,
        "null": "a number that is not finite",
    }
    return {
        "passed": passed,
        **dataclasses.asdict(settings),
        "path": settings.path,
        "policy": policy,
        "environment": environment(),
        "certificate": entries,
    }


def _print(entries: list[dict[str, Any]], settings: Settings) -> None:
    subject = "op" if "op" in entries[0] else "model"
    table = Table(title="error against float64, beside that of eager PyTorch in the same dtype")
    columns = f"{subject}, dtype{', case, shape' * (subject == 'op')}, tensor"
    table.add_column(columns, overflow="fold")
    for header in ("max", "eager", "RMS", "eager", "ratio", "verdict"):
        table.add_column(header, justify="right", no_wrap=True)
    group = None
    for entry in entries:
        if group != (entry[subject], entry["dtype"]):
            group = (entry[subject], entry["dtype"])
            table.add_section()
            table.add_row(Text(", ".join(group), "bold"))
        case = f"{entry['case']} ({_shape(entry['sizes'])}): " if "case" in entry else ""
        for tensor, *cells in _lines(entry):
            table.add_row(f"{case}{tensor}", *cells)
            case = "  " if case else ""
    out = console()
    out.print(table)
    _print_summary(out, entries, settings)


def _shape(sizes: dict[str, int]) -> str:
    # longer names are options
    return " ".join(f"{name}={size}" for name, size in sizes.items() if len(name) == 1)


def _lines(entry: dict[str, Any]) -> list[tuple[str | Text, ...]]:
    """Of one case: the outputs, the worst gradient, whatever else fails, and a model's top-1."""
    gradients = [row for row in entry["rows"] if row["name"].startswith("grad of ")]
    worst = max(gradients, key=lambda row: row["ratio"], default=None)
    lines: list[tuple[str | Text, ...]] = [
        (
            row["name"],
            *(f"{row[error]:.1e}" for error in ERRORS),
            _ratio(row["ratio"]),
            _verdict(row["passed"]),
        )
        for row in entry["rows"]
        if row is worst or row not in gradients or not row["passed"]
    ]
    if "error" in entry:
        lines.append(("(raised)", *[""] * 5, _verdict(False)))  # the summary says what
    if "top1" in entry:
        ours, eager = (f"{entry[key]}/{entry['images']}" for key in ("top1", "eager_top1"))
        lines.append(("top-1 as float64", ours, eager, "", "", "", _verdict(entry["lost"] == 0)))
    return lines


def _ratio(ratio: float) -> str:
    if ratio < 1000:
        return f"{ratio:.2f}"
    return f"{ratio:.0e}" if ratio < 1e9 else "inf"  # beside an exact eager


def _verdict(passed: bool) -> Text:
    return Text("pass", "green") if passed else Text("FAIL", "bold red")


def _print_summary(out: Any, entries: list[dict[str, Any]], settings: Settings) -> None:
    from fastvit.check.environment import environment
    from fastvit.numerics import ALLOWED_RATIO

    facts = environment()
    failed = sum(not entry["passed"] for entry in entries)
    tensors = sum(len(entry["rows"]) for entry in entries)
    gradients = "; of the gradients the worst is shown" if settings.backward else ", forward only"
    for entry in entries:
        if entry.get("unfused"):
            unfused = ", ".join(entry["unfused"])
            out.print(f"{entry['model']} {entry['dtype']}: not on our kernels: {unfused}")
    errors = Counter(entry["error"] for entry in entries if "error" in entry)
    for error, count in errors.items():
        out.print(Text(f"raised ({count}x): {error}", "red"))
    out.print(
        f"{len(entries) - failed} of {len(entries)} cases pass ({tensors} tensors{gradients}). "
        f"ratio: our error over eager's, the worse of maximum and RMS. At most {ALLOWED_RATIO:g} "
        "passes, give or take one ULP of the largest value."
    )
    device = facts["gpu"] if settings.device == "cuda" else facts["cpu"]
    depth = f" depth {settings.depth};" if settings.depth else ""
    out.print(
        f"seed {settings.seed};{depth} torch {facts['torch']}; triton {facts['triton'] or 'none'}; "
        f"{device}; path: {settings.path}"
    )
