"""Microbenchmarks of every op under pytest-benchmark, ours beside eager PyTorch.

    pytest benchmarks/bench_ops.py --benchmark-group-by=group --benchmark-json=ops.json

The same cases as `fastvit bench ops`, one process and no interleaving: made for comparing two
commits with ``pytest-benchmark compare``, not for claims about peers. A case whose numerics fail
is a failed test and has no time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvit import numerics
from fastvit.bench.ops import backend_for, on_backend, plan
from fastvit.kernels._spec import Case, OpSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
JOBS, _ = plan(DEVICE, quick=False)


@pytest.mark.parametrize("path", ["fastvit", "eager"])
@pytest.mark.parametrize(("spec", "case"), JOBS, ids=[f"{s.name}-{c.name}" for s, c in JOBS])
def test_op(benchmark: Any, spec: OpSpec, case: Case, path: str) -> None:
    op = on_backend(backend_for(DEVICE) if path == "fastvit" else "torch", spec.op)
    inputs = spec.inputs(case, DTYPE, str(DEVICE))
    report = numerics.compare(op, spec.reference, inputs)
    assert report.passed, f"not timed, since its numerics fail:\n{report}"
    benchmark.group = f"{spec.name}, {case.name}, {str(DTYPE).removeprefix('torch.')}"

    def call() -> None:
        op(**inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        benchmark.pedantic(call, rounds=20, warmup_rounds=3)
