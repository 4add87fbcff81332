"""Models by name, folder or file for commands that look at one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastvit import samples
from fastvit._compat import import_timm, import_transformers
from fastvit.checkpoint import pretrained_cfg, read_checkpoint
from fastvit.train.models import DEMO, PRESETS, ModelConfig, Source, build_model, load_source
from fastvit.train.recipe import read_config
from fastvit.variants import unknown_model

MODEL_HELP = (
    f"A run folder, a model by timm's name, or {DEMO!r}: a trained DINOv2-S that needs no download."
)
CHECKPOINT_HELP = "Weights: .safetensors or a torch file; else the pretrained ones are fetched."


def load_model(
    name: str, checkpoint: Path | None = None, img_size: int | None = None, **overrides: Any
) -> Source:
    """`load_source` in eval mode; ``demo`` at the size that it was trained for. `overrides` are
    options of the model's constructor.

    Raises:
        ImportError: a package that the model or its weights need is not installed.
        OSError: the weights cannot be fetched or read.
        ValueError: an unknown name, or a checkpoint or image size that does not fit.
    """
    img_size = samples.DINOV2_SIZE if name == DEMO and img_size is None else img_size
    options = overrides if img_size is None else {"img_size": img_size, **overrides}
    source = load_source(name, checkpoint=checkpoint, options=options)
    source.model.eval()
    return source


def bare_model(name: str) -> Any:
    """A model as its library builds it, on the meta device: modules and shapes, no values.

    Args:
        name: timm's, `DEMO` or one of `PRESETS`; a folder or config.json of a run, of transformers
            or of timm; or a file that timm's train.py saved.

    Raises:
        ImportError: the library is not installed.
        OSError, ValueError: an unknown name, with the nearest, or a file that names no model.
    """
    path = Path(name)
    with torch.device("meta"):
        if path.is_dir() or path.suffix == ".json":
            return _configured(path / "config.json" if path.is_dir() else path)
        if path.is_file():
            saved = read_checkpoint(path)
            if not isinstance(saved, Mapping) or not isinstance(saved.get("arch"), str):
                raise ValueError(f"{path} holds no name of a model: give the name itself")
            return _timm_model(saved["arch"])
        if os.sep in name:
            raise ValueError(f"{name} is neither a file or folder nor a model's name")
        if name in PRESETS:
            return build_model(ModelConfig(name))
        return _timm_model(samples.DINOV2_SMALL if name == DEMO else name)


def _configured(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} is not there: it would say which model this is")
    config = read_config(file)
    if "model_type" in config:
        transformers = import_transformers()
        found = transformers.AutoConfig.from_pretrained(file)
        kind = getattr(transformers, next(iter(config.get("architectures") or ()), ""), None)
        return kind(found) if kind else transformers.AutoModel.from_config(found)
    if "architecture" in config:
        return _timm_model(config["architecture"], config.get("model_args"))
    if "model" in config:
        return build_model(ModelConfig(**config["model"]), accelerated=False)
    raise ValueError(f"{file} names no model of transformers, timm or `fastvit train`")


def _timm_model(name: str, options: Mapping[str, Any] | None = None) -> Any:
    timm = import_timm()
    if name.partition(".")[0] not in (known := timm.list_models()):
        raise unknown_model(name, [*known, *PRESETS, DEMO])
    if "." in name:
        pretrained_cfg(name)  # refuses an unknown tag, with the ones there are
    return timm.create_model(name, **(options or {}))
