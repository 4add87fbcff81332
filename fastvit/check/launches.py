"""The launches of a forward or a training step, counted or looked at in the place of a GPU."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit.kernels import _backend, _launch
from fastvit.kernels._device import forget
from fastvit.kernels._launch import Box, Prepared
from fastvit.kernels._register import OPS


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


SMALL = 1 << 16  # values that PyTorch computes with in earnest: positions, lengths, options


class Unwritten(TorchDispatchMode):
    """Within, PyTorch computes nothing large on CPU tensors either: the result has its shape and
    strides, and memory that is not touched. Of our ops the launchers run, so inside `recorded`
    a whole model's forward costs no arithmetic."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastvit":
            with self:
                return self.run_op(func.name().removeprefix("fastvit::"), args)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.is_view or "empty" in func.name() or sum(x.numel() for x in given) < SMALL:
            return func(*args, **kwargs)
        args_on_meta, options = pytree.tree_map_only(Tensor, _shape, (args, kwargs))
        if "device" in options:
            options["device"] = "meta"
        result = func(*args_on_meta, **options)
        return args[0] if func._schema.is_mutable else pytree.tree_map_only(Tensor, _empty, result)

    def run_op(self, name: str, args: tuple[Any, ...]) -> Any:
        """One of `OPS` by its launcher."""
        return OPS[name].launch(*args)


def _shape(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _empty(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


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
