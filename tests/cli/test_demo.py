"""`fastvit demo` on small images: what it writes is real, and what is wrong makes it fail."""

import copy
import functools
import json

import numpy as np
import pytest
import timm
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import fastvit
from fastvit import ops, samples
from fastvit.cli.demo import demo, pca_colours

# 8x8 patches, a batch of two and the fewest timed rounds keep a run near a second
SMALL = ["--img-size", "112", "--batch", "2", "--seconds", "0", "--device", "cpu"]


def invoke(out, *arguments):
    app = typer.Typer()
    app.command()(demo)
    return CliRunner().invoke(app, [*SMALL, "--out", str(out), *arguments])


@pytest.fixture
def run(tmp_path):
    return functools.partial(invoke, tmp_path / "out")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folder and result of one run that succeeds."""
    out = tmp_path_factory.mktemp("demo")
    with ops.backend("torch"):
        return out, invoke(out, "--photo", "chelsea", "--json")


def read_record(out):
    return json.loads((out / "demo.json").read_text())


def test_record(sound):
    out, result = sound
    assert result.exit_code == 0, result.output
    record = read_record(out)
    assert json.loads(result.stdout) == record
    assert record["model"] == "vit_small_patch14_dinov2"
    assert (record["image"], record["img_size"], record["batch"]) == ("chelsea", 112, 2)
    assert (record["device"], record["path"]) == ("cpu", "torch")
    for package in ("torch", "triton", "timm"):
        assert record["environment"][package]
    times = record["times"]["float32"]
    for name in ("timm", "fastvit.accelerate"):
        assert 0 < times[name]["p10_ms"] <= times[name]["median_ms"] <= times[name]["p90_ms"]
    ratio = times["timm"]["median_ms"] / times["fastvit.accelerate"]["median_ms"]
    assert times["speedup"] == pytest.approx(ratio)


def test_errors_are_those_of_the_features(sound):
    record = read_record(sound[0])["errors"]["float32"]
    images = samples.preprocess(samples.photo("chelsea"), 112).repeat(2, 1, 1, 1)
    models = {}
    for name, library in (("timm", timm), ("fastvit.create_model", fastvit)):
        model = library.create_model(samples.DINOV2_SMALL, img_size=112, num_classes=0)
        model.load_state_dict(samples.dinov2_small(112))
        models[name] = model.eval()
    models["fastvit.accelerate"] = fastvit.accelerate(copy.deepcopy(models["timm"]))
    with torch.inference_mode():
        features = {name: m.forward_features(images)[:, 1:] for name, m in models.items()}
        truth = models["timm"].double().forward_features(images.double())[:, 1:]

    def relative(value, reference):
        return float((value.double() - reference).abs().max() / reference.abs().max())

    # another number of threads splits sums otherwise; a bug would be orders of magnitude
    for name, value in features.items():
        entry = record[name]["patches"]
        assert 0 < entry["float64_error"] == pytest.approx(relative(value, truth), rel=0.5)
        expected = relative(value, features["timm"])
        assert entry["max_error"] == pytest.approx(expected, rel=0.5, abs=1e-7)
        assert entry["cosine"] == pytest.approx(1, abs=1e-6)


def test_picture_shows_something_in_every_panel(sound):
    picture = np.asarray(Image.open(sound[0] / "demo.png").convert("RGB")).astype(float)
    height, width, _ = picture.shape
    assert width >= 1500
    assert height >= 600
    top, bottom = height // 4, height // 2  # well inside the panels
    for panel in range(3):
        left = round(width * (0.03 + 0.3175 * panel))
        inside = picture[top:bottom, left + 20 : left + round(width * 0.3)]
        assert inside.std(axis=(0, 1)).min() > 5
    words = picture[-round(height * 0.1) :]
    assert words.min() < 128 < words.max()  # dark text on white


def test_table_and_your_own_image(run, tmp_path):
    path = tmp_path / "wide.jpg"
    Image.effect_noise((300, 150), 80).save(path)
    result = run("--image", str(path))
    assert result.exit_code == 0, result.output
    assert read_record(tmp_path / "out")["image"] == str(path)
    for word in ("fastvit.accelerate", "fastvit.create_model", "plain PyTorch", "demo.png"):
        assert word in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "absent.jpg"], "cannot read 'absent.jpg' as an image"),
        (["--photo", "cat"], "no photograph named 'cat'; available: astronaut"),
        (["--img-size", "100"], "multiple of 14; got 100"),
    ],
)
def test_bad_input_is_named(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr


def test_broken_image_is_named(run, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    result = run("--image", str(path))
    assert result.exit_code == 1
    assert f"cannot read '{path}' as an image" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there(run):
    result = run("--device", "cuda")
    assert result.exit_code == 1
    assert "no CUDA or ROCm device" in result.stderr


def wrong_weight(model):
    with torch.no_grad():
        model.blocks[5].mlp.fc1.weight *= 1.01


def wrong_input(model):  # create_model's weights are loaded after this
    model.blocks[5].register_forward_pre_hook(lambda module, args: (args[0] * 1.01, *args[1:]))


def nan_weight(model):
    with torch.no_grad():
        model.blocks[5].ls1.gamma[0] = float("nan")


@pytest.mark.parametrize(
    ("name", "fault"),
    [("accelerate", wrong_weight), ("accelerate", nan_weight), ("create_model", wrong_input)],
)
def test_a_wrong_model_makes_it_fail(run, tmp_path, monkeypatch, name, fault):
    sound = getattr(fastvit, name)

    def planted(*arguments, **options):
        model = sound(*arguments, **options)
        fault(model)
        return model

    monkeypatch.setattr(fastvit, name, planted)
    result = run()
    assert result.exit_code == 1
    assert f"the outputs disagree in float32: fastvit.{name} is off by" in result.stderr
    assert not (tmp_path / "out/demo.png").exists()
    assert read_record(tmp_path / "out")["times"] == {}


def test_colours_do_not_depend_on_sign_or_scale():
    patches = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    colours = pca_colours(patches)
    assert colours.shape == (64, 3)
    torch.testing.assert_close(pca_colours(-10 * patches), colours)
