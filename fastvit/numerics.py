"""Error of an op or model against float64, beside PyTorch's own error in the same dtype.

Truth is the reference in float64 on the rounded inputs. The yardstick is the same reference in the
tested dtype, run by plain PyTorch. Ours passes while its maximum and RMS error stay within twice
the yardstick's plus one unit in the last place (ULP) of the largest true value.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops

if TYPE_CHECKING:
    from fastvit.kernels._spec import Case, OpSpec

ALLOWED_RATIO = 2.0

# a decorator: cuDNN's convolutions would take TF32 in float32, three digits less than a linear has,
# and timm's patch embedding with them
exact_convolutions = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@dataclass(frozen=True)
class Row:
    """Errors of one tensor: the output, or the gradient of one input."""

    name: str  # "output" or "grad of <input>"
    max_error: float
    rms_error: float
    eager_max_error: float
    eager_rms_error: float
    ulp: float  # of the largest true value, in the output's dtype

    @property
    def ratio(self) -> float:
        """Our error over eager's, the worse of maximum and RMS; infinity beside an exact eager."""
        pairs = (
            (self.max_error, self.eager_max_error),
            (self.rms_error, self.eager_rms_error),
        )
        return max(ours / eager if eager else math.inf if ours else 0.0 for ours, eager in pairs)

    @property
    def passed(self) -> bool:
        """Within the policy; NaN and infinity never are."""
        return (
            math.isfinite(self.max_error)  # else infinity would pass beside eager's infinity
            and self.max_error <= ALLOWED_RATIO * self.eager_max_error + self.ulp
            and self.rms_error <= ALLOWED_RATIO * self.eager_rms_error + self.ulp
        )


