"""Whole models and training steps: ours beside timm, transformers and torchvision, eager and
compiled."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastvit import accelerate, create_model, list_models, numerics, ops
from fastvit._compat import import_timm
from fastvit.bench import peers
from fastvit.bench.ops import backend_for, on_backend
from fastvit.bench.report import Result, checked_numerics
from fastvit.bench.timing import OURS, Race, is_ours, race, reason, rotating
from fastvit.kernels._device import fp8_problem

IMAGE_SETS = 4  # rotated through
CHECKED_IMAGES = 4  # the numerics check runs in float64, at most this many images
QUICK_MODELS, CPU_MODELS = ("vit_tiny_patch16_224",), ("vit_small_patch16_224",)
GPU_MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
OWN_MODEL, GRAPHED = f"{OURS} create_model", f"{OURS} + CUDA graphs"
FP8 = f"{OURS} + fp8"
COMPILED, TORCHAO = "timm + torch.compile", "timm + torchao fp8 + max-autotune"
# what the waterfall climbs by; a contender that was not timed is a step left out
TECHNIQUES = {
    "timm": [],
    OURS: ["Triton kernels"],
    GRAPHED: ["Triton kernels", "CUDA graphs"],
    FP8: ["Triton kernels", "fp8"],
    f"{FP8} + CUDA graphs": ["Triton kernels", "CUDA graphs", "fp8"],
}
MIN_FP8_COSINE = 0.98  # of an image's logits with the model's own, for fp8's time to be reported
Level = Literal["few", "timm", "all"]  # how many peers, see `_peers`
CPU_BATCHES, GPU_BATCHES = (1, 8), (1, 8, 32, 128, 256)


def default_models(device: torch.device, *, quick: bool) -> tuple[str, ...]:
    """Names to time where none is given."""
    return QUICK_MODELS if quick else GPU_MODELS if device.type == "cuda" else CPU_MODELS


def default_batches(device: torch.device, *, quick: bool) -> tuple[int, ...]:
    """Batch sizes to time where none is given."""
    return (1,) if quick else GPU_BATCHES if device.type == "cuda" else CPU_BATCHES


@numerics.exact_convolutions
def bench_model(
    kind: Literal["model", "train"],
    name: str,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    level: Level,
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
    size = model.default_cfg["input_size"]
    images = [
        _randn(batch, *size, seed=seed + i).to(device, torch.float32 if train else dtype)
        for i in range(IMAGE_SETS)
    ]
    on_ours = functools.partial(on_backend, backend_for(device))
    autocast = dtype if train and dtype != torch.float32 else None
    shown = images[0][:CHECKED_IMAGES]

    def check(fast: nn.Module) -> dict[str, Any]:
        return checked_numerics(
            lambda: on_ours(numerics.compare_models)(
                copy.deepcopy(fast).eval() if train else fast,
                copy.deepcopy(model).eval() if train else model,
                shown,
                gradients=_watched(model) if train else (),
                seed=seed,
                autocast=autocast,
            )
        )

    def check_graphs(fast: nn.Module) -> dict[str, Any]:
        # without the hook of compare_models, beside which a graph would not be used
        wide = copy.deepcopy(model).double()
        plain = lambda x: (wide if x.dtype == torch.float64 else model)(x)  # noqa: E731
        return checked_numerics(lambda: on_ours(numerics.compare)(fast, plain, {"x": shown}))

    fast = accelerate(copy.deepcopy(model))
    checked = check(fast)
    result, techniques = Race(), {}
    if checked["passed"]:
        torch.compiler.reset()
        prepare = functools.partial(
            _job, batch=batch, device=device, train=train, autocast=autocast
        )
        jobs, failed = {OURS: on_ours(prepare(fast))}, {}
        contenders = [
            *_forms(name, model, images[0], train, check, check_graphs),
            *_peers(model, device, batch, train, level),
        ]
        for contender, build in contenders:
            try:
                job = prepare(build())
            except Exception as error:
                failed[contender] = reason(error)
                continue
            jobs[contender] = on_ours(job) if is_ours(contender) else job
        works = rotating(jobs, [{"x": x} for x in images])
        result = race(works, budget_s=budget_s, min_rounds=5, device=device, bounds=(TORCHAO,))
        result.failed |= failed
        techniques = {key: TECHNIQUES[key] for key in TECHNIQUES if key in result.timings}
    return Result(
        kind=kind,
        name=name,
        case=f"batch {batch}",
        dtype=str(dtype).removeprefix("torch."),
        race=result,
        numerics=checked,
        flops=_flops(name, batch, train),
        batch=batch,
        techniques=techniques,
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


Builder = Callable[[], nn.Module]
Check = Callable[[nn.Module], dict[str, Any]]


def _forms(
    name: str, model: nn.Module, images: Tensor, train: bool, check: Check, check_graphs: Check
) -> Iterator[tuple[str, Builder]]:
    """fastvit in its other forms; each has to pass the numerics by itself, but fp8, whose logits
    have to point where the model's do."""

    def own() -> nn.Module:
        built = create_model(name, num_classes=1000).to(next(model.parameters()))
        built.load_state_dict(model.state_dict())
        return built.train(model.training)

    def form(**options: Any) -> nn.Module:
        return accelerate(copy.deepcopy(model), **options)

    def graphed(**options: Any) -> nn.Module:
        fast = form(cuda_graphs=True, **options)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # else it would run without a graph
            for other in (images, torch.randn_like(images[:CHECKED_IMAGES])):
                fast(other)  # captures, so that the check replays
        return fast

    if name in list_models():
        yield OWN_MODEL, functools.partial(_passed, own, check)
    if train:
        return
    device = images.device
    fp8: dict[str, Any] = {"precision": "fp8", "calibration": images[:CHECKED_IMAGES]}
    check_fp8 = functools.partial(_check_fp8, model, images[:CHECKED_IMAGES])
    has_fp8 = backend_for(device) == "triton" and fp8_problem(device) is None
    if has_fp8:
        yield FP8, functools.partial(_passed, functools.partial(form, **fp8), check_fp8)
    if images.is_cuda:
        yield GRAPHED, functools.partial(_passed, graphed, check_graphs)
        if has_fp8:
            build = functools.partial(graphed, **fp8)
            yield f"{FP8} + CUDA graphs", functools.partial(_passed, build, check_fp8)


