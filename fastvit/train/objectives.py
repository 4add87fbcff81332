"""What is minimised and what is measured: `fit` takes any pair of functions of these types.

Shape legend: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit._compat import import_torchvision
from fastvit.train.data import NO_LABEL, Batch
from fastvit.train.distributed import all_sum
from fastvit.train.recipe import Recipe

LossFn = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
"""(module, batch) to the batch's mean loss, and other means to log by name, all scalars. `module`
is the one to call: it may be wrapped for several processes. The images are float32, normalised."""

EvalFn = Callable[[nn.Module, Iterable[Batch]], dict[str, Any]]
"""(module in eval mode, normalised batches) to numbers by name, the same on every rank. Rows whose
target is `NO_LABEL` do not count."""


def classification_loss(recipe: Recipe, num_classes: int) -> LossFn:
    """Cross-entropy with the recipe's label smoothing, mixup and cutmix; logs ``accuracy``.

    After mixup an image counts as right where the heavier class of its target is predicted.

    Raises:
        ImportError: mixup or cutmix without torchvision.
    """
    mix = _mixing(recipe, num_classes)

    def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = mix(batch.images, batch.targets)
        logits = module(images).float()  # (B, K)
        value = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
        hard = targets if targets.dim() == 1 else targets.argmax(1)
        accuracy = (logits.detach().argmax(1) == hard).float().mean()
        return value, {"accuracy": accuracy}

    return loss


def _mixing(recipe: Recipe, num_classes: int) -> Callable[[Tensor, Tensor], Any]:
    if not (recipe.mixup or recipe.cutmix):
        return lambda images, targets: (images, targets)
    import_torchvision()
    from torchvision.transforms import v2

    choices = [
        kind(alpha=alpha, num_classes=num_classes)
        for kind, alpha in ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix))
        if alpha
    ]
    return v2.RandomChoice(choices)


def classification_metrics(module: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
    """Over all ranks: ``loss`` (plain cross-entropy), ``top1`` and ``top5`` in [0, 1], ``images``,
    and for each class ``per_class`` (accuracy, None without images)."""
    sums: Tensor | None = None  # loss, top-1, top-5; then right and all for each class
    for batch in batches:
        logits = module(batch.images).float()  # (B, K)
        k = logits.shape[1]
        if sums is None:
            sums = torch.zeros(3 + 2 * k, dtype=torch.float64, device=logits.device)
        counted = batch.targets != NO_LABEL
        logits, targets = logits[counted], batch.targets[counted]
        if len(targets) == 0:
            continue
        best = logits.topk(min(5, k)).indices == targets[:, None]  # (B, 5)
        sums[0] += F.cross_entropy(logits, targets, reduction="sum")
        sums[1] += best[:, 0].sum()
        sums[2] += best.sum()
        sums[3 : 3 + k] += torch.bincount(targets[best[:, 0]], minlength=k)
        sums[3 + k :] += torch.bincount(targets, minlength=k)
    if sums is None:
        raise ValueError("there are no images to evaluate on")
    loss, top1, top5, *classes = all_sum(sums).tolist()
    right, count = classes[: len(classes) // 2], classes[len(classes) // 2 :]
    images = sum(count)
    if images == 0:
        raise ValueError("there are no readable images to evaluate on")
    return {
        "loss": loss / images,
        "top1": top1 / images,
        "top5": top5 / images,
        "images": int(images),
        "per_class": [r / n if n else None for r, n in zip(right, count, strict=True)],
    }


def loss_metrics(loss: LossFn) -> EvalFn:
    """An evaluation that averages a loss, and what it logs, over the held-out images."""

    def evaluate(module: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        sums: Tensor | None = None
        names: list[str] = []
        for batch in batches:
            counted = batch.targets != NO_LABEL
            rows = int(counted.sum())
            if rows:  # a batch of padding still runs: a sharded module needs every rank
                batch = batch._replace(  # noqa: PLW2901
                    images=batch.images[counted], targets=batch.targets[counted]
                )
            value, others = loss(module, batch)
            names = ["loss", *others]
            values = torch.stack([value, *others.values()]).double() * rows
            values = torch.cat(
                [values.nan_to_num() if rows == 0 else values, values.new_tensor([rows])]
            )
            sums = values if sums is None else sums + values
        if sums is None:
            raise ValueError("there are no images to evaluate on")
        *totals, count = all_sum(sums).tolist()
        return {name: total / count for name, total in zip(names, totals, strict=True)}

    return evaluate
