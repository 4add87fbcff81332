"""`fit` on a toy problem: it learns, repeats and resumes bit for bit, stops and refuses clearly."""

import dataclasses
import json
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from train_models import assert_same, data, recipe, tiny, weights

from fastvit import ops
from fastvit.kernels import _register
from fastvit.train import (
    Interrupted,
    Recipe,
    classification_loss,
    classification_metrics,
    fit,
    loss_metrics,
)
from fastvit.train.recipe import make_optimizer, param_groups
from fastvit.train.state import latest, rng_state, set_rng_state

# --------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adamax"), ("epochs", 0), ("batch_size", 0), ("accumulate", 0), ("lr", 0.0),
        ("lr", math.nan), ("weight_decay", -1.0), ("betas", (0.9, 1.0)), ("betas", (0.9,)),
        ("label_smoothing", 1.0), ("ema", 1.0), ("mixup", -0.1), ("clip", math.inf),
        ("warmup_epochs", 31.0), ("min_lr", 1.0), ("save_every", -1),
    ],
)  # fmt: skip
def test_recipe_names_what_makes_no_sense(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        Recipe(**{field: value})


def test_defaults_go_by_optimizer_and_survive_json():
    assert (Recipe().lr, Recipe(optimizer="sgd").lr) == (1e-3, 0.03)
    assert Recipe(weight_decay=0).weight_decay == 0
    stored = json.loads(json.dumps(dataclasses.asdict(recipe())))
    assert Recipe(**stored) == recipe()


def test_learning_rate_warms_up_and_follows_a_cosine():
    plan = Recipe(epochs=10, lr=1.0, warmup_epochs=2, min_lr=0.1)
    rates = [plan.lr_at(step, steps_per_epoch=5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[30] == pytest.approx(0.55)  # half of the cosine
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.11


def test_only_matrices_decay():
    model = tiny(init_values=0.1, reg_tokens=1, pos_embed="learned")
    decay, kept = param_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decay["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    matrices = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    expected = matrices | {"patch_embed.proj.weight", "head.weight"}
    assert {names[id(p)] for p in decay["params"]} == expected
    assert {"cls_token", "reg_token", "pos_embed"} <= {names[id(p)] for p in kept["params"]}
    assert len(decay["params"]) + len(kept["params"]) == len(list(model.parameters()))
    relative = nn.ModuleDict({"encoder": tiny(pos_embed="relative")})
    tables = [p for n, p in relative.named_parameters() if n.endswith("bias_table")]
    assert {id(p) for p in tables} <= {id(p) for p in param_groups(relative, 0.3)[1]["params"]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)],
)
def test_optimizers(name, kind):
    optimizer = make_optimizer(tiny(), Recipe(optimizer=name, momentum=0.8, betas=(0.8, 0.99)))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert group["lr"] == Recipe(optimizer=name).lr
    assert (group.get("momentum"), group.get("betas")) == (
        (0.8, None) if name == "sgd" else (None, (0.8, 0.99))
    )


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        fit(tiny().requires_grad_(False), data(), recipe())


# --------------------------------------------------------------------------- the loop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and result of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with ops.backend("torch"):
        return out, fit(tiny(drop_path_rate=0.2), data(), recipe(), out=out)


def test_it_learns(whole):
    _, result = whole
    tests = [row for row in result.history if row["kind"] == "test"]
    assert tests[-1] == result.test
    assert result.test["top1"] == 1.0  # chance is a third
    assert result.test["images"] == 13
    assert tests[0]["loss"] > tests[-1]["loss"]


def test_run_folder(whole):
    out, result = whole
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "checkpoints", "model.safetensors", "ema.safetensors",
        "curves.png",
    }  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert all(row["images_per_s"] > 0 for row in rows if row["kind"] == "train")
    config = json.loads((out / "config.json").read_text())
    assert Recipe(**config["recipe"]) == recipe()
    assert config["environment"]["torch"] == torch.__version__
    assert_same(load_file(out / "model.safetensors"), weights(result.model))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000015"]


def test_average_is_of_the_weights_on_the_way(whole):
    out, result = whole
    averages, shadow = load_file(out / "ema.safetensors"), None
    model = tiny(drop_path_rate=0.2)
    kept = []

    def spying(module, batch):
        kept.append(weights(model))
        return classification(module, batch)

    classification = classification_loss(recipe(), 3)
    fit(model, data(), recipe(ema=0), loss=spying, evaluate=classification_metrics)
    kept.append(weights(model))
    assert_same(kept[-1], weights(result.model))  # an average changes nothing else
    for step, values in enumerate(kept):
        decay = min(0.9, step / (9 + step))  # of update step - 1
        old = values if shadow is None else shadow
        shadow = {name: decay * old[name] + (1 - decay) * values[name] for name in values}
    assert shadow is not None
    for name, value in averages.items():  # 15 float32 roundings of values below 2
        torch.testing.assert_close(value, shadow[name], rtol=1e-5, atol=1e-6)
    assert result.test["ema_loss"] != result.test["loss"]


def test_curves_show_lines(whole):
    pixels = np.asarray(Image.open(whole[0] / "curves.png").convert("RGB")).astype(int)
    width = pixels.shape[1] // 3
    for panel in range(3):
        inside = pixels[:, panel * width : (panel + 1) * width]
        assert (inside.min(-1) < 150).sum() > 500


def test_same_arguments_same_bits(whole):
    again = fit(tiny(drop_path_rate=0.2), data(), recipe())
    assert_same(weights(again.model), weights(whole[1].model))
    other = fit(tiny(drop_path_rate=0.2), data(), recipe(seed=1))
    key = "head.weight"
    assert not torch.equal(weights(other.model)[key], weights(again.model)[key])


def test_workers_change_nothing(whole):
    result = fit(tiny(drop_path_rate=0.2), data(), recipe(), workers=1)
    assert_same(weights(result.model), weights(whole[1].model))


def stop_at(step, number=signal.SIGTERM):
    """A report callback that sends this process a signal at a step."""

    def report(row):
        if row["kind"] == "train" and row["step"] == step:
            os.kill(os.getpid(), number)

    return report


@pytest.mark.parametrize("step", [4, 10, 14])  # within an epoch, at its end, in the last one
def test_interrupted_and_resumed_is_uninterrupted(whole, tmp_path, step):
    out, made = tmp_path / "run", lambda: tiny(drop_path_rate=0.2)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"SIGTERM after step {step} of 15; resume") as caught:
        fit(made(), data(), recipe(), out=out, report=stop_at(step))
    assert caught.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not (out / "model.safetensors").exists()
    torch.manual_seed(99)  # neither what ran in between nor the new model's weights matter
    result = fit(tiny(drop_path_rate=0.2, init_values=None), data(), recipe(), out=out, resume=True)
    assert_same(weights(result.model), weights(whole[1].model))
    assert_same(load_file(out / "ema.safetensors"), load_file(whole[0] / "ema.safetensors"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    last, uninterrupted = dict(rows[-1]), dict(whole[1].history[-1])
    assert last == uninterrupted
    assert [r["step"] for r in rows if r["kind"] == "test"] == [5, 10, 15]


def test_killed_between_checkpoints_repeats_from_the_last(whole, tmp_path):
    """An error stands for a kill: no checkpoint is written on the way out."""
    out = tmp_path / "run"

    def die(row):
        if row["step"] == 12:
            raise KeyError("killed")

    with pytest.raises(KeyError):
        fit(tiny(drop_path_rate=0.2), data(), recipe(save_every=3), out=out, report=die)
    (out / "checkpoints" / "writing").mkdir(exist_ok=True)  # a save that was cut short
    found = latest(out / "checkpoints")
    assert found is not None
    assert found.name == "00000010"  # of steps 3, 5, 6, 9 and 10
    model = tiny(drop_path_rate=0.2)
    result = fit(model, data(), recipe(save_every=3), out=out, resume=True)
    assert_same(weights(result.model), weights(whole[1].model))
    steps = [row["step"] for row in result.history if row["kind"] == "train"]
    assert steps == sorted(set(steps))


def test_resume_before_the_first_checkpoint_starts_over(whole, tmp_path):
    out = tmp_path / "run"

    def die(row):
        raise KeyError("killed")

    with pytest.raises(KeyError):
        fit(tiny(drop_path_rate=0.2), data(), recipe(), out=out, report=die)
    result = fit(tiny(drop_path_rate=0.2), data(), recipe(), out=out, resume=True)
    assert_same(weights(result.model), weights(whole[1].model))


def test_resume_of_a_finished_run_changes_nothing(whole, tmp_path):
    out = tmp_path / "run"
    fit(tiny(), data(), recipe(epochs=1), out=out)
    before = (out / "metrics.jsonl").read_text()
    result = fit(tiny(), data(), recipe(epochs=1), out=out, resume=True)
    assert (out / "metrics.jsonl").read_text() == before
    assert result.test["epoch"] == 1


def test_run_folders_are_guarded(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="nothing to resume"):
        fit(tiny(), data(), recipe(), out=out, resume=True)
    with pytest.raises(ValueError, match="resume needs the folder"):
        fit(tiny(), data(), recipe(), resume=True)
    fit(tiny(), data(), recipe(epochs=1), out=out)
    with pytest.raises(ValueError, match="exists and is not empty"):
        fit(tiny(), data(), recipe(epochs=1), out=out)
    with pytest.raises(
        ValueError, match=r"started otherwise: epochs: 1, now 2; lr: 0.003, now 0.1"
    ):
        fit(tiny(), data(), recipe(epochs=2, lr=0.1), out=out, resume=True)
    with pytest.raises(ValueError, match=r"cannot be read: .*Size mismatch.*cls_token"):
        fit(tiny(embed_dim=32), data(), recipe(epochs=1), out=out, resume=True)


def test_second_signal_is_not_caught(tmp_path):
    def report(row):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    # a shell's background jobs ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(tiny(), data(), recipe(), report=report)
    finally:
        signal.signal(signal.SIGINT, before)


def test_interruption_without_a_folder_says_so():
    with pytest.raises(Interrupted, match="nothing was saved"):
        fit(tiny(), data(), recipe(), report=stop_at(4, signal.SIGINT))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_the_same_batch(whole, accumulate):
    """Up to the order of float32 sums: 15 steps of Adam on gradients equal to some 1e-7."""
    ours = fit(tiny(), data(), recipe(accumulate=accumulate)).history
    theirs = fit(tiny(), data(), recipe()).history
    for row, other in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_clipping_bounds_the_gradient():
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad.flatten() for g in self.param_groups for p in g["params"]]
            seen.append(float(torch.cat(grads).norm()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", Spy)
        result = fit(tiny(), data(), recipe(optimizer="sgd", clip=0.01))
    assert seen == pytest.approx([0.01] * 15, rel=1e-3)
    norms = [row["grad_norm"] for row in result.history if row["kind"] == "train"]
    assert min(norms) > 0.01


def test_a_loss_that_is_not_finite_stops_and_is_not_saved(tmp_path):
    out, calls = tmp_path / "run", []

    def loss(module, batch):
        calls.append(0)
        value = module(batch.images).square().mean()
        return (value * math.nan if len(calls) == 8 else value), {}

    with pytest.raises(FloatingPointError, match="loss is nan at step 8 of 15") as caught:
        fit(tiny(), data(), recipe(), out=out, loss=loss, evaluate=classification_metrics)
    assert "lr (now 0.003)" in str(caught.value)
    found = latest(out / "checkpoints")
    assert found is not None
    assert found.name == "00000005"


def test_batch_size_must_fit():
    with pytest.raises(ValueError, match="batch_size=64 is more than 40 training images"):
        fit(tiny(), data(), recipe(batch_size=64))
    with pytest.raises(ValueError, match="not divisible by 1 ranks times accumulate=3"):
        fit(tiny(), data(), recipe(accumulate=3))
    with pytest.raises(ValueError, match="needs torchrun"):
        fit(tiny(), data(), recipe(), parallel="fsdp")
    with pytest.raises(ValueError, match="device='tpu'"):
        fit(tiny(), data(), recipe(), device="tpu")


def test_a_loss_of_your_own(tmp_path):
    """A regression on brightness, with what it logs and its own held-out mean."""
    model = tiny(num_classes=1)

    def loss(module, batch):
        error = module(batch.images)[:, 0] - batch.images.mean((1, 2, 3))
        return error.square().mean(), {"bias": error.mean()}

    result = fit(model, data(), recipe(amp=True), loss=loss, out=tmp_path / "run")
    rows = [row for row in result.history if row["kind"] == "train"]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert all("bias" in row and "accuracy" not in row for row in rows)
    assert {"loss", "bias", "ema_loss", "ema_bias"} <= result.test.keys()


def test_held_out_mean_of_a_loss_counts_every_image_once():
    batches = list(toy_batches())
    images = torch.cat([b.images for b in batches])[:13]
    evaluate = loss_metrics(lambda module, batch: (module(batch.images).mean(), {}))
    found = evaluate(nn.Identity(), batches)
    assert found["loss"] == pytest.approx(float(images.mean()), rel=1e-6)


def toy_batches():
    from fastvit.train.data import eval_batches, make_loader

    toy = data()
    for rank in range(2):  # both shares of two ranks: 13 images and a row of padding
        for batch in make_loader(toy.test, eval_batches(13, 3, rank, 2), workers=0, pin=False):
            yield toy.to_model(batch, torch.device("cpu"))


def test_random_state_comes_back():
    state = rng_state(torch.device("cpu"))

    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand()  # noqa: NPY002

    first = draw()
    assert draw() != first
    set_rng_state(state, torch.device("cpu"))
    assert draw() == first


def test_kernels_give_the_losses_of_plain_pytorch(request, monkeypatch):
    """Three steps through the Triton path in the interpreter."""
    plan, options = recipe(epochs=1, batch_size=2, ema=0, log_every=1), {"depth": 1}
    plain = fit(tiny(**options), data(6, 1), plan).history
    ran, run = set(), _register.run_triton
    monkeypatch.setattr(_register, "run_triton", lambda name, *a: ran.add(name) or run(name, *a))
    request.getfixturevalue("triton_path")
    ours = fit(tiny(**options), data(6, 1), plan).history
    assert {"attention_qkv", "linear", "patch_embed"} <= ran
    assert [row["step"] for row in ours] == [1, 2, 3, 3]
    for row, other in zip(ours, plain, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
