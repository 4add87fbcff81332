"""Models by name for commands that look at or export one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvit import samples
from fastvit.train.models import DEMO, Source, load_source

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
