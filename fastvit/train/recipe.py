"""What a training run does, as data: optimizer, schedule, regularisation, seed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

OPTIMIZERS = {  # defaults of lr and weight_decay
    "adam": (1e-3, 0.0),
    "adamw": (1e-3, 0.05),
    "sgd": (0.03, 0.0),
}


@dataclass(frozen=True)
class Recipe:
    """Everything about the training itself; the same recipe gives the same weights.

    Args:
        epochs: passes over the training images.
        batch_size: images of one optimizer step, over all ranks and micro-batches.
        accumulate: micro-batches of a step. `batch_size` is divisible by this times the ranks.
        optimizer: ``adam``, ``adamw`` or ``sgd`` (Nesterov off).
        lr: the highest learning rate; None for the optimizer's default.
        weight_decay: of matrices only; in ``adamw`` decoupled, else added to the gradient. None
            for the optimizer's default.
        betas: of Adam and AdamW.
        momentum: of SGD.
        warmup_epochs: linear rise from 0 to `lr`; then a cosine down to `min_lr`.
        min_lr: where the cosine ends.
        clip: largest norm of the whole gradient; 0 for no clipping.
        label_smoothing: share of the target spread over all classes.
        mixup, cutmix: alpha of the Beta distribution (arXiv:1710.09412, 1905.04899), 0 for none;
            with both, each batch draws one.
        ema: decay of an exponential moving average of the weights, which is evaluated too; 0 for
            none. Early steps use min(ema, (1 + t) / (10 + t)).
        amp: run forward and loss under bfloat16 autocast.
        seed: of order, augmentation, dropout and DropPath.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        save_every: steps between checkpoints; 0 for one an epoch.
        log_every: steps between log rows, and between looks at a stop signal with several ranks.

    Raises:
        ValueError: naming the field, where a value makes no sense.
    """

    epochs: int = 30
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    warmup_epochs: float = 2.0
    min_lr: float = 0.0
    clip: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    amp: bool = False
    seed: int = 0
    eval_every: int = 1
    save_every: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        for field, default in zip(("lr", "weight_decay"), OPTIMIZERS[self.optimizer], strict=True):
            if getattr(self, field) is None:
                object.__setattr__(self, field, default)
        object.__setattr__(self, "betas", tuple(self.betas))
        for field in ("epochs", "batch_size", "accumulate", "eval_every", "log_every"):
            self._check(field, "at least 1", lambda value: value >= 1)
        for field in (
            "weight_decay", "warmup_epochs", "min_lr", "clip", "mixup", "cutmix", "save_every",
        ):  # fmt: skip
            self._check(field, "at least 0", lambda value: value >= 0)
        for field in ("label_smoothing", "momentum", "ema"):
            self._check(field, "in [0, 1)", lambda value: 0 <= value < 1)
        self._check("lr", "above 0", lambda value: value > 0)
        self._check("betas", "two numbers in [0, 1)", lambda b: len(b) == 2 and _unit(*b))
        self._check("min_lr", f"at most lr={self.lr}", lambda value: value <= self.lr)
        self._check("warmup_epochs", f"at most epochs={self.epochs}", lambda w: w <= self.epochs)

    def _check(self, field: str, wanted: str, holds: Any) -> None:
        value = getattr(self, field)
        finite = all(map(math.isfinite, value if isinstance(value, tuple) else (value,)))
        if not (finite and holds(value)):
            raise ValueError(f"{field}={value!r} must be {wanted}")

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0."""
        assert self.lr is not None
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        rest = max(self.epochs * steps_per_epoch - warmup, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min((step - warmup) / rest, 1)))
        return self.min_lr + (self.lr - self.min_lr) * cosine


def _unit(*values: float) -> bool:
    return all(0 <= value < 1 for value in values)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``name: old, now new`` for every value of two JSON-like dicts that is not the same."""
    plain = {
        key: [list(v) if isinstance(v, tuple) else v for v in (old.get(key), new.get(key))]
        for key in sorted(old.keys() | new.keys())
    }
    return [f"{key}: {a!r}, now {b!r}" for key, (a, b) in plain.items() if a != b]


def class_differences(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """What has become of a folder's classes: labels are their places in this order."""
    gone = [f"class {name!r} is gone" for name in old if name not in new]
    added = [f"class {name!r} is new" for name in new if name not in old]
    moved = "the classes are in another order"
    return [*gone, *added] or ([moved] if list(old) != list(new) else [])


def read_config(file: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        ValueError: it is damaged, with its name and what is wrong.
    """
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return config


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that train, those that decay first.

    No decay for anything with fewer than two dimensions (biases, norms, LayerScale), nor for what
    a module's own ``no_weight_decay()`` names (tokens, position embeddings).
    """
    kept = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()  # pyright: ignore[reportCallIssue]
    }
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (no_decay if parameter.dim() < 2 or name in kept else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over `param_groups`.

    Raises:
        ValueError: no parameter of the model trains.
    """
    assert recipe.lr is not None
    assert recipe.weight_decay is not None
    groups = param_groups(model, recipe.weight_decay)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient: nothing to train")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(groups, lr=recipe.lr, betas=recipe.betas)


def stable_seed(*parts: int) -> int:
    """One seed from several numbers, the same in every process and on every machine."""
    text = " ".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
