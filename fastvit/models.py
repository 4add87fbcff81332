"""Models by timm's names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastvit.checkpoint import load_checkpoint, load_pretrained, pretrained_cfg
from fastvit.variants import find_variant
from fastvit.vit import VisionTransformer


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    num_classes: int | None = None,
    img_size: int | Sequence[int] | None = None,
    global_pool: str | None = None,
    pos_embed: str | None = None,
    **overrides: Any,
) -> VisionTransformer:
    """A Vision Transformer with timm's parameter names.

    Args:
        name: one of `list_models`, with a tag of timm's behind a dot if wanted
            (``vit_base_patch16_224.augreg_in21k``): the tag chooses the pretrained weights and
            what goes with them (classes, image size, mean and std). Tags need timm.
        pretrained: fetch the weights as timm does, from its own source for the name and tag. With
            another `num_classes` the head is new; with another `img_size` the position embedding
            is resampled.
        checkpoint: a .safetensors, torch or Google .npz file, or a state_dict, to load instead; of
            timm, transformers, torchvision, open_clip, DINO or DINOv2, as in `load_checkpoint`.
        num_classes, img_size, global_pool, pos_embed, overrides: fields of `variants.ViTConfig`;
            None for the name's own.

    Returns:
        A model in training mode; `default_cfg` says what input it expects.

    Raises:
        ValueError: an unknown name (with the three nearest) or tag, choices that do not fit, a
            checkpoint that does not fit.
        TypeError: an unknown option.
        ImportError: a tag or `pretrained` without timm.
    """
    if pretrained and checkpoint is not None:
        raise ValueError("pretrained=True and checkpoint exclude one another")
    architecture, _, tag = name.partition(".")
    options, cfg = find_variant(architecture)
    if pretrained or tag:
        cfg = pretrained_cfg(name)
        options |= {"num_classes": cfg["num_classes"], "img_size": cfg["input_size"][1:]}
    choices = {
        "num_classes": num_classes,
        "img_size": img_size,
        "global_pool": global_pool,
        "pos_embed": pos_embed,
    }
    options |= {key: value for key, value in choices.items() if value is not None}
    model = VisionTransformer(**{**options, **overrides})
    model.default_cfg = model.pretrained_cfg = cfg
    if pretrained:
        load_pretrained(model, name)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
