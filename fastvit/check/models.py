"""timm's ViT architectures, cut down to run in a moment: what `fastvit coverage` compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit._compat import import_timm
from fastvit.numerics import randomise

MODULES = (
    "vision_transformer", "eva", "deit", "naflexvit", "vision_transformer_hybrid",
    "vision_transformer_relpos", "beit",
)  # fmt: skip
GRID = (2, 3)  # patches of an image: few, and not square
HEADS = 2


def architectures() -> list[str]:
    """Names of the architectures in timm's ViT modules, 293 in timm 1.0.31.

    Raises:
        ImportError: timm is not installed.
    """
    timm = import_timm()
    return [name for module in MODULES for name in timm.list_models(module=module)]


def build_small(name: str, *, seed: int = 0, batch: int = 2, **options: Any) -> tuple[Any, Any]:
    """timm's architecture `name` two blocks deep, two heads wide and for 6 patches, every parameter
    random; head dimension, MLP ratio, norms, positions and all else are its own.

    Args:
        name: one of `architectures`.
        seed: of parameters and inputs.
        batch: images.
        options: override timm's arguments and these sizes.

    Returns:
        The model in eval mode, float32 on the CPU, and what to call it with: images [B, C, H, W],
        or for NaFlex a dict of patches of two image sizes, padded.
    """
    timm = import_timm()
    whole: Any = timm.create_model(name, device="meta")
    model: Any = timm.create_model(name, device="meta", **(_sizes(whole) | options))
    model = model.to_empty(device="cpu").eval()
    fill_buffers(model)
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    embeds = getattr(model, "embeds", None)
    if embeds is not None and embeds.is_linear:
        return model, _naflex_batch(embeds, batch, generator)
    size = _image_size(model) if embeds is None else _times(embeds.patch_size)
    return model, torch.randn(batch, model.in_chans, *size, generator=generator)


def _sizes(whole: Any) -> dict[str, Any]:
    """Arguments that make timm's model small; `whole` is it as it comes, on no device."""
    attns = [heads_of(block) for block in whole.blocks]
    heads = attns[0].num_heads
    sizes: dict[str, Any] = {
        "depth": 2,
        "num_heads": HEADS,
        "embed_dim": HEADS * (whole.embed_dim // heads),
        "num_classes": min(10, whole.num_classes),
    }
    if hasattr(attns[0], "num_kv_heads"):
        groups = [heads // attn.num_kv_heads for attn in attns]
        sizes["num_kv_heads"] = (HEADS // min(groups), HEADS // max(groups))
    if hasattr(whole, "patch_embed"):
        sizes["img_size"] = _image_size(whole)
        if isinstance(whole.patch_embed.proj, nn.Identity):  # a backbone gives the width
            del sizes["embed_dim"], sizes["num_heads"]
    return sizes


def heads_of(block: Any) -> Any:
    """The module inside a block that has the attention's settings."""
    return next(module for module in block.modules() if hasattr(module, "num_heads"))


def _image_size(model: Any) -> tuple[int, int]:
    embed = model.patch_embed
    pixels = tuple(
        size // count for size, count in zip(embed.img_size, embed.grid_size, strict=True)
    )
    return _times(pixels)


def _times(patch: tuple[int, int]) -> tuple[int, int]:
    return GRID[0] * patch[0], GRID[1] * patch[1]


def fill_buffers(model: nn.Module) -> None:
    """The values of buffers that were made on no device."""
    for module in model.modules():
        for fill in ("reset_running_stats", "init_non_persistent_buffers"):
            if hasattr(module, fill):
                getattr(module, fill)()


def _naflex_batch(embeds: Any, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Patches of images of two shapes in turn, the smaller one padded."""
    grids = [GRID if i % 2 == 0 else (1, 2) for i in range(batch)]
    tokens = GRID[0] * GRID[1]
    coord = torch.zeros(batch, tokens, 2, dtype=torch.long)
    valid = torch.zeros(batch, tokens, dtype=torch.bool)
    for i, (rows, columns) in enumerate(grids):
        count = rows * columns
        coord[i, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        valid[i, :count] = True
    patches = torch.randn(
        batch, tokens, embeds.in_chans * embeds.patch_size[0] * embeds.patch_size[1],
        generator=generator,
    )  # fmt: skip
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}
