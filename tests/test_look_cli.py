"""`fastvit explain` and `predict` as a user runs them."""

import argparse
import json
from typing import Any

import pytest
import timm
import torch
from typer.testing import CliRunner

from fastvit.accelerate import explain, families
from fastvit.cli.main import app
from fastvit.train.models import ModelConfig, build_model


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
