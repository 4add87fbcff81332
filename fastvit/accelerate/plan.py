"""The plan of a model: what runs on our kernels, and why the rest does not."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from fastvit.accelerate import latency
from fastvit.accelerate.fp8 import QUANTIZED, Quantized
from fastvit.accelerate.graphs import GRAPHS
from fastvit.kernels import _backend
from fastvit.kernels._hopper import hopper_problem

if TYPE_CHECKING:
    from rich.table import Table


PRECISION = "fastvit_precision"  # attribute of a ViT that was given a precision
_RUNS_FP8 = "layer_norm, linear and attention, e4m3 operands in linear"
_WHEN_FP8 = (
    "linears of the blocks run in e4m3 in eval mode without gradients; not under torch.compile "
    "(patch embedding, norms, attention and head keep their dtypes)"
)


@dataclass(frozen=True)
class PlanRow:
    """One module: what it runs once accelerated."""

    module: str  # its name in the model
    type: str  # its class in the library that it comes from
    fused: bool
    runs: str  # our ops, or the library whose own forward runs
    reason: str | None  # for falling back to that
    block: bool = False  # an encoder block, which is counted


@dataclass(frozen=True)
class Part:
    """A module that a library's file knows: the class `accelerate` gives it, and its row."""

    module: nn.Module
    fast: type[nn.Module] | None  # None: it cannot be fused and stays as it is
    row: PlanRow | None  # None: the whole model, whose parts have rows
    graphed: type[nn.Module] | None = None  # the class whose forward can go through CUDA graphs
    quantized: type[nn.Module] | None = None  # the class that runs `fp8.Quantized`


@dataclass(frozen=True)
class Plan:
    """The plan that `explain` prints: what runs, module by module.

    Attributes:
        rows: one for every module that could be fused or that stands where such a one might.
        accelerated: whether all that can be fused has been; otherwise the rows say what
            `accelerate` would do.
        backend: what runs the ops on the model's device, Triton or plain PyTorch, and why.
        note: why there are no rows, if so.
        graphs: when a model that was given CUDA graphs uses them, or why never.
        inference: when a model that was given fp8 uses it.
        hopper: where the ops run in Triton on a GPU, whether Hopper's own kernels are used, or why
            not.
    """

    rows: tuple[PlanRow, ...]
    accelerated: bool
    backend: str
    note: str | None
    graphs: str | None = None
    inference: str | None = None
    hopper: str | None = None

    @property
    def fused_blocks(self) -> list[str]:
        """Names of the encoder blocks that are fused."""
        return [row.module for row in self.rows if row.block and row.fused]

    @property
    def left_blocks(self) -> list[str]:
        """Names of the encoder blocks that are not."""
        return [row.module for row in self.rows if row.block and not row.fused]

    @property
    def fully_fused(self) -> bool:
        """Whether there are rows and all of them are fused."""
        return bool(self.rows) and all(row.fused for row in self.rows)

    def to_json(self) -> str:
        """The fields and the three properties as a JSON object."""
        derived = {
            "fused_blocks": self.fused_blocks,
            "left_blocks": self.left_blocks,
            "fully_fused": self.fully_fused,
        }
        return json.dumps(asdict(self) | derived, indent=2)

    def table(self) -> Table:
        """For rich to print; neighbours that differ in their number only share a line."""
        from rich.table import Table

        waiting = not self.accelerated and any(row.fused for row in self.rows)
        state = " by accelerate(model), not called yet" if waiting else ""
        count = f"{len(self.fused_blocks)} of {len(self.fused_blocks + self.left_blocks)} blocks"
        caption = f"the ops run as: {self.backend}"
        if self.graphs is not None:
            caption += f"\nCUDA graphs: {self.graphs}"
        if self.inference is not None:
            caption += f"\ninference: {self.inference}"
        if self.hopper is not None:
            caption += f"\nHopper's kernels: {self.hopper}"
        table = Table(title=f"fastvit: {count} fused{state}", caption=caption)
        for column in ("module", "type", "what runs", "reason for falling back"):
            table.add_column(column, overflow="fold", no_wrap=column == "type")
        for row in _grouped(self.rows):
            table.add_row(row.module or "(model)", row.type, row.runs, row.reason or "")
        return table


