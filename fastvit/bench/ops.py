"""Ops at the shapes of real models: ours beside eager PyTorch, Inductor and SDPA's backends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastvit import numerics, ops
from fastvit.bench.report import Result, checked_numerics
from fastvit.bench.timing import OURS, Race, race, rotating
from fastvit.kernels._library import gpu_problem
from fastvit.kernels._spec import Case, OpSpec, all_specs

CPU_FLOPS, CPU_BYTES = 2e9, 1e8  # a case beyond either takes a CPU too long
ROTATION_BYTES, MAX_COPIES = 2**28, 16  # inputs rotate through more memory than a cache holds


def backend_for(device: torch.device) -> str:
    """What our ops are timed on: Triton where this GPU runs it, else plain PyTorch."""
    return "triton" if device.type == "cuda" and gpu_problem() is None else "torch"


def plan(device: torch.device, *, quick: bool) -> tuple[list[tuple[OpSpec, Case]], str | None]:
    """The cases to time, and a note of what a CPU leaves out.

    `quick` keeps the smallest case of every op.
    """
    jobs: list[tuple[OpSpec, Case]] = []
    left_out = 0
    for spec in all_specs().values():
        fits = [case for case in spec.bench_cases if device.type == "cuda" or _fits_cpu(spec, case)]
        left_out += len(spec.bench_cases) - len(fits)
        fits.sort(key=lambda case: spec.bytes(case.sizes, 4))
        jobs += [(spec, case) for case in (fits[:1] if quick else fits)]
    note = f"Left out, too large for a CPU: {left_out} op cases above {CPU_FLOPS / 1e9:g} GFLOP"
    return jobs, f"{note} or {CPU_BYTES / 1e6:g} MB." if left_out else None


def _fits_cpu(spec: OpSpec, case: Case) -> bool:
    return spec.flops(case.sizes) <= CPU_FLOPS and spec.bytes(case.sizes, 4) <= CPU_BYTES


def bench_op(
    spec: OpSpec,
    case: Case,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    budget_s: float,
) -> Result:
    """Time one case, unless its numerics fail on the path that would be timed."""
    backend = backend_for(device)
    itemsize = torch.finfo(dtype).bits // 8
    size = spec.bytes(case.sizes, itemsize)
    copies = max(2, min(MAX_COPIES, ROTATION_BYTES // max(size, 1)))
    inputs = [spec.inputs(case, dtype, str(device), seed + i) for i in range(copies)]
    ours = on_backend(backend, spec.op)
    checked = checked_numerics(lambda: numerics.compare(ours, spec.reference, inputs[0]))
    result = Race()
    if checked["passed"]:
        torch.compiler.reset()  # earlier cases count towards its limit of recompilations
        with torch.no_grad():
            works = rotating(dict(_contenders(spec, ours, device)), inputs)
            result = race(works, budget_s=budget_s, min_rounds=5, device=device, cold=True)
    return Result(
        kind="op",
        name=spec.name,
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        race=result,
        numerics=checked,
        flops=spec.flops(case.sizes),
        bytes=size,
        sizes=case.sizes,
    )


def on_backend(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with `ops` on `backend` during each call."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with ops.backend(backend):
            return function(*args, **kwargs)

    return call


def _contenders(
    spec: OpSpec, ours: Callable[..., Tensor], device: torch.device
) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    yield OURS, ours
    # the plain path, not the reference, which spells attention out: a peer has to be at its best
    yield "eager", on_backend("torch", spec.op)
    yield "torch.compile", on_backend("torch", torch.compile(spec.op, dynamic=False))
    if device.type == "cuda" and spec.name.startswith("attention"):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            choose = sdpa_kernel(getattr(SDPBackend, backend))
            yield f"SDPA {backend.split('_')[0].lower()}", on_backend("torch", choose(spec.op))
