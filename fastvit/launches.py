"""The launches of a forward or a training step, counted or looked at in the place of a GPU."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from fastvit.kernels import _backend, _launch
from fastvit.kernels._device import forget
from fastvit.kernels._launch import Box, Prepared


class Stub(_launch._Ready):
    """Counts launches."""

    def __init__(self) -> None:
        self.device = -1
        self.watch([])
        self.function = self.metadata = None
        self.launches = 0

    def launcher(self, *arguments: object) -> None:
        self.launches += 1

    def expand(self, boxes: Sequence[Box | None], arguments: tuple[Any, ...]) -> Any:
        """Arguments as they are, as if every TMA descriptor were cached."""
        return arguments


@contextlib.contextmanager
def _to_triton() -> Iterator[None]:
    """Within, every tensor takes the way to Triton, and nothing prepared before or after counts."""
    before, _backend._path = _backend._path, "interpret"
    forget()
    try:
        yield
    finally:
        _backend._path = before
        forget()


Recorded = list[tuple[Prepared, tuple[Any, ...]]]


@contextlib.contextmanager
def recorded() -> Iterator[Recorded]:
    """Within, launches are kept and not made: each with its arguments as Triton takes them."""
    found: Recorded = []
    with _to_triton():
        _launch._record = found
        try:
            yield found
        finally:
            _launch._record = None


@contextlib.contextmanager
def stubbed() -> Iterator[Stub]:
    """Within, launches are counted and not made: what is left is the host's work."""
    before = _launch._device, _launch._stream
    stub = Stub()
    with _to_triton():
        _launch._stub = stub
        _launch._device, _launch._stream = itertools.repeat(-1).__next__, operator.index
        try:
            yield stub
        finally:
            _launch._stub = None
            _launch._device, _launch._stream = before