def _grouped(rows: tuple[PlanRow, ...]) -> list[PlanRow]:
    """``blocks.0``, ``blocks.1``, ... as one ``blocks.0-11`` where all else is equal."""

    def run(indexed: tuple[int, PlanRow]) -> tuple[str, int, PlanRow]:
        index, row = indexed
        stem = row.module.rstrip("0123456789")
        number = row.module[len(stem) :]
        # along a run of consecutive numbers the difference stays the same
        return stem, int(number or 0) - index, replace(row, module="")

    lines: list[PlanRow] = []
    for (stem, _, row), members in itertools.groupby(enumerate(rows), run):
        names = [member.module for _, member in members]
        last = f"-{names[-1][len(stem) :]}" if len(names) > 1 else ""
        lines.append(replace(row, module=names[0] + last))
    return lines


def check_module(model: object) -> None:
    """Raises a TypeError for what is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}, not a torch.nn.Module")


def make_plan(model: nn.Module, parts: list[Part]) -> Plan:
    """The plan of `parts`, which `find_parts` gave for `model`."""
    rows = tuple(_row(part.row, part.module) for part in parts if part.row)
    quantized = any(_is_quantized(part.module) for part in parts)
    fast = [part for part in parts if part.fast is not None]
    note = None
    if not parts:
        known = "timm, transformers, torchvision, open_clip, DINO, fastvit"
        note = f"no block of a known library ({known}) in this {type(model).__name__}"
    return Plan(
        rows=rows,
        accelerated=bool(fast) and all(type(part.module) is part.fast for part in fast),
        backend=_backend_in_words(model),
        note=note,
        graphs=_graphs(model),
        inference=_WHEN_FP8 if quantized else None,
        hopper=_hopper_in_words(model),
    )


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get(QUANTIZED), Quantized)


def _row(row: PlanRow, module: nn.Module) -> PlanRow:
    return replace(row, runs=_RUNS_FP8) if row.fused and _is_quantized(module) else row


def graphs_obstacle(model: nn.Module) -> str | None:
    """Why no forward of `model` can go through a CUDA graph."""
    device = _device_type(model)
    return None if device == "cuda" else f"they need a GPU and the model is on {device}"


def _graphs(model: nn.Module) -> str | None:
    if not any(GRAPHS in module.__dict__ for module in model.modules()):
        return None
    obstacle = graphs_obstacle(model)
    if obstacle is not None:
        return f"none, {obstacle}"
    words = "of every forward in eval mode without gradients, hooks or a mask"
    few = any(isinstance(m.__dict__.get(QUANTIZED), latency.Folded) for m in model.modules())
    return f"{words}; {latency.in_words(next(model.parameters()).device)}" if few else words


def gpu_obstacle(model: nn.Module) -> str | None:
    """Why Triton cannot run although the model is on a GPU."""
    device = _device_type(model)
    return _backend.gpu_problem() if device == "cuda" else None


def _hopper_in_words(model: nn.Module) -> str | None:
    if _backend.current_path() not in ("auto", "triton") or _device_type(model) != "cuda":
        return None
    problem = _backend.gpu_problem() or hopper_problem(next(model.parameters()).device)
    return "used where a tuning table names them" if problem is None else f"not used: {problem}"


def _device_type(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type


def _backend_in_words(model: nn.Module) -> str:
    path = _backend.current_path()
    if path == "torch":
        return "plain PyTorch, as FASTVIT_BACKEND=torch asks"
    if path == "interpret":
        return "Triton in its interpreter, as TRITON_INTERPRET=1 asks"
    device = _device_type(model)
    if device != "cuda":
        return f"plain PyTorch: the model is on {device}"
    problem = _backend.gpu_problem()
    return "Triton" if problem is None else f"plain PyTorch: {problem}"
