"""`fastvit explain` and `predict` as a user runs them."""

import argparse
import json
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from typer.testing import CliRunner

from fastvit import ops
from fastvit.accelerate import explain
from fastvit.check import families
from fastvit.cli.main import app
from fastvit.samples import load_image, photo
from fastvit.train import DataConfig, load_data
from fastvit.train.classifier import prepare
from fastvit.train.data import transform
from fastvit.train.models import ModelConfig, Source, build_model, load_source


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: Any) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output + str(done.exception)
    return json.loads(done.stdout)


# --------------------------------------------------------------------------- explain


def timm_name(folder):
    return "vit_tiny_patch16_224.augreg_in21k", timm.create_model("vit_tiny_patch16_224")


def timm_folder(folder):
    model = timm.create_model("test_vit", num_classes=7, depth=3)
    timm.models.save_for_hf(model, str(folder), model_args={"depth": 3})
    return folder, model


def timm_checkpoint(folder):
    model = timm.create_model("test_vit2")
    saved = {"arch": "test_vit2", "state_dict": model.state_dict()}
    torch.save({**saved, "args": argparse.Namespace(lr=0.1)}, folder / "last.pth.tar")
    return folder / "last.pth.tar", model


def transformers_folder(folder):
    model: Any = families.tiny_model("BEiT shared bias")[0]
    model.save_pretrained(folder)
    return folder, model


def transformers_config(folder):
    model: Any = families.tiny_model("Dinov2 SwiGLU")[0]
    model.config.save_pretrained(folder)
    return folder / "config.json", model


def run_folder(folder):
    config = {"name": "vit_digits", "options": {"depth": 2}}
    (folder / "config.json").write_text(json.dumps({"command": "train", "model": config}))
    return folder, build_model(ModelConfig(**config))


@pytest.mark.parametrize(
    "make",
    [timm_name, timm_folder, timm_checkpoint, transformers_folder, transformers_config, run_folder],
)
def test_explain_prints_the_plan_of_a_model_that_it_does_not_load(make, tmp_path):
    given, model = make(tmp_path)
    theirs = json.loads(explain(model).to_json())
    ours = run_json("explain", given)
    assert ours.pop("model") == str(given)
    assert "on a CPU" in ours.pop("backend")
    assert ours == {key: value for key, value in theirs.items() if key != "backend"}
    assert len(ours["rows"]) >= 2
    printed = run("explain", given).stdout
    assert "layer_norm" in printed
    assert f"{len(ours['fused_blocks'])} of {len(ours['fused_blocks'])} blocks fused" in printed


def test_explain_says_why():
    printed = " ".join(run("explain", "resnet18").stdout.split())
    assert "0 of 8 blocks fused" in printed
    assert "BasicBlock has no fused form yet" in printed
    assert "no block of a known library" in run("explain", "vgg11").stdout


# --------------------------------------------------------------------------- predict


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A model of digits, trained a little."""
    out = tmp_path_factory.mktemp("predict") / "run"
    with ops.backend("torch"):
        done = run("train", "--epochs", "1", "--augment", "none", "--depth", "1", "--patch-size",
                   "4", "--batch-size", "140", "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    return out


def test_predict_of_a_run(digits_run, tmp_path):
    config = DataConfig("digits", 8, in_chans=1)
    test, grey = load_data(config).test, transform(config, train=False)
    rows, files = range(0, 359, 30), []
    for i in rows:
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(test.source.images[i, 0].numpy()).save(files[-1])
    record = run_json("predict", *files, "--model", digits_run, "--top", "10")
    assert record["labels_from"] == "the run"
    assert [row["image"] for row in record["images"]] == [str(file) for file in files]
    with torch.no_grad():
        # a level of 255 is lost between grey and RGB
        pixels = torch.stack([grey(load_image(file)) for file in files])
        assert (pixels.int() - test.source.images[list(rows)].int()).abs().max() <= 1
        model = load_source(str(digits_run)).model.eval()
        shares = model((pixels / 255 - 0.31) / 0.38).softmax(-1)
    for row, share in zip(record["images"], shares.tolist(), strict=True):
        found = {each["label"]: each["probability"] for each in row["top"]}
        assert found == pytest.approx({str(k): share[k] for k in range(10)}, rel=1e-4)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    printed = run("predict", files[0], "--model", digits_run).stdout
    assert printed.count("%") == 5


def timms_transform(model) -> Any:
    return create_transform(**resolve_model_data_config(model))


def test_predict_of_timm_with_imagenets_labels(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (row,) = run_json("predict", "coffee", "--model", "test_vit", "--checkpoint",
                      tmp_path / "weights.pt", "--top", "2000")["images"]  # fmt: skip
    images = timms_transform(model)(photo("coffee"))
    with torch.no_grad():
        theirs = model(images[None])[0].softmax(-1)
    ours = torch.zeros(1000)
    for each in row["top"]:
        ours[each["class"]] = each["probability"]
    # Pillow's resampling and torchvision's differ by a level of 255 here and there
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-6)
    names = {each["class"]: each["label"] for each in row["top"]}
    assert names[967] == "espresso"


@pytest.mark.parametrize(
    "changes",
    [{}, {"interpolation": "bilinear"}, {"crop_mode": "squash", "crop_pct": 0.7}, {"crop_pct": 1}],
    ids=str,
)
def test_preprocessing_is_timms(changes, tmp_path):
    model: Any = timm.create_model("test_vit", pretrained_cfg_overlay=changes)
    theirs = timms_transform(model)(photo("rocket"))
    source = Source(model, ModelConfig("test_vit"))
    ours = prepare(source)([photo("rocket")])[0]
    levels = (ours - theirs).abs() * 255 * torch.tensor(model.default_cfg["std"]).view(3, 1, 1)
    assert levels.max() < 3
    assert levels.mean() < 0.3


def test_predict_of_transformers(tmp_path):
    import transformers

    model: Any = families.tiny_model("ViT")[0]
    model.config.id2label = {0: "a cup", 1: "a cat"}
    model.classifier = torch.nn.Linear(32, 2)
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    record = run_json("predict", "coffee", "chelsea", "--model", tmp_path)
    pixels = processor(images=[photo("coffee"), photo("chelsea")], return_tensors="pt")
    with torch.no_grad():
        shares = model.eval()(**pixels).logits.softmax(-1)
    for row, share in zip(record["images"], shares.tolist(), strict=True):
        assert {each["label"]: each["probability"] for each in row["top"]} == pytest.approx(
            {"a cup": share[0], "a cat": share[1]}, rel=1e-4
        )
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "classifier" not in key}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused = run("predict", "coffee", "--model", tmp_path)
    assert refused.exit_code == 1
    assert "has no weights for classifier.bias, classifier.weight" in refused.stderr
