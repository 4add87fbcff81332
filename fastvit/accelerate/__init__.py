"""Run the ViT you have on our kernels, in place: `accelerate`, `restore`, `explain`."""

from __future__ import annotations

import sys
import warnings
from typing import TypeVar

from torch import nn

from fastvit.accelerate import own
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.graphs import GRAPHS, Graphs
from fastvit.accelerate.plan import (
    PRECISION,
    Part,
    Plan,
    PlanRow,
    check_module,
    gpu_obstacle,
    graphs_obstacle,
    make_plan,
)

__all__ = ["Plan", "PlanRow", "accelerate", "explain", "restore"]

Model = TypeVar("Model", bound=nn.Module)

PRECISIONS = ("keep", "bf16", "fp16", "fp8")


def accelerate(
    model: Model, *, precision: str = "keep", cuda_graphs: bool = False, strict: bool = False
) -> Model:
    """Make the ViTs inside `model` run on our kernels, in place, in training too.

    Known modules of timm (`Block`, `PatchEmbed`, `VisionTransformer` and its norms, with its own
    exact classes) become instances of subclasses with another forward. Parameters, their names,
    hooks and the module tree stay as they are. Where a module inside a block carries a hook or has
    been replaced, that block runs timm's forward for as long as it does. What is not known stays
    as it was; `explain` names it and says why. `torch.jit.script` wants a restored model.

    Args:
        model: a ViT, or any module with one inside.
        precision: ``keep`` for the model's own; ``bf16`` or ``fp16`` run every forward of timm's
            ViTs under autocast of that dtype, on the input's device, with the parameters as they
            are and results cast back to the input's dtype.
        cuda_graphs: on a GPU, capture the forward of a whole ViT (timm's or fastvit's own) for each
            input shape, dtype and setting at its first call, and replay it from then on: batch 1
            stops waiting for Python. It applies in eval mode without gradients, to ``model(x)``;
            with a mask, hooks, training, ``torch.compile`` or ``torch.export``, and on a CPU, the
            forward runs as without. Results are new tensors, safe to keep. New values of weights
            show at once, whatever else changes is noticed and captured again. At most 8 graphs a
            model are kept; any thread and stream may call. Under a `precision` or autocast each
            replay casts the weights anew: for the least latency convert the model instead.
        strict: raise where anything would fall back.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: an unknown precision; a precision without a ViT of timm's to run so, or
            ``cuda_graphs=True`` without a ViT.
        NotImplementedError: ``precision="fp8"``.
        RuntimeError: with `strict`, naming each module that would fall back and why. `model` is
            then as it was, as after every other error.
    """
    parts = find_parts(model)
    _check_options(parts, precision, cuda_graphs)
    plan = make_plan(model, parts)
    if strict:
        _check_strict(model, plan, cuda_graphs)
    if all(part.fast is None for part in parts):
        reason = plan.note or "no module in it has a fused form"
        warnings.warn(f"fastvit.accelerate changed nothing: {reason}", RuntimeWarning, stacklevel=2)
    for part in parts:
        kind = part.graphed if cuda_graphs and part.graphed is not None else part.fast
        if kind is not None:
            part.module.__class__ = kind
        if part.row is None:
            _forget_options(part.module)
            if precision != "keep" and part.fast is not None:
                setattr(part.module, PRECISION, precision)
            if cuda_graphs:
                setattr(part.module, GRAPHS, Graphs())
    return model


def _forget_options(module: nn.Module) -> None:
    for name in (PRECISION, GRAPHS):
        module.__dict__.pop(name, None)


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place: every module gets back the class that it had.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    check_module(model)
    library = sys.modules.get("fastvit.accelerate.timm")  # not loaded: nothing of timm's to restore
    original = own.ORIGINAL | ({} if library is None else library.ORIGINAL)
    for module in model.modules():
        if type(module) in original:
            module.__class__ = original[type(module)]
            _forget_options(module)
    return model


def explain(model: nn.Module) -> Plan:
    """Print what of `model` runs on our kernels and why the rest does not; on a model that is not
    accelerated, what `accelerate` would do.

    Returns:
        The plan printed. Heads, dropouts and whatever lies outside the encoder have no row: they
        run as they are.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    from rich.console import Console

    plan = make_plan(model, find_parts(model))
    Console().print(plan.note or plan.table())
    return plan


def _check_options(parts: list[Part], precision: str, cuda_graphs: bool) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "fp8":
        raise NotImplementedError(
            'precision="fp8" is not built yet; what works is precision keep, bf16 or fp16'
        )
    if cuda_graphs and all(part.graphed is None for part in parts):
        raise ValueError("cuda_graphs=True needs a ViT of timm's or fastvit's inside the model")
    if precision != "keep" and not any(part.row is None and part.fast for part in parts):
        raise ValueError(
            f"precision={precision!r} needs a timm VisionTransformer inside the model, and there "
            "is none; wrap its forward in torch.autocast instead"
        )


def _check_strict(model: nn.Module, plan: Plan, cuda_graphs: bool) -> None:
    problems = [f"{row.module or '(model)'}: {row.reason}" for row in plan.rows if not row.fused]
    if plan.note is not None:
        problems.append(plan.note)
    gpu = gpu_obstacle(model)
    if gpu is not None:
        problems.append(f"every module: {gpu}")
    no_graphs = graphs_obstacle(model) if cuda_graphs else None
    if no_graphs is not None:
        problems.append(f"CUDA graphs: {no_graphs}")
    if problems:
        raise RuntimeError("strict: these would fall back:\n  " + "\n  ".join(problems))
