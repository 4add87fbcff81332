"""What one forward costs the host, which is all of its time where a batch is small: Python-level
calls, launches and microseconds, with nothing computed, so that no GPU is needed.

Ours runs with every launch stubbed out; the library's own model runs on an empty batch, for which
PyTorch does all but the work.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit._compat import import_timm
from fastvit.accelerate import accelerate
from fastvit.check import launches

TURNS, FORWARDS = 6, 5
Forward = Callable[[], Any]


class _Computations(TorchDispatchMode):
    """Counts PyTorch's operators that compute: neither views, nor allocations, nor our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        view = any(value.alias_info is not None for value in func._schema.returns)
        if func.namespace == "aten" and not view and "empty" not in func.name():
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_calls(forward: Forward) -> int:
    """Python-level calls of `forward`, as `sys.setprofile` sees them."""
    calls = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(see)
    try:
        forward()
    finally:
        sys.setprofile(None)
    return calls - 1  # `forward` itself


@contextlib.contextmanager
def stubbed() -> Iterator[launches.Stub]:
    """`launches.stubbed`, and PyTorch's linears (the head's, a table's ``cublas``) on no rows."""
    linear = torch.nn.functional.linear

    def on_no_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # within one of our ops `_Computations` does not see it
        stub.launches += torch._C._len_torch_dispatch_stack() == 0
        linear(input[:0], weight, bias)
        return input.new_empty(*input.shape[:-1], weight.shape[0])

    patch = mock.patch.object(torch.nn.functional, "linear", on_no_rows)
    with launches.stubbed() as stub, patch:
        yield stub


def _seconds(forward: Forward, clock: Callable[[], float]) -> float:
    start = clock()
    forward()
    return clock() - start


def host_cost(name: str, batch: int = 1) -> dict[str, dict[str, float]]:
    """Of a timm model in bfloat16 and eval mode without gradients.

    Returns:
        for ``ours`` and ``theirs``: ``calls``, ``launches`` (kernels of ours, and operators of
        PyTorch that compute), ``us`` (of this thread's time, the median of 30 forwards in turns of
        five), and on a GPU
        ``gpu_us``, the time until a forward on it returns, the GPU still at work.

    Raises:
        RuntimeError: kernels of this process run in the interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: interpreted kernels are not launched")
    theirs: Any = import_timm().create_model(name).eval().to(torch.bfloat16)
    ours = accelerate(copy.deepcopy(theirs))
    images = torch.zeros(batch, *theirs.pretrained_cfg["input_size"], dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of what is computed are none of the host's
    try:
        with torch.no_grad():
            found = _costs(lambda: ours(images), lambda: theirs(images[:0]))
            if torch.cuda.is_available():
                for key, model in (("ours", ours), ("theirs", theirs)):
                    found[key]["gpu_us"] = _gpu_us(model.cuda(), images.cuda())
    finally:
        torch.set_num_threads(threads)
    return found


def _costs(ours: Forward, theirs: Forward) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(TURNS):
        for key, forward, context in (
            ("ours", ours, stubbed), ("theirs", theirs, contextlib.nullcontext),
        ):  # fmt: skip
            with context() as stub:
                forward()  # what is decided once
                times[key] += [_seconds(forward, time.thread_time) for _ in range(FORWARDS)]
                if turn == 0:
                    found[key] = {
                        "calls": count_calls(forward),
                        "launches": _launches(forward, stub),
                    }
    for key, seconds in times.items():
        found[key]["us"] = 1e6 * statistics.median(seconds)
    return found


def _launches(forward: Forward, stub: launches.Stub | None) -> int:
    before = 0 if stub is None else stub.launches
    with _Computations() as computations:
        forward()
    return computations.count + (0 if stub is None else stub.launches - before)


def _gpu_us(model: nn.Module, images: Tensor) -> float:
    times = []
    for _ in range(TURNS * FORWARDS):
        times.append(_seconds(lambda: model(images), time.perf_counter))
        torch.cuda.synchronize()
    return 1e6 * statistics.median(times[FORWARDS:])
