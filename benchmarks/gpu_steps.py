"""What the steps of `gpu.py` consist of: each function gives the items of one step, by name.

An item measures one thing and returns it, ready for JSON. All run inside a step's process.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
Item = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What every step is told."""

    out: Path
    seed: int
    dry_run: bool

    @property
    def device(self) -> str:
        """Where it all runs."""
        return "cpu" if self.dry_run else "cuda"


def load(path: Path) -> dict[str, Any]:
    """A step's record, empty before it has one."""
    return json.loads(path.read_text()) if path.exists() else {}


def environment_items(settings: Settings) -> dict[str, Item]:
    import torch

    from fastvit.bench import timing
    from fastvit.kernels._backend import gpu_problem

    device = torch.device(settings.device)

    def roof() -> dict[str, Any]:
        dtype = torch.float32 if settings.dry_run else torch.bfloat16
        before = gpu_state()
        return {"roof": timing.roof(device, dtype), "before": before, "problem": gpu_problem()}

    return {"roof": roof}


def gpu_state() -> str | None:
    """Clocks, power and temperature as nvidia-smi tells them; nothing is set."""
    query = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    return None


def numerics_items(settings: Settings, *, names: tuple[str, ...]) -> dict[str, Item]:
    import torch

    from fastvit import numerics
    from fastvit.kernels._hopper_cases import certified
    from fastvit.kernels._spec import Case, OpSpec
    from fastvit.kernels.specs import all_specs

    def check(spec: OpSpec, case: Case, dtype: torch.dtype) -> dict[str, Any]:
        report = numerics.compare_case(
            spec, case, dtype, device=settings.device, seed=settings.seed,
            backward=not spec.inference,
        )  # fmt: skip
        return {"op": spec.name, "case": case.name, "dtype": str(dtype), **entry(report)}

    specs = [all_specs()[name] for name in names]
    return {
        f"{spec.name}, {case.name}, {str(dtype).removeprefix('torch.')}": functools.partial(
            check, spec, case, dtype
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for spec in specs
        if dtype in spec.dtypes
        for case in (
            (smallest(spec.cases, spec),)
            if settings.dry_run
            else certified(spec, dtype, settings.device)
        )
    }


def smallest(cases: tuple[Any, ...], spec: Any) -> Any:
    return min(cases, key=lambda case: spec.bytes(case.sizes, 2))


def entry(report: Any) -> dict[str, Any]:
    """A report as JSON; its ``rows`` have their verdicts."""
    rows = [
        {**dataclasses.asdict(row), "ratio": row.ratio, "passed": row.passed} for row in report.rows
    ]
    return {**dataclasses.asdict(report), "rows": rows, "passed": report.passed}


def latency_items(settings: Settings) -> dict[str, Item]:
    """The kernels that CUDA graphs capture for few tokens, which no GPU has proven: each by itself,
    then whole models with and without them, and without programmatic dependent launch."""
    import torch

    from fastvit import numerics
    from fastvit.check import few_tokens
    from fastvit.kernels._spec import Case, OpSpec

    def check(spec: OpSpec, case: Case, dtype: torch.dtype) -> dict[str, Any]:
        report = numerics.compare_case(
            spec, case, dtype, device=settings.device, seed=settings.seed
        )
        inputs = spec.inputs(case, dtype, settings.device, settings.seed)
        first = spec.op(**inputs)
        same = all(torch.equal(first, spec.op(**inputs)) for _ in range(20))
        named = {"op": spec.name, "case": case.name, "dtype": str(dtype)}
        return {**named, "same_bits": same, **entry(report)}

    name, specs, batches = "vit_base_patch16_224", [*few_tokens.SPECS.values()], (1, 2, 4, 8)
    if settings.dry_run:
        shrink_models()
        name, specs, batches = "test_vit", [], (1,)
    checks = [
        (f"{spec.name}, {case.name}, {dtype}", functools.partial(check, spec, case, dtype))
        for cases in ("bench_cases", "cases")
        for spec in specs
        for dtype in spec.dtypes
        for case in getattr(spec, cases)
    ]
    first = sum(len(spec.bench_cases) * len(spec.dtypes) for spec in specs)
    races = [
        (f"{name}, batch {batch}", functools.partial(race_of_few_tokens, name, batch, settings))
        for batch in batches
    ]
    return dict([*checks[:first], *races, *checks[first:]])


def race_of_few_tokens(name: str, batch: int, settings: Settings) -> dict[str, Any]:
    """Errors of a model's logits in each mode of ``FASTVIT_LATENCY``, and microseconds of those
    whose errors pass: what a caller waits, and the GPU's own with its cache overwritten."""
    import torch

    from fastvit import accelerate, numerics
    from fastvit.accelerate import latency
    from fastvit.bench import timing

    options = common_options(settings, budget_s=3.0)
    device, dtype = options["device"], options["dtype"]
    model = timm_model(name)
    numerics.randomise(model, settings.seed)
    model = model.to(device, dtype).eval()
    images = torch.randn(batch, *model.default_cfg["input_size"]).to(device, dtype)
    modes: dict[str, Any] = {}
    works: dict[str, Callable[[], Any]] = {}
    with torch.inference_mode():
        truth, eager = copy.deepcopy(model).double()(images.double()), model(images)
        for mode in latency.MODES:
            before = latency.runs
            with mock.patch.dict(os.environ, FASTVIT_LATENCY=mode):
                fast = accelerate(copy.deepcopy(model), cuda_graphs=True)
                logits = fast(images)
            row = numerics.measure("logits", logits, truth, eager)
            same = all(torch.equal(logits, fast(images)) for _ in range(20))
            modes[mode] = {
                **dataclasses.asdict(row), "ratio": row.ratio, "passed": row.passed,
                "same_bits": same, "blocks": latency.runs - before,
                "problem": latency.problem(device),
            }  # fmt: skip
            if row.passed and same:
                works[mode] = functools.partial(fast, images)
        limits: dict[str, Any] = {"budget_s": options["budget_s"], "min_rounds": 5}
        times = {
            kind: timing.interleaved(works, device=device, cold=kind == "gpu", **limits)
            for kind in ("caller", "gpu")
        }
    return {
        "model": name, "batch": batch, "modes": modes,
        "passed": all(found["passed"] and found["same_bits"] for found in modes.values()),
        "times": {
            kind: {mode: dataclasses.asdict(time) for mode, time in found.items()}
            for kind, found in times.items()
        },
    }  # fmt: skip


def parity_items(settings: Settings) -> dict[str, Item]:
    import torch

    from fastvit import numerics

    # plain; with LayerScale; head dim 72 and average pooling
    names = ("vit_base_patch16_224", "vit_base_patch14_dinov2", "vit_so400m_patch14_siglip_gap_224")
    dtypes = (torch.bfloat16, torch.float16)

    def check(name: str, dtype: torch.dtype, depth: int | None) -> dict[str, Any]:
        report = numerics.certify_model(
            name, dtype, device=settings.device, depth=depth, seed=settings.seed
        )
        return {"model": name, "dtype": str(dtype), "depth": depth, **entry(report)}

    depth = None
    if settings.dry_run:
        shrink_models()
        names, dtypes, depth = ("test_vit",), dtypes[:1], 1
    return {
        f"{name}, {str(dtype).removeprefix('torch.')}": functools.partial(check, name, dtype, depth)
        for name in names
        for dtype in dtypes
    }


def proof_items(settings: Settings) -> dict[str, Item]:
    """For the ledger: each of Hopper's kernels that a case for GPUs takes."""
    import torch

    from fastvit.check import ledger
    from fastvit.kernels._spec import Case, OpSpec
    from fastvit.kernels.specs import all_specs

    def prove(spec: OpSpec, case: Case, dtype: torch.dtype, *, backward: bool) -> dict[str, Any]:
        if settings.dry_run and backward and spec.name in ledger.WITH_GRADIENTS:
            return {"configurations": [c for c, _ in ledger.gradients_of(spec, case, dtype)]}
        if settings.dry_run:
            found = ledger.configuration_of(spec, case, dtype, backward=backward)
            return {"configurations": [found] * (found is not None)}
        entries = ledger.prove(
            spec, case, dtype, settings.device, settings.seed, backward=backward
        )  # fmt: skip
        if not entries:
            return {"skipped": f"{case.name}: not one Hopper kernel, or one with a mask"}
        op = entries[0]["configuration"]["op"].removesuffix("_backward")
        ledger.record(settings.out / f"proven_{op}.json", entries)
        checks = entries[0]["proof"]["numerics"]
        passed = all(check["passed"] for check in checks)
        found = [entry["configuration"] for entry in entries]
        return {"configurations": found, "checks": checks, "passed": passed}

    return {
        f"{spec.name}{', gradients' * backward}, {case.name}, "
        f"{str(dtype).removeprefix('torch.')}": functools.partial(
            prove, spec, case, dtype, backward=backward
        )
        for spec in all_specs().values()
        for case in spec.gpu_cases * (spec.name != "fp8_linear")
        for dtype in (torch.bfloat16, torch.float16)
        for backward in (False, True)
        # an MLP's forward is no single kernel, and its kernels are a linear's
        if (not spec.inference if backward else spec.name != "norm_mlp")
    }


# minutes of searching for each; two in all, see gpu.py
TUNED = {
    ("linear",): 1.2,
    ("attention", "attention_qkv"): 0.5,
    ("patch_embed", "layer_norm"): 0.3,
}


def tune_items(settings: Settings) -> dict[str, Item]:
    """`fastvit tune` of the ops that a ViT spends its time in, in bfloat16."""
    import torch

    if importlib.util.find_spec("fastvit.bench.tune") is None:
        return {"tune": lambda: {"skipped": "there is no fastvit tune"}}
    from fastvit.bench.tune import tune

    def search(names: tuple[str, ...], minutes: float) -> dict[str, Any]:
        record = tune(
            names,
            minutes=0.0 if settings.dry_run else minutes,
            dtypes=(torch.bfloat16,),
            device=torch.device("cpu") if settings.dry_run else None,
            seed=settings.seed,
        )
        return {"tuned": record["results"], "left_out": record["left_out"]}

    return {
        ", ".join(names): functools.partial(search, names, minutes)
        for names, minutes in TUNED.items()
    }


def op_items(settings: Settings) -> dict[str, Item]:
    import torch

    from fastvit.bench import ops
    from fastvit.kernels._spec import Case, OpSpec
    from fastvit.kernels.specs import all_specs

    common = common_options(settings, budget_s=1.0)

    def bench(spec: OpSpec, case: Case) -> dict[str, Any]:
        return as_json(ops.bench_op(spec, case, **common), settings)

    jobs, _ = ops.plan(torch.device("cuda"), quick=False)
    if settings.dry_run:
        jobs = [(spec, smallest(spec.cases, spec)) for spec in all_specs().values()][2:4]
    # batch 256 first: there kernels and not launches are compared
    jobs.sort(key=lambda job: -job[0].bytes(job[1].sizes, 2))
    return {
        f"{spec.name}, {case.name}": functools.partial(bench, spec, case) for spec, case in jobs
    }


def model_items(
    settings: Settings, *, runs: tuple[tuple[str, str, int, str], ...]
) -> dict[str, Item]:
    """`runs`: kind, name, batch, level of peers."""
    from fastvit.bench import models

    common = common_options(settings, budget_s=10.0)

    def bench(kind: Any, name: str, batch: int, level: Any) -> dict[str, Any]:
        return as_json(models.bench_model(kind, name, batch, level=level, **common), settings)

    if settings.dry_run:
        shrink_models()
        runs = ((runs[0][0], "test_vit", 1, "few"),)
    return {
        f"{kind} {name}, batch {batch} ({level})": functools.partial(
            bench, kind, name, batch, level
        )
        for kind, name, batch, level in runs
    }


def common_options(settings: Settings, *, budget_s: float) -> dict[str, Any]:
    import torch

    return {
        "dtype": torch.float32 if settings.dry_run else torch.bfloat16,
        "device": torch.device(settings.device),
        "seed": settings.seed,
        "budget_s": 0.0 if settings.dry_run else budget_s,
    }


def as_json(result: Any, settings: Settings) -> dict[str, Any]:
    from fastvit.bench import report

    return report.as_json(result, measured_roof(settings))


def measured_roof(settings: Settings) -> dict[str, float]:
    return load(settings.out / "environment.json")["results"][0]["roof"]


def first_call_items(settings: Settings) -> dict[str, Item]:
    import torch

    from fastvit import accelerate, ops

    name = "vit_base_patch16_224"
    if settings.dry_run:
        shrink_models()
        name = "test_vit"
    device = torch.device(settings.device)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def calls(ready: Callable[[Any], Any]) -> dict[str, Any]:
        model = timm_model(name).to(device, torch.bfloat16).eval()
        images = torch.randn(1, *model.default_cfg["input_size"]).to(device, torch.bfloat16)
        with torch.inference_mode(), ops.backend("triton"):
            model(images)  # the GPU's own start is nobody's
            times = [wait()]
            model = ready(model)
            for _ in range(3):
                model(images)
                times.append(wait())
        seconds = [after - before for before, after in itertools.pairwise(times)]
        return {"model": name, "first_call_s": seconds[0], "third_call_s": seconds[2]}

    return {
        "fastvit": functools.partial(calls, accelerate),
        "timm + torch.compile": functools.partial(calls, torch.compile),
    }


def timm_model(name: str) -> Any:
    from fastvit._compat import import_timm

    return import_timm().create_model(name, num_classes=1000)


def shrink() -> None:
    """A dry run: kernels in the interpreter, nothing compiled."""
    import torch

    from fastvit.bench import models, ops

    torch.set_num_threads(1)
    torch.compile = lambda function, **options: function
    # where there is no GPU, benchmarks take plain PyTorch, which is not what is tried out here
    ops.backend_for = models.backend_for = lambda device: "triton"


def shrink_models() -> None:
    """timm's models get one block and 5 tokens."""
    from fastvit._compat import import_timm

    timm: Any = import_timm()
    create = timm.create_model

    def create_small(name: str, **options: Any) -> Any:
        model = create(name, **{**options, "depth": 1, "img_size": 32})
        model.default_cfg = {**model.default_cfg, "input_size": (3, 32, 32)}
        return model

    timm.create_model = create_small


def device_works(device: str) -> bool:
    """Whether the GPU still answers: after an illegal access none of its calls does."""
    import torch

    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return False
    return True
