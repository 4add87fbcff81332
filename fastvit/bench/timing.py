"""Interleaved timing of contenders, and the roof of the machine they run on.

Times are seconds. On a GPU they come from CUDA events, on a CPU from a wall clock.
"""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

OURS = "fastvit"
Work = Callable[[], object]


def is_ours(name: str) -> bool:
    """Whether a contender is fastvit in one of its forms, not a peer."""
    return name.split(maxsplit=1)[0] == OURS


@dataclass(frozen=True)
class Timing:
    """Median and spread of one contender, in seconds."""

    median: float
    p10: float
    p90: float
    rounds: int


@dataclass
class Race:
    """Contenders timed in turns on one job; a contender is in `timings` or in `failed`."""

    timings: dict[str, Timing] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # reason
    first_call: dict[str, float] = field(default_factory=dict)  # seconds, compilation included
    peak_bytes: dict[str, int] = field(default_factory=dict)  # GPU memory above what was held
    bounds: tuple[str, ...] = ()  # contenders that do less than the job, or only approximate it

    @property
    def fastest_peer(self) -> str | None:
        """The peer of the least median that does the whole job, None if none was timed."""
        peers = {
            name: timing.median
            for name, timing in self.timings.items()
            if not is_ours(name) and name not in self.bounds
        }
        return min(peers, key=peers.__getitem__, default=None)

    @property
    def speedup(self) -> float | None:
        """Our speed over the fastest peer's."""
        if OURS not in self.timings or self.fastest_peer is None:
            return None
        return self.timings[self.fastest_peer].median / self.timings[OURS].median


def race(
    functions: Mapping[str, Work], *, budget_s: float, min_rounds: int, device: torch.device,
    cold: bool = False, bounds: Collection[str] = (),
) -> Race:  # fmt: skip
    """First calls, peak memory and `interleaved` times of whatever runs.

    A contender whose first call raises (no C++ compiler, no kernel for a shape, ...) is listed with
    the reason. `bounds` names those that are no peers, since they do less than the job.
    """
    result = Race(bounds=tuple(name for name in functions if name in bounds))
    ready: dict[str, Work] = {}
    for name, function in functions.items():
        try:
            result.first_call[name] = _seconds(function, device)
        except Exception as error:
            result.failed[name] = reason(error)
            continue
        ready[name] = function
        if device.type == "cuda":
            result.peak_bytes[name] = _peak_bytes(function, device)
    if ready:
        result.timings = interleaved(
            ready, budget_s=budget_s, min_rounds=min_rounds, device=device, cold=cold
        )
    return result


def reason(error: Exception) -> str:
    """An error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def interleaved(
    functions: Mapping[str, Work],
    *,
    budget_s: float,
    min_rounds: int,
    device: torch.device,
    cold: bool = False,
) -> dict[str, Timing]:
    """Call every function once a round, in a new random order each round, after a warm-up round.

    In a fixed order each would always run in what the same predecessor left in the caches.

    Args:
        functions: contenders; each call does the whole job (see `rotating` for fresh inputs).
        budget_s: seconds to spend, all functions together.
        min_rounds: at least as many rounds, whatever the budget.
        device: what the functions run on.
        cold: on a GPU, overwrite its cache before each call. That also queues work ahead of the
            call, so that the time is the GPU's own and launching hides behind it; without it the
            GPU is idle before each call and the time is what a caller waits.

    Returns:
        A `Timing` for each name.
    """
    if not functions:
        raise ValueError("there is nothing to time")
    names = list(functions)
    scratch = _scratch(device) if cold and device.type == "cuda" else None
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        _seconds(functions[name], device, scratch)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    done = 0
    while done < min_rounds or time.perf_counter() - start < budget_s:
        shuffle(names)
        for name in names:
            samples[name].append(_seconds(functions[name], device, scratch))
        done += 1
    return {name: summary(values) for name, values in samples.items()}


def summary(samples: list[float]) -> Timing:
    """Median and 10th and 90th percentile."""
    p10, median, p90 = (float(value) for value in np.percentile(samples, (10, 50, 90)))
    return Timing(median, p10, p90, len(samples))


def rotating(
    functions: Mapping[str, Callable[..., object]], inputs: Sequence[Mapping[str, object]]
) -> dict[str, Work]:
    """Each function on the next of `inputs` at each call, every function starting at another one,
    so that no call finds its inputs in a cache."""

    def work(function: Callable[..., object], first: int) -> Work:
        turns = itertools.islice(itertools.cycle(inputs), first, None)
        return lambda: function(**next(turns))

    return {name: work(function, i) for i, (name, function) in enumerate(functions.items())}


def roof(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The roof: rates that this machine reaches now.

    Returns:
        FLOP/s of a large matmul and bytes/s of a large copy; on a GPU also the seconds of a launch
        that adds to one number: ``launch_s`` queued behind other work, the least any kernel takes,
        and ``idle_launch_s`` on an idle GPU, the least a caller waits.
    """
    gpu = device.type == "cuda"
    side, size = (8192, 2**30) if gpu else (1024, 2**27)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed = functools.partial(interleaved, budget_s=1.0, min_rounds=5, device=device)
    times = timed({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)})
    measured = {
        "matmul_side": side,
        "matmul_flops_per_s": 2 * side**3 / times["matmul"].median,
        "copy_bytes": size,
        "copy_bytes_per_s": 2 * size / times["copy"].median,  # read and written
    }
    if gpu:
        one = torch.zeros(1, device=device)
        launch = {"launch": lambda: one.add_(1)}
        measured["launch_s"] = timed(launch, budget_s=0.3, cold=True)["launch"].median
        measured["idle_launch_s"] = timed(launch, budget_s=0.3)["launch"].median
    return measured


def _seconds(function: Work, device: torch.device, scratch: torch.Tensor | None = None) -> float:
    """Time of one call, the device idle before it or busy clearing its cache."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if scratch is not None:
        scratch.zero_()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _scratch(device: torch.device) -> torch.Tensor:
    """Several times the size of any GPU's cache, and some 100 microseconds to clear."""
    return torch.empty(2**29, dtype=torch.uint8, device=device)


def _peak_bytes(function: Work, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
