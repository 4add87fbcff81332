"""A small model of every library, and of every family whose blocks differ, with random weights."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from open_clip.transformer import VisionTransformer as OpenClipTower
from timm_models import reseed
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT
from transformers_models import build as transformers_model

from fastvit.check.families import tensors
from fastvit.numerics import randomise

sys.path.append(str(Path(__file__).parent / "stand_ins"))  # DINO's and DINOv2's repositories


class Case(NamedTuple):
    """A model and its inputs."""

    model: Any
    inputs: dict[str, Tensor] | Tensor

    @property
    def images(self) -> Tensor:
        """What a model takes by position."""
        return self.inputs if isinstance(self.inputs, Tensor) else self.inputs["pixel_values"]

    def run(self, model: Any = None) -> Tensor:
        """The first tensor of the output, of another model if one is given."""
        model = self.model if model is None else model
        if isinstance(self.inputs, Tensor):
            return tensors(model(self.inputs))[0]
        return tensors(model(**self.inputs))[0]


def _timm(name: str, **options: Any) -> Case:
    reseed()
    side = 14 if "patch14" in name else 16
    model = timm.create_model(name, depth=2, img_size=4 * side, **options)
    return _random(model, 4 * side)


def _transformers(name: str, **options: Any) -> Case:
    return Case(*transformers_model(name, **options))


def _random(model: nn.Module, size: int) -> Case:
    randomise(model.eval(), int(torch.randint(2**31, ()).item()))
    return Case(model, torch.randn(2, 3, size, size))


def _torchvision(width: int = 32) -> Case:
    reseed()
    return _random(TorchvisionViT(32, 8, 2, 2, width, 128, num_classes=5), 32)


def _open_clip(width: int = 32) -> Case:
    reseed()
    return _random(OpenClipTower(32, 8, width, 2, 2, 4.0, ls_init_value=0.5, output_dim=16), 32)


def _dino(**options: Any) -> Case:
    reseed()
    model = importlib.import_module("vision_transformer").VisionTransformer(**options)
    return _random(model, 4 * model.patch_embed.proj.kernel_size[0])


def _dinov2(**options: Any) -> Case:
    reseed()
    module = importlib.import_module("dinov2.models.vision_transformer")
    model = module.DinoVisionTransformer(**options)
    return _random(model, 4 * model.patch_embed.proj.kernel_size[0])


SMALL: dict[str, Any] = {"embed_dim": 32, "num_heads": 2}
# one of each library, pre-norm with plain MLPs
LIBRARIES: dict[str, Callable[[], Case]] = {
    "timm": lambda: _timm("vit_tiny_patch16_224", **SMALL, init_values=0.5),
    "timm, beit": lambda: _timm("beit_base_patch16_224", **SMALL),
    # wide, beside the MLP of its bias
    "timm, relpos": lambda: _timm("vit_relpos_small_patch16_224", embed_dim=128, num_heads=2),
    "transformers": lambda: _transformers("Dinov2", mlp_ratio=4),
    "transformers, vit": lambda: _transformers("ViT", intermediate_size=128),
    "transformers, clip": lambda: _transformers("CLIPVision", intermediate_size=128),
    "torchvision": _torchvision,
    "open_clip": _open_clip,
    "dino": _dino,
    "dinov2": _dinov2,
}
# with stochastic depth, where the library has it
DEPTH: dict[str, Callable[[], Case]] = {
    "timm": lambda: _timm("vit_tiny_patch16_224", **SMALL, drop_path_rate=0.5),
    "timm, beit": lambda: _timm("beit_base_patch16_224", **SMALL, drop_path_rate=0.5),
    "timm, relpos": lambda: _timm("vit_relpos_small_patch16_224", **SMALL, drop_path_rate=0.5),
    "transformers": lambda: _transformers("Dinov2", drop_path_rate=0.5),
    "transformers, beit": lambda: _transformers("BEiT", drop_path_rate=0.5),
    "dino": lambda: _dino(drop_path=0.5),
}
# with gates, rotary positions and norms inside
GATED: dict[str, Callable[[], Case]] = {
    "timm, eva": lambda: _timm("eva02_tiny_patch14_224", **SMALL),
    "transformers, gated": lambda: _transformers("DINOv3ViT gated"),
    "dinov2, gated": lambda: _dinov2(swiglu=True),
}
# whose blocks are not pre-norm, or whose attention is another
OTHERS: dict[str, Callable[[], Case]] = {
    "timm, post-norm": lambda: _timm("vit_relpos_base_patch16_224", **SMALL),
    "timm, parallel": lambda: _timm("vit_base_patch16_xp_224", **SMALL),
    "timm, things": lambda: _timm("vit_base_patch16_18x2_224", **SMALL),
    "transformers, sam": lambda: _transformers("SamVision"),
    "transformers, vitdet": lambda: _transformers("VitDet"),
    "transformers, hiera": lambda: _transformers("Hiera"),
}
# wide enough for matrix instructions, in every form that pre-norm blocks have
_WIDE: dict[str, Any] = {"embed_dim": 128, "num_heads": 2}
_HF: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
WIDE: dict[str, Callable[[], Case]] = {
    "timm": lambda: _timm("vit_tiny_patch16_224", **_WIDE, init_values=0.5),
    "timm, beit": lambda: _timm("beit_base_patch16_224", **_WIDE),
    "timm, eva": lambda: _timm("eva02_tiny_patch14_224", **_WIDE, mlp_ratio=2.0),
    "torchvision": lambda: _torchvision(128),
    "open_clip": lambda: _open_clip(128),
    "transformers, vit": lambda: _transformers("ViT", **_HF),
    "transformers, gated": lambda: _transformers("DINOv3ViT gated", **_HF),
    "dino": lambda: _dino(dim=128),
    "dinov2": lambda: _dinov2(dim=128),
    "dinov2, gated": lambda: _dinov2(dim=128, swiglu=True),
}
