"""Whole models and training steps: ours beside timm, eager and compiled."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastvit import accelerate, numerics
from fastvit._compat import import_timm
from fastvit.bench.ops import backend_for, on_backend
from fastvit.bench.report import Result, checked_numerics
from fastvit.bench.timing import OURS, Race, race, rotating

IMAGE_SETS = 4  # rotated through
CHECKED_IMAGES = 4  # the numerics check runs in float64, at most this many images
QUICK_MODELS, CPU_MODELS = ("vit_tiny_patch16_224",), ("vit_small_patch16_224",)
GPU_MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
CPU_BATCHES, GPU_BATCHES = (1, 8), (1, 8, 32, 128, 256)


def default_models(device: torch.device, *, quick: bool) -> tuple[str, ...]:
    """Names to time where none is given."""
    return QUICK_MODELS if quick else GPU_MODELS if device.type == "cuda" else CPU_MODELS


def default_batches(device: torch.device, *, quick: bool) -> tuple[int, ...]:
    """Batch sizes to time where none is given."""
    return (1,) if quick else GPU_BATCHES if device.type == "cuda" else CPU_BATCHES


def bench_model(
    kind: Literal["model", "train"],
    name: str,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    quick: bool,
    budget_s: float,
) -> Result:
    """Time inference, or one training step (forward, backward, SGD), of timm's `name`.

    Inference runs in `dtype`; a training step keeps float32 parameters and runs under autocast to
    `dtype`. Nothing is timed if the numerics fail on the path that would be.

    Raises:
        ImportError: timm is not installed.
        RuntimeError: timm knows no such model.
    """
    train = kind == "train"
    model = _timm_model(name, seed).to(device)
    model = model.train() if train else model.to(dtype).eval()
    fast = accelerate(copy.deepcopy(model))
    size = model.default_cfg["input_size"]
    images = [
        _randn(batch, *size, seed=seed + i).to(device, torch.float32 if train else dtype)
        for i in range(IMAGE_SETS)
    ]
    on_ours = functools.partial(on_backend, backend_for(device))
    autocast = dtype if train and dtype != torch.float32 else None
    checked = checked_numerics(
        lambda: on_ours(numerics.compare_models)(
            copy.deepcopy(fast).eval(),
            copy.deepcopy(model).eval(),
            images[0][:CHECKED_IMAGES],
            gradients=_watched(model) if train else (),
            seed=seed,
            autocast=autocast,
        )
    )
    result = Race()
    if checked["passed"]:
        torch.compiler.reset()
        prepare = functools.partial(
            _job, batch=batch, device=device, train=train, autocast=autocast
        )
        jobs = {OURS: on_ours(prepare(fast))}
        jobs |= {peer: prepare(m) for peer, m in _peers(model, device, batch, train, quick)}
        works = rotating(jobs, [{"x": x} for x in images])
        result = race(works, budget_s=budget_s, min_rounds=5, device=device)
    return Result(
        kind=kind,
        name=name,
        case=f"batch {batch}",
        dtype=str(dtype).removeprefix("torch."),
        race=result,
        numerics=checked,
        flops=_flops(name, batch, train),
        batch=batch,
    )


def _timm_model(name: str, seed: int) -> Any:
    """timm's model with weights of `numerics.randomise`, so that its check means something."""
    model = import_timm().create_model(name, num_classes=1000)
    numerics.randomise(model, seed)
    return model


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _watched(model: nn.Module) -> list[str]:
    """A few parameters from the first to the last."""
    names = [name for name, _ in model.named_parameters()]
    return [names[0], names[len(names) // 2], names[-2]]


def _peers(
    model: nn.Module, device: torch.device, batch: int, train: bool, quick: bool
) -> Iterator[tuple[str, nn.Module]]:
    """timm eager and compiled. A training step changes weights, so there each has its own."""
    own = copy.deepcopy if train else lambda module: module
    yield "timm", model
    yield "timm + torch.compile", torch.compile(own(model), dynamic=False)  # type: ignore
    if device.type == "cuda" and batch == 1 and not train:
        yield "timm + reduce-overhead", torch.compile(model, mode="reduce-overhead")  # type: ignore
    if device.type == "cuda" and not quick:
        yield "timm + max-autotune", torch.compile(own(model), mode="max-autotune")  # type: ignore


def _job(
    model: nn.Module, *, batch: int, device: torch.device, train: bool, autocast: torch.dtype | None
) -> Callable[..., object]:
    """What is timed, of images `x`: a forward without gradients, or a training step."""
    if not train:
        return torch.inference_mode()(model.__call__)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    labels = torch.randint(1000, (batch,), device=device)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=bool(autocast)):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()

    return step


def _flops(name: str, batch: int, train: bool) -> int:
    """As PyTorch counts them, on timm's own model without storage."""
    with torch.device("meta"):
        model = import_timm().create_model(name, num_classes=1000)
        images = torch.empty(batch, *model.default_cfg["input_size"])
    with FlopCounterMode(display=False) as counter:
        logits = model(images)
        if train:
            logits.sum().backward()
    return counter.get_total_flops()
