"""Launches of `hopper_small_linear_kernel` without a GPU: its source on `gluon_sim`'s model, for
whole blocks and models on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gluon_sim as sim
import numpy as np
import pytest
import torch
from torch import Tensor

from fastvit import interpreter
from fastvit.accelerate import latency
from fastvit.kernels import _device
from fastvit.kernels._launch import Box, Prepared
from fastvit.kernels.linear import hopper_small_launch

ROOT = Path(__file__).parent.parent.parent / "kernels"
FILES = (
    ROOT / "_activations.py", ROOT / "_hopper_e4m3.py", ROOT / "linear" / "hopper.py",
    ROOT / "attention" / "hopper_parts.py", ROOT / "linear" / "hopper_small.py",
)  # fmt: skip
TENSOR = object()  # the place of a tensor that is handed over by itself
WRITTEN = (3, 9, 10, 11)  # arguments: y, its statistics, parts of sums, their count

_library = torch.library.Library("small_sim", "DEF")
_library.define("launch(int world, int index, Tensor[] tensors) -> ()")
_worlds: list[Launches] = []


def load(*edits: tuple[str, str], **names: Any) -> dict[str, Any]:
    """What the kernel's file defines, with planted faults."""
    names = {"gdc_wait": lambda: None, **names}
    return sim.load(*FILES, edits=edits, gdc_launch_dependents=lambda: None, **names)


class Launches:
    """All launches of `hopper_small_launch`, in order. Each is a PyTorch op, so that a recorded
    graph makes it again."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.space = load()
        self.made: list[tuple[Prepared, list[Any]]] = []
        self.weights: list[tuple[Tensor, Tensor | None]] = []  # of a linear, and `coming`
        self.error: Exception | None = None  # of the next ones
        self.world = len(_worlds)
        _worlds.append(self)
        patch.setattr(hopper_small_launch, "run", self._launch)
        patch.setattr(latency, "uses_triton", lambda x: True)
        patch.setattr(latency, "_refused", None)
        _device.forget()

    @property
    def linears(self) -> list[Prepared]:
        """Those of the linear."""
        return [launch for launch, _ in self.made if launch.boxes]

    def _launch(self, prepared: Prepared, *given: Any) -> None:
        if self.error is not None:
            raise self.error
        self.made.append((prepared, [TENSOR if isinstance(g, Tensor) else g for g in given]))
        if prepared.boxes:
            self.weights.append((given[1], given[11]))
        tensors = [g for g in given if isinstance(g, Tensor)]
        torch.ops.small_sim.launch(self.world, len(self.made) - 1, tensors)

    def run(self, index: int, tensors: list[Tensor]) -> None:
        """A launch that was made, of tensors that may have other values now."""
        prepared, given = self.made[index]
        left = iter(tensors)
        arguments = prepared.arguments(*(next(left) if g is TENSOR else g for g in given))
        if prepared.boxes:
            self._simulate(prepared, arguments)
        else:
            interpreter.install_bfloat16()
            prepared.kernel[(prepared.programs,)](*arguments)

    def _simulate(self, prepared: Prepared, arguments: tuple[Any, ...]) -> None:
        arrays = [
            argument.detach().float().numpy().copy() if isinstance(argument, Tensor) else argument
            for argument in arguments
        ]
        count = arguments[11]
        if count is not None:
            arrays[11] = count.numpy()
        operands = [
            None if box is None else _described(box, tensor, array)
            for box, tensor, array in zip(prepared.boxes, arguments, arrays, strict=False)
        ]
        rest = [
            sim.Pointer(given.reshape(-1)) if isinstance(given, np.ndarray) else given
            for given in arrays[3:]
        ]
        rest[-8] = sim.Scalar(rest[-8])  # bands
        kernel = self.space["hopper_small_linear_kernel"]
        programs = prepared.programs
        with sim.rounded():
            sim.run(kernel, [*operands, *rest], warps=4, programs=programs, seed=0)
        for i in WRITTEN:
            if arguments[i] is not None and i != 11:
                arguments[i].copy_(torch.from_numpy(arrays[i]))


def _described(box: Box, tensor: Tensor, array: np.ndarray) -> sim.Descriptor:
    chunks = array.reshape(-1, array.shape[-1] // 64, 64).transpose(1, 0, 2)
    return sim.Descriptor(chunks, tuple(box.make(tensor).block_shape), tensor.dtype)


def _run(world: int, index: int, tensors: list[Tensor]) -> None:
    _worlds[world].run(index, tensors)


_library.impl("launch", _run, "CPU")