@dataclass(frozen=True)
class Report:
    """The rows of one comparison, the output first."""

    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Every row within the policy."""
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(
            f"{row.name}: max {row.max_error:.2e} (eager {row.eager_max_error:.2e}), "
            f"rms {row.rms_error:.2e} (eager {row.eager_rms_error:.2e}), "
            f"ulp {row.ulp:.1e}: {'pass' if row.passed else 'FAIL'}"
            for row in self.rows
        )


@exact_convolutions
def compare(
    fast: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    *,
    backward: bool = False,
    seed: int = 0,
) -> Report:
    """Errors of `fast` against `reference` in float64, beside `reference` in the inputs' dtype.

    Args:
        fast, reference: take `inputs` as keyword arguments, give one tensor.
        inputs: tensors (floating ones of one dtype) and options.
        backward: also compare the gradient of every floating input, for a random cotangent.
        seed: of the cotangent.

    Returns:
        A `Report`; its rows are ``output``, then ``grad of <input>``.

    Source: the policy of FlashAttention's tests (2x PyTorch's own error), bounded in RMS as well.
    """
    wanted = [
        name
        for name, value in inputs.items()
        if backward and isinstance(value, Tensor) and value.is_floating_point()
    ]
    dtype = next(
        value.dtype
        for value in inputs.values()
        if isinstance(value, Tensor) and value.is_floating_point()
    )
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with ops.backend("torch"):
        truth = _run(reference, wide, wanted, seed, dtype)
        eager = _run(reference, inputs, wanted, seed, dtype)
    ours = _run(fast, inputs, wanted, seed, dtype)
    names = ["output"] + [f"grad of {name}" for name in wanted]
    return Report(
        tuple(
            measure(name, *tensors)
            for name, *tensors in zip(names, ours, truth, eager, strict=True)
        )
    )


def compare_case(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    seed: int = 0,
    backward: bool = False,
) -> Report:
    """`compare` an op with its reference on a case, drawn from `seed`."""
    inputs = spec.inputs(case, dtype, device, seed)
    return compare(spec.op, spec.reference, inputs, backward=backward, seed=seed)


def measure(name: str, ours: Tensor, truth: Tensor, eager: Tensor) -> Row:
    """The row of one tensor.

    Raises:
        ValueError: shapes that differ.
    """
    if not ours.shape == truth.shape == eager.shape:
        raise ValueError(
            f"{name}: shapes differ: ours {list(ours.shape)}, truth {list(truth.shape)}, "
            f"eager {list(eager.shape)}"
        )
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    return Row(
        name,
        *_errors(ours, truth),
        *_errors(eager, truth),
        ulp=torch.finfo(ours.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0,
    )


def _errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    if not value.numel():
        return 0.0, 0.0
    difference = (value.double() - truth).abs()
    # two equal infinities differ by nothing
    difference = torch.where(value.double() == truth, 0.0, difference)
    return float(difference.max()), float(difference.square().mean().sqrt())


def _run(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    wanted: list[str],
    seed: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The output and the gradients of the inputs named in `wanted`."""
    leaves = {
        name: value.detach().requires_grad_(name in wanted) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    with torch.set_grad_enabled(bool(wanted)):
        output = function(**leaves)
    if not wanted:
        return [output]
    cotangent = _cotangent(output, dtype, seed)
    grads = torch.autograd.grad(output, [leaves[name] for name in wanted], cotangent)
    return [output.detach(), *grads]


def _cotangent(output: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal, rounded to the tested `dtype` for float64 as well."""
    # inputs are drawn from `seed` too, and a norm's gradient for its own input is all rounding
    generator = torch.Generator().manual_seed(seed ^ 0x5EED)
    values = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return values.to(dtype).to(output)


# --------------------------------------------------------------------------- whole models


@dataclass(frozen=True)
class ModelReport(Report):
    """Rows ``logits``, ``pooled`` and gradients, and whose top class is float64's.

    An image counts as lost where the top class is not float64's although float64's margin is wider
    than the errors allowed to its two best logits.
    """

    images: int
    top1: int  # images on which our top class is float64's
    eager_top1: int
    lost: int
    unfused: tuple[str, ...] = ()  # modules of an accelerated model that run as they were

    @property
    def passed(self) -> bool:
        """Every row within the policy and no image lost."""
        return super().passed and self.lost == 0


@exact_convolutions
def compare_models(
    fast: nn.Module,
    eager: nn.Module,
    images: Tensor,
    *,
    gradients: Sequence[str] = (),
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> ModelReport:
    """Errors of one classifier against another with the same weights, run in float64.

    Args:
        fast, eager: in one dtype, with timm's ``head``.
        images: [B, C, H, W] of that dtype.
        gradients: parameters whose gradients are compared, for a random cotangent of the logits.
        seed: of the cotangent.
        autocast: run both (not the truth) under autocast to this dtype.

    Returns:
        A `ModelReport`; an accelerated `fast` takes the path that is set when this is called.
    """
    dtype = autocast or images.dtype
    run = functools.partial(_run_model, gradients=gradients, seed=seed, dtype=dtype)
    truth = run(copy.deepcopy(eager).double(), images.double())
    with torch.autocast(images.device.type, autocast or torch.bfloat16, enabled=bool(autocast)):
        yardstick = run(eager, images)
        ours = run(fast, images)
    names = ["logits", "pooled"] + [f"grad of {name}" for name in gradients]
    rows = tuple(
        measure(name, *tensors)
        for name, *tensors in zip(names, ours, truth, yardstick, strict=True)
    )
    allowed = ALLOWED_RATIO * rows[0].eager_max_error + rows[0].ulp
    best = truth[0].topk(2).values
    decided = best[:, 0] - best[:, 1] > 2 * allowed
    agrees = ours[0].argmax(-1) == truth[0].argmax(-1)
    eager_agrees = yardstick[0].argmax(-1) == truth[0].argmax(-1)
    return ModelReport(
        rows,
        images=len(images),
        top1=int(agrees.sum()),
        eager_top1=int(eager_agrees.sum()),
        lost=int((decided & ~agrees).sum()),
    )


def _run_model(
    model: nn.Module, images: Tensor, *, gradients: Sequence[str], seed: int, dtype: torch.dtype
) -> list[Tensor]:
    """Logits, pooled features (what the head is given) and gradients."""
    pooled: list[Tensor] = []
    head = cast(nn.Module, model.head)
    hook = head.register_forward_pre_hook(lambda _, args: pooled.append(args[0].detach()))
    try:
        with torch.set_grad_enabled(bool(gradients)):
            logits = model(images)
    finally:
        hook.remove()
    if not gradients:
        return [logits, *pooled]
    parameters = [model.get_parameter(name) for name in gradients]
    grads = torch.autograd.grad(logits, parameters, _cotangent(logits, dtype, seed))
    return [logits.detach(), *pooled, *grads]


def certify_model(
    name: str,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    depth: int | None = None,
    backward: bool = True,
    seed: int = 0,
) -> ModelReport:
    """`compare_models` for timm's `name`, accelerated and not, on photographs.

    Weights are drawn by `randomise`.

    Args:
        name: of a timm model that `fastvit.accelerate` takes.
        dtype: of weights and images.
        device: where all of it runs.
        depth: blocks to keep; None for all.
        backward: compare gradients too, of the first, the last and four parameters drawn between.
        seed: of weights and cotangent.

    Raises:
        ImportError: timm is not installed.
        RuntimeError: timm knows no such model.
        ValueError: nothing of the model runs on our kernels, so there is nothing to certify.
    """
    from fastvit._compat import import_timm
    from fastvit.accelerate import accelerate
    from fastvit.accelerate.find import find_parts
    from fastvit.accelerate.plan import make_plan

    shape = {} if depth is None else {"depth": depth}
    # some names, such as DINOv2's, come without a classifier
    eager = import_timm().create_model(name, num_classes=1000, **shape)
    randomise(eager, seed)
    eager = eager.to(device, dtype).eval()
    plan = make_plan(eager, find_parts(eager))
    if not any(row.fused for row in plan.rows):
        reasons = plan.note or "; ".join(sorted({str(row.reason) for row in plan.rows}))
        raise ValueError(f"nothing of {name} would run on our kernels: {reasons}")
    images = sample_images(eager.default_cfg["input_size"][1:], seed).to(device, dtype)
    names = [name for name, parameter in eager.named_parameters() if parameter.requires_grad]
    inner = random.Random(seed).sample(names[1:-1], min(4, len(names) - 2))
    gradients = [names[0], *sorted(inner, key=names.index), names[-1]] if backward else []
    fast = accelerate(copy.deepcopy(eager))
    report = compare_models(fast, eager, images, gradients=gradients, seed=seed)
    unfused = tuple(row.module for row in plan.rows if not row.fused)
    return dataclasses.replace(report, unfused=unfused)


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter afresh, in place, so that each of them matters to the output.

    At timm's initialisation biases are 0, norm weights 1, special tokens and LayerScales tiny, and
    attention scores so close to 0 that a wrong softmax scale is lost in bfloat16's rounding. Here
    matrices keep the size of what they are given, which makes scores of about 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        vector = max(parameter.shape, default=1) == parameter.numel()
        mean = float(vector and name.endswith(("weight", "gamma")))
        matrix = not vector and name.endswith("weight")
        std = (parameter.numel() / len(parameter)) ** -0.5 if matrix else 0.3
        values = torch.randn(parameter.shape, generator=generator) * std + mean
        parameter.data.copy_(values)


def sample_images(size: tuple[int, int], seed: int) -> Tensor:
    """[4, 3, H, W] float32: scikit-image's photographs where it is installed, else noise."""
    from fastvit import samples

    try:
        photos = [samples.photo(name) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    except ImportError:
        return torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(seed))
    images = torch.cat([samples.preprocess(photo, max(size)) for photo in photos])
    return F.interpolate(images, size)
