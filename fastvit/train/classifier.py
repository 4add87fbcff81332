"""Trained classifiers with the names of their classes and their own preprocessing.

Shape legend: B images, C channels, H, W image side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvit._compat import import_timm, import_transformers
from fastvit.accelerate import accelerate
from fastvit.train.data import DataConfig, transform
from fastvit.train.models import Source, image_channels, image_size, load_source
from fastvit.train.recipe import read_config

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Classifier:
    """A model in eval mode.

    Args:
        logits: of normalised images [B, C, H, W], [B, classes].
        model: what `logits` runs.
        prepare: images to [B, C, H, W], float32 and normalised as in the model's training.
        labels: names of the classes, in their order.
        labels_from: where they come from, in words.
    """

    logits: Callable[[Tensor], Tensor]
    model: Any
    prepare: Callable[[Sequence[Image]], Tensor]
    labels: tuple[str, ...]
    labels_from: str

    @torch.inference_mode()
    def probabilities(self, images: Sequence[Image], device: torch.device) -> Tensor:
        """Softmax of the logits, float32 [B, classes], on the CPU."""
        model_inputs = self.prepare(images).to(device)
        self.model.to(device)
        return self.logits(model_inputs).float().softmax(-1).cpu()


def load_classifier(
    name: str, *, checkpoint: Path | None = None, ema: bool | None = None, accelerated: bool = True
) -> Classifier:
    """A classifier whose every weight is trained.

    Args:
        name: a checkpoint folder of transformers, or what `load_source` takes.
        checkpoint, ema, accelerated: as there.

    Raises:
        ValueError: the model has no classifier, or as in `load_source`.
        ImportError, OSError: as in `load_source`.
    """
    file = Path(name) / "config.json"
    if file.is_file() and "model_type" in read_config(file):
        if checkpoint is not None:
            raise ValueError(f"{name} brings weights of its own; a checkpoint is for other names")
        return _transformers(Path(name), accelerated)
    source = load_source(name, checkpoint=checkpoint, ema=ema, accelerated=accelerated)
    if not source.model.num_classes:
        raise _no_classifier(name)
    labels, origin = _labels(source)
    return Classifier(source.model, source.model.eval(), prepare(source), labels, origin)


def _no_classifier(name: str) -> ValueError:
    return ValueError(
        f"{name} has no classifier: `fastvit embed` writes its features, `fastvit finetune` trains "
        "a classifier on it"
    )


def prepare(source: Source) -> Callable[[Sequence[Image]], Tensor]:
    """What makes images ready for a model: to [B, C, H, W], float32, resized, cropped and
    normalised as in its training.

    Raises:
        ValueError: the model takes no square images.
    """
    model = source.model
    height, width = image_size(model)
    if height != width:
        raise ValueError(f"the model takes {height}x{width} images; squares are needed")
    config = DataConfig("", height, image_channels(model), **source.pixels())
    resized, (mean, std) = transform(config, train=False), config.stats()

    return lambda images: (torch.stack([resized(each) for each in images]) / 255 - mean) / std


def _labels(source: Source) -> tuple[tuple[str, ...], str]:
    """Names of a model's classes, and where they are from."""
    count = source.model.num_classes
    if source.run is not None and len(names := source.run.config.get("classes", ())) == count:
        return tuple(names), "the run"
    import_timm()
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    if (subset := infer_imagenet_subset({"num_classes": count})) is not None:
        info = ImageNetInfo(subset)
        named = tuple(info.index_to_description(i) for i in range(count))
        return named, f"{subset}, by the number of classes"
    return tuple(map(str, range(count))), "none, these are numbers"


def _transformers(folder: Path, accelerated: bool) -> Classifier:
    transformers = import_transformers()
    if not (folder / "preprocessor_config.json").is_file():
        raise ValueError(f"{folder} has no preprocessor_config.json, which says how images are fed")
    kind: Any = next(iter(read_config(folder / "config.json").get("architectures") or ()), "")
    if "ForImageClassification" not in kind or not hasattr(transformers, kind):
        raise _no_classifier(str(folder))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model, loaded = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{folder} has no weights for {', '.join(missing[:4])}")
    model.eval()
    names: Mapping[int, str] = model.config.id2label
    return Classifier(
        lambda images: model(pixel_values=images).logits,
        accelerate(model) if accelerated else model,
        lambda images: processor(images=list(images), return_tensors="pt")["pixel_values"],
        tuple(names[i] for i in range(len(names))),
        "config.json",
    )
