"""Which kernel every linear and attention of a model takes on a GPU that is not here, and why not
Hopper's: `fastvit coverage --arch`.

A model of its own size is accelerated and run on tensors that nobody writes, on the CPU, with every
launch kept and none made; what each launcher decided is counted.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from fastvit._compat import import_timm
from fastvit.accelerate import accelerate
from fastvit.check.launches import Unwritten, recorded
from fastvit.check.models import fill_buffers
from fastvit.kernels import _device, _hopper
from fastvit.kernels._backend import describe

PYTORCH = "PyTorch's own: a head, a bias made by an MLP, or a layer that accelerate leaves"
_PRODUCTS = {"addmm": "linear", "mm": "linear", "bmm": "attention", "baddbmm": "attention"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What launchers decided for one shape.

    Attributes:
        op: ``linear`` or ``attention``.
        sizes: (M, N, K), or (B, H, N, M, d) as in `kernels/attention`.
        kernel: of Hopper's, by the name that a tuning table has for it; None for another one.
        reason: why another one runs.
        count: how often in one forward.
    """

    op: str
    sizes: tuple[int, ...]
    kernel: str | None
    reason: str | None
    count: int


@dataclasses.dataclass(frozen=True)
class Chosen:
    """One architecture; `raised` is what went wrong."""

    architecture: str
    choices: tuple[Choice, ...] = ()
    raised: str | None = None


class _Asking(Unwritten):
    """Collects launchers' answers, also those that they gave before and keep."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_hopper.Answer] = []
        self.known: dict[Any, list[_hopper.Answer]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.name().removeprefix("aten::").removesuffix(".default")
        if name in _PRODUCTS or name.startswith("_scaled_dot_product"):
            op = _PRODUCTS.get(name, "attention")
            out = result[0] if isinstance(result, tuple) else result
            self.found.append(_hopper.Answer(op, tuple(out.shape), PYTORCH))
        return result

    def run_op(self, name: str, args: tuple[Any, ...]) -> Any:
        key = name, *(describe(x) if isinstance(x, torch.Tensor) else x for x in args)
        if key not in self.known:
            _device.forget()
        with _hopper.answers() as given:
            result = super().run_op(name, args)
        self.found += self.known.setdefault(key, given)
        return result


@torch.no_grad()
def kernels_of(architecture: str, arch: str = "sm90", batch: int = 256) -> Chosen:
    """Of timm's `architecture` in bfloat16, one forward of `batch` images. What raises is reported,
    never raised.

    Args:
        arch: as `_device.architecture` gives it.
    """
    try:
        model: Any = import_timm().create_model(architecture, device="meta").to(torch.bfloat16)
        model = model.to_empty(device="cpu").eval()
        fill_buffers(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that it changed nothing
            accelerate(model)
        images = torch.empty(batch, *model.pretrained_cfg["input_size"], dtype=torch.bfloat16)
        with _device.emulate(arch), recorded(), _Asking() as asking:
            model(images)
    except Exception as error:  # whatever a library raises, the others are asked
        return Chosen(
            architecture, raised=" ".join(f"{type(error).__name__}: {error}".split())[:300]
        )
    finally:
        gc.collect()
    answers = Counter((a.op, a.sizes, _name(a.choice), _reason(a.choice)) for a in asking.found)
    return Chosen(architecture, tuple(Choice(*key, count) for key, count in answers.items()))


def _name(choice: Any) -> str | None:
    return None if isinstance(choice, str) else choice.name


def _reason(choice: Any) -> str | None:
    return choice if isinstance(choice, str) else None


def summary(rows: Iterable[Chosen]) -> list[dict[str, Any]]:
    """By op and by kernel or reason, the most frequent first: how often in how many models, and
    up to three of them."""
    counts: Counter[tuple[str, str | None, str | None]] = Counter()
    models: dict[Any, list[str]] = {}
    for row in rows:
        for choice in row.choices:
            key = choice.op, choice.kernel, choice.reason
            counts[key] += choice.count
            if row.architecture not in (named := models.setdefault(key, [])):
                named.append(row.architecture)
    return [
        {
            "op": op, "kernel": kernel, "reason": reason, "count": count,
            "models": len(models[op, kernel, reason]), "examples": models[op, kernel, reason][:3],
        }
        for (op, kernel, reason), count in counts.most_common()
    ]  # fmt: skip
