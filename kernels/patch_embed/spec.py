"""Cases, FLOPs and bytes of `patch_embed`."""

from typing import Any

import torch

from fastvit.kernels._spec import Case, Draw, OpSpec
from fastvit.kernels.patch_embed.op import patch_embed
from fastvit.kernels.patch_embed.reference import patch_embed_reference

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PIXELS: dict[str, dict[str, Any]] = {
    "float": {},
    "uint8": {"std": 64.0, "mean": 128.0, "bounds": (0.0, 255.0), "dtype": torch.uint8},
    "unit": {"std": 0.25, "mean": 0.5, "bounds": (0.0, 1.0)},
}


def _case(
    name: str, b: int, size: tuple[int, int], patch: int, d: int, *, prefix: int = 1,
    pos: str = "all", pixels: str = "float", channels_last: bool = False,
) -> Case:  # fmt: skip
    height, width = size
    patches = (height // patch) * (width // patch)
    positions = {"all": patches + prefix, "patches": patches, "none": 0}[pos]

    def make(draw: Draw) -> dict[str, Any]:
        images = draw(b, 3, height, width, **PIXELS[pixels])
        if channels_last:
            images = images.to(memory_format=torch.channels_last)
        normalized = {} if pixels == "float" else {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        return {
            "images": images,
            "weight": draw(d, 3, patch, patch, std=(3 * patch * patch) ** -0.5),
            "bias": draw(d),
            "prefix": draw(prefix, d) if prefix else None,
            "pos_embed": draw(positions, d) if positions else None,
            **normalized,
        }

    sizes = {"B": b, "N": patches, "P": prefix, "D": d, "K": 3 * patch * patch}
    return Case(name, sizes, make)


def _flops(sizes: dict[str, int]) -> int:
    return 2 * sizes["B"] * sizes["N"] * sizes["D"] * sizes["K"]


def _bytes(sizes: dict[str, int], itemsize: int) -> int:
    b, n, p, d, k = (sizes[name] for name in "BNPDK")
    return itemsize * (b * n * k + d * k + (n + p) * d + b * (n + p) * d)


_CASES = (
    _case("one patch, no prefix", 1, (16, 16), 16, 32, prefix=0, pos="none"),
    _case("patch 16, CLS", 2, (64, 96), 16, 192),
    _case("patch 14, CLS and 4 registers", 2, (56, 56), 14, 96, prefix=5, pos="patches"),
    _case("patch 32, no prefix", 2, (64, 64), 32, 64, prefix=0),
    _case("channels last", 2, (32, 48), 8, 48, channels_last=True),
    _case("bytes, folded mean and std", 2, (64, 64), 16, 96, pixels="uint8"),
    _case("unit floats, folded mean and std", 1, (28, 42), 14, 96, pixels="unit"),
)
_BENCH = tuple(
    _case(f"ViT-{name}/{patch}, batch {batch}", batch, (224, 224), patch, d)
    for name, d, batch, patch in (
        ("B", 768, 1, 16), ("B", 768, 1, 14), ("S", 384, 8, 16), ("B", 768, 256, 16),
        ("B", 768, 256, 14),
    )
)  # fmt: skip
SPECS = (OpSpec("patch_embed", patch_embed, patch_embed_reference, _CASES, _BENCH, _flops, _bytes),)
