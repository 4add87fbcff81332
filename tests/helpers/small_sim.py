"""Launches of `hopper_small_linear_kernel` without a GPU: its source on `gluon_sim`'s model, for
whole blocks and models on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gluon_sim as sim
import pytest
import torch
from torch import Tensor

from fastvit import interpreter
from fastvit.accelerate import latency
from fastvit.kernels import _device
from fastvit.kernels._launch import Prepared
from fastvit.kernels.attention import hopper_small_launch as attention
from fastvit.kernels.linear import hopper_small_launch

ROOT = Path(__file__).parents[2] / "kernels"
FILES = (
    ROOT / "_activations.py", ROOT / "linear" / "hopper_parts.py",
    ROOT / "attention" / "hopper_parts.py", ROOT / "linear" / "hopper_small.py",
)  # fmt: skip
ATTENTION = (ROOT / "attention" / "hopper_parts.py", ROOT / "attention" / "hopper.py")
TENSOR = object()  # the place of a tensor that is handed over by itself

_library = torch.library.Library("small_sim", "DEF")
_library.define("launch(int world, int index, Tensor[] tensors) -> ()")
_worlds: list[Launches] = []


def load(*edits: tuple[str, str], files: Sequence[Path] = FILES) -> dict[str, Any]:
    """What the kernel's file defines, with planted faults."""
    waits = {"gdc_wait": lambda: None, "gdc_launch_dependents": lambda: None}
    return sim.load(*files, edits=edits, **waits)


class Launches:
    """All launches of both files `hopper_small_launch`, in order. Each is a PyTorch op, so that a
    recorded graph makes it again."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.space = {**load(), **load(files=ATTENTION)}
        self.made: list[tuple[Prepared, list[Any]]] = []
        self.weights: list[tuple[Tensor, Tensor | None]] = []  # of a linear, and `coming`
        self.error: Exception | None = None  # of the next ones
        self.world = len(_worlds)
        _worlds.append(self)
        patch.setattr(hopper_small_launch, "run", self._launch)
        patch.setattr(attention, "run", self._launch)
        patch.setattr(latency, "uses_triton", lambda x: True)
        patch.setattr(latency, "_refused", None)
        _device.forget()

    @property
    def linears(self) -> list[Prepared]:
        """Those of the linear."""
        return [launch for launch, _ in self.made if len(launch.boxes) == 3]

    @property
    def attentions(self) -> list[Prepared]:
        """Those of attention."""
        return [launch for launch, _ in self.made if len(launch.boxes) > 3]

    def _launch(self, prepared: Prepared, *given: Any) -> None:
        if self.error is not None:
            raise self.error
        self.made.append((prepared, [TENSOR if isinstance(g, Tensor) else g for g in given]))
        if len(prepared.boxes) == 3:
            self.weights.append((given[1], given[11]))
        tensors = [g for g in given if isinstance(g, Tensor)]
        torch.ops.small_sim.launch(self.world, len(self.made) - 1, tensors)

    def run(self, index: int, tensors: list[Tensor]) -> None:
        """A launch that was made, of tensors that may have other values now."""
        prepared, given = self.made[index]
        left = iter(tensors)
        arguments = prepared.arguments(*(next(left) if g is TENSOR else g for g in given))
        if prepared.boxes:
            self._simulate(prepared, list(arguments))
        else:
            interpreter.install_bfloat16()
            prepared.kernel[(prepared.programs,)](*arguments)

    def _simulate(self, prepared: Prepared, arguments: list[Any]) -> None:
        given, boxes = [*arguments], [*prepared.boxes, *[None] * len(arguments)]
        for i, (argument, box) in enumerate(zip(arguments, boxes, strict=False)):
            if type(argument) is int:
                given[i] = sim.Scalar(argument)
            if not isinstance(argument, Tensor):
                continue
            # counts of finished parts stay integers, in the memory that they have
            whole = argument.dtype == torch.int32
            wide = argument if whole else argument.detach().float().contiguous().clone()
            given[i] = sim.Pointer(wide.reshape(-1).numpy())
            if box is not None:
                made = box.make(argument)
                seen = wide.as_strided(made.shape, made.strides).numpy()
                given[i] = sim.Descriptor(seen, tuple(made.block_shape), argument.dtype)
        kernel, programs = self.space[prepared.kernel.fn.__name__], prepared.programs
        with sim.rounded():
            sim.run(kernel, given, warps=4, programs=programs, seed=0)
        for argument, pointer in zip(arguments, given, strict=True):
            if isinstance(pointer, sim.Pointer) and pointer.writes.any():
                argument.copy_(torch.from_numpy(pointer.array).view(argument.shape))


def _run(world: int, index: int, tensors: list[Tensor]) -> None:
    _worlds[world].run(index, tensors)


_library.impl("launch", _run, "CPU")
