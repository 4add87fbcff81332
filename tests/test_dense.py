"""Dense features: shapes, gradients, and the trained saliency decoder against onnxruntime."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm_models import build, reseed
from torch import nn

import fastvit
from fastvit import samples
from fastvit.dense import DenseFeatures, LayerNorm2d, SimpleFeaturePyramid

EXAMPLES = Path(__file__).parents[1] / "examples"


def tiny(patch: int = 16, **options: Any) -> Any:
    side = 4 * patch
    sizes: dict[str, Any] = {"embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 0}
    return fastvit.create_model(
        "vit_tiny_patch16_224", img_size=(side, side + 2 * patch), patch_size=patch,
        **sizes | options,
    )  # fmt: skip


@pytest.mark.parametrize("patch", [16, 14])
def test_shapes(patch):
    model = DenseFeatures(tiny(patch), out_channels=12)
    maps = model(torch.randn(2, 3, 4 * patch, 6 * patch))
    assert list(maps) == ["0", "1", "2", "3"]
    expected = [(2, 12, 16, 24), (2, 12, 8, 12), (2, 12, 4, 6), (2, 12, 2, 3)]
    assert [tuple(level.shape) for level in maps.values()] == expected
    if patch == 16:
        strides = [6 * patch // level.shape[3] for level in maps.values()]
        assert strides == [4, 8, 16, 32]


def test_levels_by_hand():
    """Level by level, the paper's section 3 written out."""
    reseed()
    pyramid = SimpleFeaturePyramid(32, 12)
    x = torch.randn(2, 32, 4, 6)
    p: dict[str, Any] = {name: value for name, value in pyramid.state_dict().items()}

    def norm(x, name):
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], p[f"{name}.weight"],
                            p[f"{name}.bias"], 1e-6).permute(0, 3, 1, 2)  # fmt: skip

    def project(x, level, first):
        x = norm(F.conv2d(x, p[f"levels.{level}.{first}.weight"]), f"levels.{level}.{first + 1}")
        x = F.conv2d(x, p[f"levels.{level}.{first + 2}.weight"], padding=1)
        return norm(x, f"levels.{level}.{first + 3}")

    def up(x, name):
        return F.conv_transpose2d(x, p[f"{name}.weight"], p[f"{name}.bias"], stride=2)

    twice = up(F.gelu(norm(up(x, "levels.0.0"), "levels.0.1")), "levels.0.3")
    expected = [
        project(twice, 0, 4),
        project(up(x, "levels.1.0"), 1, 1),
        project(x, 2, 0),
        project(F.max_pool2d(x, 2), 3, 1),
    ]
    for level, other in zip(pyramid(x), expected, strict=True):
        torch.testing.assert_close(level, other)


def test_timm_accelerated_gives_timms_maps():
    vit = build("vit_tiny_patch16_224", patches=(4, 6), embed_dim=32, num_heads=2)
    model = DenseFeatures(vit, 8).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        theirs = model(x)
        fastvit.accelerate(model)
        for name, level in model(x).items():
            torch.testing.assert_close(level, theirs[name], rtol=1e-4, atol=1e-5)


def test_gradients_and_a_frozen_vit():
    x = torch.randn(2, 3, 64, 96)
    for frozen in (False, True):
        model = DenseFeatures(tiny(), 8, scales=(2, 1), frozen=frozen).train()
        assert model.vit.training is not frozen
        sum(level.square().mean() for level in model(x).values()).backward()  # pyright: ignore
        reached = [p.grad is not None for p in model.vit.blocks.parameters()]
        assert all(reached) if not frozen else not any(reached)
        assert all(p.grad is not None for p in model.pyramid.parameters())


def test_a_segmentation_head_learns():
    """Which half of an image is bright, a class a pixel, from a random ViT."""
    reseed()
    model = DenseFeatures(tiny(), 16, scales=(2,))
    head = nn.Conv2d(16, 2, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    bright = torch.rand(8, 1, 8, 12).gt(0.5)
    images = (bright.float() * 2 - 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    losses = []
    for _ in range(15):
        scores = head(model(images.expand(-1, 3, -1, -1))["0"])
        loss = F.cross_entropy(scores, bright[:, 0].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]


def test_layer_norm_over_channels():
    norm = LayerNorm2d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(5))
    x = torch.randn(2, 5, 3, 4)
    expected = timm.layers.LayerNorm2d(5)  # pyright: ignore[reportPrivateImportUsage]
    expected.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), expected(x))


def test_bad_input():
    with pytest.raises(ValueError, match=r"scale 3 is not one of 4, 2, 1, 0\.5"):
        SimpleFeaturePyramid(32, scales=(3,))
    with pytest.raises(TypeError, match="Linear has no forward_intermediates"):
        DenseFeatures(nn.Linear(2, 2))


# --------------------------------------------------------------------------- saliency


@pytest.fixture(scope="module")
def saliency() -> ModuleType:
    spec = importlib.util.spec_from_file_location("saliency", EXAMPLES / "saliency.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_saliency_is_onnxruntimes(saliency):
    images = torch.cat([samples.preprocess(samples.photo(name)) for name in saliency.PHOTOS])
    with torch.inference_mode():
        maps = saliency.trained()(images)
    expected = saliency.by_onnxruntime(images)
    assert maps.shape == expected.shape == (3, 1, 224, 224)
    assert (maps - expected).abs().max() <= 1e-4
    assert maps.amin() < 0.1  # background and foreground are told apart
    assert maps.amax() > 0.9


def test_saliency_example_runs(saliency, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["saliency.py", "--out", str(tmp_path / "map.png")])
    saliency.main()
    assert "largest difference from onnxruntime" in capsys.readouterr().out
    assert samples.load_image(tmp_path / "map.png").size == (1080, 744)
