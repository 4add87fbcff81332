"""Blocks for few tokens in CUDA graphs, with `small_sim` in a GPU's place: the kernel's own source
computes every linear."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import open_clip.transformer
import pytest
import timm
import torch
from fake_cuda import Cuda
from library_models import Case, _dino, _dinov2, _random, _timm, _transformers
from small_sim import Launches
from timm_models import reseed
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

import fastvit
from fastvit.accelerate import accelerate, fp8, latency, restore
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.graphs import GRAPHS
from fastvit.numerics import measure

WIDE: dict[str, Any] = {"embed_dim": 128, "num_heads": 2}


def _torchvision() -> Case:
    reseed()
    return _random(TorchvisionViT(32, 8, 2, 2, 128, 256, num_classes=5), 32)


def _open_clip() -> Case:
    reseed()
    tower = open_clip.transformer.VisionTransformer
    return _random(tower(32, 8, 128, 2, 2, 4.0, ls_init_value=0.5, output_dim=16), 32)


MODELS: dict[str, Callable[[], Case]] = {
    "timm": lambda: _timm("vit_tiny_patch16_224", **WIDE, init_values=0.5),
    "timm, beit": lambda: _timm("beit_base_patch16_224", **WIDE),
    "timm, eva": lambda: _timm("eva02_tiny_patch14_224", **WIDE, mlp_ratio=2.0),
    "torchvision": _torchvision,
    "open_clip": _open_clip,
    "transformers, vit": lambda: _transformers("ViT", hidden_size=128, intermediate_size=256),
    "transformers, gated": lambda: _transformers(
        "DINOv3ViT gated", hidden_size=128, intermediate_size=256
    ),
    "dino": lambda: _dino(dim=128),
    "dinov2": lambda: _dinov2(dim=128),
    "dinov2, gated": lambda: _dinov2(dim=128, swiglu=True),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def in_form(model: Any) -> Any:
    """Accelerated, with the blocks' form as `cuda_graphs=True` gives it."""
    accelerate(model)
    blocks = [part for part in find_parts(model) if part.quantized is not None]
    for part in blocks:
        part.module.__class__ = part.quantized  # pyright: ignore
    fp8.attach(model, latency.forms([part.module for part in blocks]))
    return model


def converted(case: Case, dtype: torch.dtype) -> Case:
    """A copy of the model in another dtype, and its inputs."""
    inputs: Any = case.inputs
    if isinstance(inputs, torch.Tensor):
        inputs = inputs.to(dtype)
    else:
        inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    return Case(copy.deepcopy(case.model).to(dtype), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_numerics_of_a_model(launches, make, dtype):
    """Within twice the error of the library's own forward against float64."""
    half = converted(make(), dtype)
    truth = converted(half, torch.float64).run()
    eager = half.run()
    in_form(half.model)
    with fp8.own_capture():
        ours = half.run()
    assert len(launches.linears) == 2 * 4
    row = measure("y", ours, truth, eager)
    assert row.passed, row
