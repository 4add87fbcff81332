"""Models by name for commands that look at or export one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvit import samples

DEMO = "demo"  # the trained DINOv2-S that needs no download
MODEL_HELP = f"A model by timm's name, or {DEMO!r}: a trained DINOv2-S that needs no download."
CHECKPOINT_HELP = "Weights: .safetensors or a torch file; else the pretrained ones are fetched."


def load_model(
    name: str, checkpoint: Path | None = None, img_size: int | None = None, **overrides: Any
) -> Any:
    """A model with trained weights, in eval mode: fastvit's where it knows `name`, else timm's,
    accelerated. `overrides` are options of its constructor.

    Raises:
        ImportError: a package that the model or its weights need is not installed.
        OSError: the weights cannot be fetched or read.
        ValueError: an unknown name, or a checkpoint or image size that does not fit.
    """
    import fastvit

    options = overrides if img_size is None else {"img_size": img_size, **overrides}
    if name == DEMO:
        if checkpoint is not None:
            raise ValueError(f"{DEMO!r} brings weights of its own; --checkpoint is for other names")
        size = img_size or samples.DINOV2_SIZE
        model: Any = fastvit.create_model(
            samples.DINOV2_SMALL,
            checkpoint=samples.dinov2_small(size),
            num_classes=0,
            img_size=size,
            **overrides,
        )
        return model.eval()
    pretrained = checkpoint is None
    if name.partition(".")[0] in fastvit.list_models():
        model = fastvit.create_model(name, pretrained=pretrained, checkpoint=checkpoint, **options)
        return model.eval()
    from fastvit._compat import import_timm

    timm = import_timm()
    if name.partition(".")[0] not in timm.list_models():
        fastvit.create_model(name)  # raises with the nearest names
    path = "" if checkpoint is None else str(checkpoint)
    model = timm.create_model(name, pretrained=pretrained, checkpoint_path=path, **options)
    return fastvit.accelerate(model.eval())
