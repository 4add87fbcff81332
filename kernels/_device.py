"""What hardware a tensor lives on: architecture, multiprocessors, shared memory; and the cache of
decisions that follow from it. Lazy, never at import."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

Decision = TypeVar("Decision")

# bytes of shared memory that one block may use, and that a multiprocessor has
SHARED_MEMORY = {"sm80": 166_912, "sm90": 232_448, "sm100": 232_448, "gfx942": 65_536}
SHARED_MEMORY_OF_SM = {"sm80": 167_936, "sm90": 233_472, "sm100": 233_472, "gfx942": 65_536}

_decisions: list[Any] = []


def cached(decide: Callable[..., Decision]) -> Callable[..., Decision]:
    """Keep what a pure function of metadata decides about launches (4,096 of each function's),
    until `forget`: tables, a forced tile or the emulated architecture are no arguments of it."""
    keeps = functools.lru_cache(maxsize=4096)(decide)
    _decisions.append(keeps)
    return keeps


def forget() -> None:
    """Drop every decision of a `cached` function."""
    for keeps in _decisions:
        keeps.cache_clear()


_emulated = "sm90"


def architecture(device: torch.device) -> str:
    """``sm80``, ``sm90``, ``sm100``, ``gfx942``, ... of a GPU. A tensor elsewhere (interpreter,
    offline compile) gets the tiles of `emulate`, by default sm90's, so that what is tested without
    a GPU is what runs on one."""
    return _architecture(device.index) if device.type == "cuda" else _emulated


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; an H200's 132 for a tensor elsewhere."""
    return _multiprocessors(device.index) if device.type == "cuda" else 132


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@contextlib.contextmanager
def emulate(arch: str) -> Iterator[None]:
    """Give tensors that are on no GPU the tiles of `arch`."""
    global _emulated
    before, _emulated = _emulated, arch
    forget()
    try:
        yield
    finally:
        _emulated = before
        forget()


@functools.cache
def _architecture(index: int | None) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{major}{minor}"


def fp8_problem(device: torch.device) -> str | None:
    """Why no kernel multiplies e4m3 on this device, or None if it can."""
    arch = architecture(device)
    if arch.startswith("gfx"):
        return f"{arch} is not supported: AMD's e4m3 before gfx950 is another format (fnuz)"
    return None if int(arch[2:]) >= 89 else f"{arch} has no e4m3; sm_89 and newer do"


def check_fp8_device(op: str, device: torch.device) -> None:
    """A RuntimeError where `fp8_problem` finds one."""
    if (problem := fp8_problem(device)) is not None:
        raise RuntimeError(f"{op}: {problem}")
