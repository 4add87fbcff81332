"""Models for training: by name, from a run folder, and prepared for fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvit import samples
from fastvit._compat import hub_or_cache, import_timm
from fastvit.accelerate import accelerate
from fastvit.checkpoint import load_checkpoint, read_checkpoint
from fastvit.models import create_model
from fastvit.train.recipe import read_config
from fastvit.variants import list_models, unknown_model
from fastvit.vit import VisionTransformer

PRESETS: dict[str, dict[str, Any]] = {  # small models for the sets that packages ship
    "vit_digits": {
        "img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10,
        "embed_dim": 96, "depth": 3, "num_heads": 3,
    },
    "vit_mnist": {
        "img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10,
        "embed_dim": 96, "depth": 3, "num_heads": 3,
    },
}  # fmt: skip
PIXELS = ("mean", "std", "crop_pct", "interpolation", "crop_mode")  # fields of `DataConfig`
DEMO = "demo"  # the trained DINOv2-S that needs no download


@dataclass(frozen=True)
class ModelConfig:
    """How to build a model.

    Args:
        name: of `PRESETS`, of fastvit (with timm's tag if wanted), or of timm.
        options: for its constructor, such as fields of `ViTConfig`.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def library(self) -> str:
        """``fastvit`` or ``timm``."""
        own = self.name in PRESETS or self.name.partition(".")[0] in list_models()
        return "fastvit" if own else "timm"


def build_model(config: ModelConfig, *, accelerated: bool = True) -> Any:
    """A new model, in training mode; `accelerated` is for timm's.

    Raises:
        ValueError: an unknown name, with the nearest, or options that do not fit.
        TypeError: an unknown option.
        ImportError: timm is needed and not installed.
    """
    options = dict(config.options)
    if config.name in PRESETS:
        return VisionTransformer(**{**PRESETS[config.name], **options})
    if config.library == "fastvit":
        return create_model(config.name, **options)
    model = _timm_model(config.name, options)
    return accelerate(model) if accelerated else model


def _timm_model(name: str, options: dict[str, Any]) -> Any:
    timm = import_timm()
    names = timm.list_models()
    if name.partition(".")[0] not in names:
        raise unknown_model(name, [*names, *PRESETS, DEMO])
    try:
        return timm.create_model(name, **options)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"timm's {name}: {error}") from error


@dataclass(frozen=True)
class Run:
    """A folder that `fit` wrote.

    Args:
        folder: of the run.
        config: its config.json.
    """

    folder: Path
    config: dict[str, Any]

    @property
    def model(self) -> ModelConfig:
        """How its model is built."""
        return ModelConfig(**self.config["model"])

    def weights(self, ema: bool | None = None) -> Path:
        """The file of its weights; `ema` None prefers the averaged ones.

        Raises:
            ValueError: the run is not finished, or has no average.
        """
        averaged, last = self.folder / "ema.safetensors", self.folder / "model.safetensors"
        if not last.exists():
            raise ValueError(f"{self.folder} has no model.safetensors: its training is not over")
        if ema and not averaged.exists():
            raise ValueError(f"{self.folder} has no ema.safetensors: it was trained without EMA")
        return last if ema is False or not averaged.exists() else averaged


