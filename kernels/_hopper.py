"""Whether this machine runs Hopper's own kernels (`<op>/hopper.py`, written in Gluon), and if not,
why. Gluon itself is imported by none but who launches such a kernel."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from fastvit.kernels import _backend, _launch
from fastvit.kernels._device import architecture, forget

# whose machine code was run on a GPU or read; Gluon promises no stable interface
PROVEN_TRITON = ("3.6.0", "3.7.1")

Choice = TypeVar("Choice")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")

_refused: str | None = None  # what Triton's compiler said to one of them


class Answer(NamedTuple):
    """What one launcher decided."""

    op: str
    sizes: tuple[int, ...]
    choice: Any  # a plan's `Variant`, or in words why a portable kernel runs


_answers: list[Answer] | None = None


@contextlib.contextmanager
def answers() -> Iterator[list[Answer]]:
    """Collect what launchers decide that have not yet decided the same (`_device.forget`)."""
    global _answers
    before, _answers = _answers, []
    try:
        yield _answers
    finally:
        _answers = before


def answer(op: str, sizes: tuple[int, ...], choice: Choice) -> Choice:
    """`choice`, and whoever collects answers is told."""
    if _answers is not None:
        _answers.append(Answer(op, sizes, choice))
    return choice


def hopper_problem(device: torch.device) -> str | None:
    """Why tensors on `device` take portable kernels only, or None if they may take Hopper's.

    A device that is no GPU stands for the architecture that `_device.emulate` gives it.
    """
    arch = architecture(device)
    if arch != "sm90":
        return f"{arch} is not sm90"
    launches = _launch._stub is None and not _launch.idle()
    if launches and _backend.current_path() == "interpret":
        return "Triton's interpreter does not run Gluon"
    version = _triton_version()
    if version not in PROVEN_TRITON:
        problem = f"triton {version} is not {' or '.join(PROVEN_TRITON)}"
    elif _refused is not None:
        problem = f"Triton could not compile one: {_refused}"
    else:
        return None
    if device.type == "cuda":
        _backend.warn_once(f"fastvit: running portable kernels on this Hopper GPU: {problem}")
    return problem


def refuse(error: Exception) -> None:
    """No Hopper kernel any more in this process: `error` came from compiling one."""
    global _refused
    _refused = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]
    forget()
    _backend.warn_once(
        "fastvit: running portable kernels on this Hopper GPU: Triton could not compile one: "
        f"{_refused}"
    )


class Refused(Exception):
    """A Hopper kernel could not be compiled, and the one in its place takes other tensors."""


def give_up(error: Exception) -> Any:
    """A `Prepared.spare` of such a kernel: `or_portable` launches again."""
    refuse(error)
    raise Refused from error


def or_portable(launch: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`launch`, which prepares and runs, again after `Refused`: by then no Hopper kernel is
    chosen."""

    @functools.wraps(launch)
    def launching(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        try:
            return launch(*args, **options)
        except Refused:
            return launch(*args, **options)

    return launching


@functools.cache
def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