def _check_fp8(model: nn.Module, images: Tensor, fast: nn.Module) -> dict[str, Any]:
    """As `checked_numerics`, by `MIN_FP8_COSINE`; the ratio is that of 1 - cosine to what it
    allows."""
    with torch.inference_mode(), ops.backend(backend_for(images.device)):
        ours, own = fast(images).double(), model(images).double()
    cosine = float(F.cosine_similarity(ours, own, dim=1).min())
    ratio = (1 - cosine) / (1 - MIN_FP8_COSINE)
    return {"passed": ratio <= 1, "ratio": ratio, "error": None}


def _passed(build: Builder, check: Check) -> nn.Module:
    form = build()
    checked = check(form)
    if not checked["passed"]:
        raise ValueError(checked["error"] or f"numerics fail, ratio {checked['ratio']:.3g}")
    return form


def _peers(
    model: nn.Module, device: torch.device, batch: int, train: bool, level: Level
) -> Iterator[tuple[str, Builder]]:
    """timm eager and compiled; from level ``timm`` on with max-autotune, also of torchao's e4m3
    linears (no peer of ours in full precision), and at ``all`` transformers and torchvision.

    A training step changes weights, so there each has its own.
    """
    gpu = device.type == "cuda"

    def compiled(build: Builder, **options: Any) -> Builder:
        def wrap() -> nn.Module:
            return torch.compile(build(), dynamic=False, **options)  # type: ignore

        return wrap

    def timm() -> nn.Module:
        return copy.deepcopy(model) if train else model

    yield "timm", lambda: model
    yield COMPILED, compiled(timm)
    if gpu and batch == 1 and not train:
        yield "timm + reduce-overhead", compiled(timm, mode="reduce-overhead")
    if gpu and level != "few":
        yield "timm + max-autotune", compiled(timm, mode="max-autotune")
        if not train and fp8_problem(device) is None:
            yield (
                TORCHAO,
                compiled(functools.partial(peers.torchao_fp8, model), mode="max-autotune"),
            )
    if level != "all":
        return
    hf = functools.partial(peers.transformers_vit, model)
    yield "transformers", hf
    yield "transformers + torch.compile", compiled(hf)
    yield "torchvision", functools.partial(peers.torchvision_vit, model)


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