def read_run(folder: Path) -> Run:
    """Raises:
    ValueError: `folder` is not that of a run with a model that can be rebuilt.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.json")
    config = read_config(file)
    if "model" not in config:
        raise ValueError(f"{file} does not say which model was trained")
    return Run(folder, config)


@dataclass(frozen=True)
class Source:
    """A model with trained weights.

    Args:
        model: with the weights.
        config: how it was built.
        run: where it is from, if from a run.
    """

    model: Any
    config: ModelConfig
    run: Run | None = None

    def pixels(self) -> dict[str, Any]:
        """`PIXELS` of the images that it was trained on."""
        if self.run is not None and "data" in self.run.config:
            data = self.run.config["data"]
            return {key: data[key] for key in PIXELS if key in data}
        return normalisation(self.model)

    def resized(self, img_size: int) -> Source:
        """The same for another image side; position embeddings are interpolated in 2-D.

        Raises:
            ValueError: the model takes no other image size.
        """
        if (img_size, img_size) == image_size(self.model):
            return self
        if not hasattr(self.model, "set_input_size"):
            raise ValueError(f"{self.config.name} does not take another image size")
        self.model.set_input_size(img_size=img_size)
        config = ModelConfig(self.config.name, {**self.config.options, "img_size": img_size})
        return Source(self.model, config, self.run)


def load_source(
    name: str,
    *,
    checkpoint: Path | None = None,
    ema: bool | None = None,
    options: Mapping[str, Any] | None = None,
    accelerated: bool = True,
) -> Source:
    """A trained model.

    Args:
        name: a run folder; ``demo``, a trained DINOv2-S that needs no download; or a model's name,
            whose pretrained weights timm fetches.
        checkpoint: weights to load instead.
        ema: of a run: the averaged weights or the last; None prefers the averaged.
        options: more for the model's constructor, where they change no weights.
        accelerated: as in `build_model`.

    Raises:
        ValueError: an unknown name, or weights that do not fit.
        ImportError: a package is not installed.
        OSError: weights cannot be fetched or read.
    """
    folder, extra = Path(name), dict(options or {})
    if folder.is_dir():
        run = read_run(folder)
        config = ModelConfig(run.model.name, {**run.model.options, **extra})
        source = Source(build_model(config, accelerated=accelerated), config, run)
        _load(source.model, checkpoint or run.weights(ema))
        return source
    if name == DEMO:
        if checkpoint is not None:
            raise ValueError(f"{DEMO!r} brings weights of its own; a checkpoint is for other names")
        options = {"img_size": 224, "num_classes": 0, **extra}
        config = ModelConfig(samples.DINOV2_SMALL, options)
        model = build_model(config)
        load_checkpoint(model, samples.dinov2_small(options["img_size"]))
        return Source(model, config)
    if checkpoint is None:
        pretrained = ModelConfig(name, {**extra, "pretrained": True})
        return Source(_fetch(pretrained, accelerated), ModelConfig(name, extra))
    config = ModelConfig(name, extra)
    source = Source(build_model(config, accelerated=accelerated), config)
    _load(source.model, checkpoint)
    return source


def _fetch(config: ModelConfig, accelerated: bool) -> Any:
    """A model with weights from the hub or from what was fetched before."""
    import_timm()
    try:
        with hub_or_cache():
            return build_model(config, accelerated=accelerated)
    except (OSError, RuntimeError) as error:
        why = str(error).partition(". ")[0].partition("\n")[0]
        raise OSError(
            f"the weights of {config.name} are not on this machine and cannot be fetched; give a "
            f"checkpoint's file instead ({why})"
        ) from error


def _load(model: nn.Module, path: Path) -> None:
    if isinstance(model, VisionTransformer):
        load_checkpoint(model, path)
        return
    try:
        model.load_state_dict(read_checkpoint(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error


def prepare_finetuning(source: Source, num_classes: int, *, freeze: bool = False) -> ModelConfig:
    """Give a trained model a new, zero linear head, as the ViT paper fine-tunes (section 3.2).

    Args:
        source: its model is changed in place.
        num_classes: of the new head.
        freeze: train the head only, a linear probe.

    Returns:
        How to build a model that takes the result's weights.
    """
    model, options = source.model, {**source.config.options, "num_classes": num_classes}
    if isinstance(model, VisionTransformer):
        model.reset_classifier(num_classes, zero_init=True)
        options["head"] = "linear"
    else:
        model.reset_classifier(num_classes)
        for parameter in model.get_classifier().parameters():
            nn.init.zeros_(parameter)
    if freeze:
        freeze_all_but_head(model)
    return ModelConfig(source.config.name, options)


def freeze_all_but_head(model: Any) -> None:
    """Only the classifier trains."""
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)


def image_size(model: Any) -> tuple[int, int]:
    """Height and width that a model takes."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or model.default_cfg["input_size"][1:]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_channels(model: Any) -> int:
    """Channels that a model takes."""
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def normalisation(model: Any) -> dict[str, Any]:
    """`PIXELS` that a model was trained with, as far as it says."""
    cfg = getattr(model, "default_cfg", None) or {}
    return {key: cfg[key] for key in PIXELS if cfg.get(key) is not None}


def count_parameters(model: nn.Module) -> int:
    """Of those that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] to what the model's classifier takes, [B, D]."""
    return model.forward_head(model.forward_features(images), pre_logits=True)
