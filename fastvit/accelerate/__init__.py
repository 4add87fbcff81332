"""Run the ViT you have on our kernels, in place: `accelerate`, `restore`, `explain`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from fastvit import _seen
from fastvit.accelerate import fp8, latency
from fastvit.accelerate.block import original_of
from fastvit.accelerate.calibration import Calibration, calibrate, observe, quantizable
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
from fastvit.kernels._backend import uses_triton
from fastvit.kernels._device import fp8_problem

__all__ = [
    "Calibration",
    "Plan",
    "PlanRow",
    "accelerate",
    "calibrate",
    "explain",
    "register_transformers",
    "restore",
]

Model = TypeVar("Model", bound=nn.Module)

PRECISIONS = ("keep", "bf16", "fp16", "fp8")


def accelerate(
    model: Model,
    *,
    precision: str = "keep",
    cuda_graphs: bool = False,
    calibration: Calibration | str | os.PathLike[str] | Tensor | Iterable[Tensor] | None = None,
    strict: bool = False,
) -> Model:
    """Make the ViTs inside `model` run on our kernels, in place, in training too.

    Known modules (blocks, patch embeddings and norms of timm, of transformers' ViT families, of
    torchvision's ``vit_*``, of open_clip's vision towers and of DINO's and DINOv2's repositories,
    with their own exact classes) become instances of subclasses with another forward. Parameters,
    their names, hooks and the module tree stay as they are. Where a module inside a block carries
    a hook or has been replaced, that block runs its library's forward for as long as it does. What
    is not known stays as it was; `explain` names it and says why. A model of transformers gives
    ``hidden_states`` as before, and ``attentions`` with every attention implementation.
    `torch.jit.script` wants a restored model.

    Args:
        model: a ViT, or any module with one inside.
        precision: ``keep`` for the model's own; ``bf16`` or ``fp16`` run every forward of timm's
            and torchvision's ViTs under autocast of that dtype, on the input's device, with the
            parameters as they are and results cast back to the input's dtype; ``fp8`` runs the
            linears of every library's pre-norm blocks in e4m3, in eval mode without gradients.
            It needs `calibration` and a GPU from sm_89 on (a CPU emulates it, slowly), costs
            accuracy (``fastvit numerics --fp8`` measures how much), and keeps patch
            embedding, norms, attention and head as they are and the residual stream in a half
            dtype.
        cuda_graphs: on a GPU, capture the forward of a whole ViT (of timm, torchvision or fastvit)
            for each input shape, dtype and setting at its first call, and replay it from then on:
            batch 1 stops waiting for Python. It applies in eval mode without gradients, to
            ``model(x)``; with a mask, hooks, training, ``torch.compile`` or ``torch.export``,
            and on a CPU, the forward runs as without. Results are new tensors, safe to keep. New
            values of weights show at once, whatever else changes is noticed and captured again.
            With ``FASTVIT_LATENCY=early`` on a Hopper GPU, blocks of a half dtype with up to 800
            tokens in a batch are captured on kernels of their own: norms folded into the weights
            behind them, and programmatic dependent launch, which ``in-order`` leaves out. No GPU
            has run those yet. At most 8 graphs a model are kept; any thread and stream may call.
            Under a `precision` or autocast each replay casts the weights anew: for the least
            latency convert the model instead.
        calibration: for ``precision="fp8"``: what `calibrate` gave, the file that it was saved to,
            or images to call `calibrate` with.
        strict: raise where anything would fall back.

    E4m3 and folded weights are kept beside the model, in no state_dict, copy or pickle, and follow
    its weights; a write through ``parameter.data`` alone goes unnoticed, so call `accelerate` again
    after one. Under ``torch.compile`` and ``torch.export`` blocks run without them.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: an unknown precision; a precision without a ViT of timm's to run so, or
            ``cuda_graphs=True`` without a ViT.
        ValueError: ``precision="fp8"`` without `calibration`, or with one of another model, or
            without a block to use it.
        RuntimeError: ``precision="fp8"`` on a GPU without e4m3; with `strict`, naming each module
            that would fall back and why. `model` is then as it was, as after every other error.
    """
    parts = find_parts(model)
    _check_options(parts, precision, cuda_graphs)
    quantized = _quantize(model, parts, precision, calibration)
    plan = make_plan(model, parts)
    if strict:
        _check_strict(model, plan, cuda_graphs)
    if all(part.fast is None for part in parts):
        reason = plan.note or "no module in it has a fused form"
        warnings.warn(f"fastvit.accelerate changed nothing: {reason}", RuntimeWarning, stacklevel=2)
    own: dict[nn.Module, fp8.Form] = {**quantized}
    if cuda_graphs and precision == "keep":
        own |= latency.forms([part.module for part in parts if part.quantized is not None])
    for part in parts:
        kind = part.graphed if cuda_graphs and part.graphed is not None else part.fast
        kind = part.quantized if part.module in own else kind
        if kind is not None:
            part.module.__class__ = kind
        if part.row is None:
            _forget_options(part.module)
            if precision in ("bf16", "fp16") and part.fast is not None:
                setattr(part.module, PRECISION, precision)
            if cuda_graphs:
                setattr(part.module, GRAPHS, Graphs())
    for module in model.modules():
        fp8.detach(module)
    fp8.attach(model, own)
    return model


def _quantize(
    model: nn.Module, parts: list[Part], precision: str, calibration: Any
) -> dict[nn.Module, fp8.Quantized]:
    """The e4m3 form of each block for ``precision="fp8"``; nothing for any other."""
    if precision != "fp8":
        if calibration is not None:
            raise ValueError(f"calibration is for precision='fp8', not {precision!r}")
        return {}
    if calibration is None:
        raise ValueError(
            "precision='fp8' needs calibration: images, what fastvit.calibrate(model, images) "
            "gave, or the file that it was saved to"
        )
    if (problem := _fp8_problem(model)) is not None:
        raise RuntimeError(f"precision='fp8' cannot run here: {problem}")
    blocks = quantizable(model, parts)
    if isinstance(calibration, (str, os.PathLike)):
        calibration = Calibration.load(calibration)
    elif not isinstance(calibration, Calibration):
        calibration = observe(model, blocks, calibration)
    scales = {part.module: calibration.scales(name) for name, part in blocks.items()}
    return {block: fp8.Quantized(scale) for block, scale in scales.items()}


def _fp8_problem(model: nn.Module) -> str | None:
    parameter = next(model.parameters())
    return fp8_problem(parameter.device) if uses_triton(parameter) else None


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
    for module in model.modules():
        _seen.forget(module)
        if original_of(type(module)) is not type(module):
            module.__class__ = original_of(type(module))
            _forget_options(module)
            fp8.detach(module)
    return model


def register_transformers() -> None:
    """Make ``attn_implementation="fastvit"`` known to transformers, its mask included: a model
    built with it, or given it by ``set_attn_implementation``, runs `fastvit.ops.attention`.

    The first `accelerate` of a model of transformers, and ``import
    fastvit.accelerate.transformers``, do the same. An accelerated model needs no such setting.

    Raises:
        ImportError: transformers is not installed.
    """
    from fastvit.accelerate import transformers

    transformers.register()


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
    if cuda_graphs and all(part.graphed is None for part in parts):
        raise ValueError(
            "cuda_graphs=True needs a ViT of timm, torchvision or fastvit inside the model"
        )
    autocast = precision in ("bf16", "fp16")
    if autocast and not any(part.row is None and part.fast for part in parts):
        raise ValueError(
            f"precision={precision!r} needs a ViT of timm or torchvision inside the model, and "
            "there is none; wrap its forward in torch.autocast instead"
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
