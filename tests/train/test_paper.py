"""`fastvit paper` and `fastvit pretrain`: what is trained, what is written, what goes on."""

import dataclasses
import json
from concurrent.futures import Future

import pytest
import torch
from typer.testing import CliRunner

from fastvit.cli.main import app
from fastvit.cli.paper import draw, markdown
from fastvit.train import paper
from fastvit.train.probe import linear_probe
from fastvit.vit import VisionTransformer


@pytest.mark.parametrize("data", ["digits", "mnist5k"])
@pytest.mark.parametrize("name", paper.EXPERIMENTS)
def test_every_arm_can_be_built(name, data):
    base = paper.SETS[data]
    for arm in paper.EXPERIMENTS[name].arms(base).values():
        options = {**base, **arm.model}
        with torch.device("meta"):
            model = VisionTransformer(**options)
        side = round(options["img_size"] * (arm.finetune.scale if arm.finetune else 1))
        assert side % model.patch_embed.patch_size[0] == 0
        paper.Recipe(**arm.recipe)


def test_arms_differ_in_what_they_are_named_for():
    arms = paper.EXPERIMENTS["shape"].arms(paper.SETS["mnist5k"])
    assert arms["depth x2"].model["depth"] == 6
    assert arms["patch 7 to 4"].model == {"patch_size": 4}
    arms = paper.EXPERIMENTS["ablation-pos"].arms(paper.SETS["digits"])
    assert [arm.model["pos_embed"] for arm in arms.values()] == [
        "none",
        "learned",
        "2d",
        "relative",
    ]


def row(arm: str, seed: int, value: float) -> dict:
    return {
        "arm": arm, "seed": seed, "data": "digits", "epochs": 2, "top1": value, "gflops": 0.01,
        "parameters": 100, "seconds": 2.0,
    }  # fmt: skip


def test_summary_table_and_plot(tmp_path):
    runs = [row("none", 0, 0.5), row("none", 1, 0.7), row("1-D", 0, 0.9)]
    summary = paper.summary("ablation-pos", runs)
    assert [(s["arm"], s["seeds"]) for s in summary] == [("none", 2), ("1-D", 1)]
    assert summary[0]["mean"] == pytest.approx(60)
    assert summary[0]["std"] == pytest.approx(14.142, abs=1e-3)
    record = {
        "title": "T", "source": "S", "metric": "top1", "data": "digits", "command": "C",
        "summary": summary,
    }  # fmt: skip
    table = markdown(record)
    assert "| none | 60.00 ± 14.14 | 2 | 10.0 | 100 | 2 |" in table
    draw(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_known_runs_are_not_repeated(monkeypatch):
    called = []

    class Pool:
        def __init__(self, *args, **kwargs): ...
        def __enter__(self):
            return self

        def __exit__(self, *args): ...
        def submit(self, function, arm, data, *, seed, epochs):
            called.append((arm.model["pos_embed"], seed))
            done = Future()
            done.set_result({"top1": 0.1, "gflops": 0.0, "parameters": 1, "seconds": 1.0})
            return done

    monkeypatch.setattr(paper, "ProcessPoolExecutor", Pool)
    known = [row("none", 0, 0.5), {**row("none", 1, 0.5), "epochs": 9}]
    runs = paper.run_experiment("ablation-pos", "digits", seeds=2, epochs=2, known=known)
    assert called == [
        ("none", 1), ("learned", 0), ("learned", 1), ("2d", 0), ("2d", 1), ("relative", 0),
        ("relative", 1),
    ]  # fmt: skip
    assert [run["seed"] for run in runs] == [0, 1] * 4
    assert runs[0]["top1"] == 0.5


TINY = {**paper.SETS["digits"], "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}


@pytest.fixture
def tiny(monkeypatch):
    """A model of one block and few images."""
    monkeypatch.setitem(paper.SETS, "digits", TINY)
    load = paper.load_data

    def few(config):
        data = load(config)
        for images in (data.train, data.test):
            keep = torch.arange(0, len(images), 10)
            images.source.images = images.source.images[keep]
            images.source.labels = [images.source.labels[i] for i in keep]
        return dataclasses.replace(data)

    monkeypatch.setattr(paper, "load_data", few)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("experiment", "arm", "metric"),
    [
        ("ablation-pos", "2-D", "top1"),
        ("resolution", "fine-tuned at 8 px, new positions", "finetuned_top1"),
        ("self-supervised", "masked patch prediction", "probe_top1"),
    ],
)
def test_an_arm_gives_its_metric_and_repeats(tiny, experiment, arm, metric):
    arms = paper.EXPERIMENTS[experiment].arms(TINY)
    first, second = (paper.run_arm(arms[arm], "digits", seed=3, epochs=1) for _ in range(2))
    assert 0 <= first[metric] <= 1
    times = {"seconds", "finetune_seconds"}
    assert {k: v for k, v in first.items() if k not in times} == {
        k: v for k, v in second.items() if k not in times
    }


def test_probe_reads_features():
    """The label as a feature is told perfectly, noise is not."""
    data = paper.load_data(paper.data_config("digits", 8))
    pixels = linear_probe(lambda images: images.flatten(1), data)
    assert 0.9 < pixels < 1  # 8x8 digits are nearly linear
    assert linear_probe(lambda images: torch.rand(len(images), 4), data) < 0.3


def test_pretrained_encoder_is_a_model_to_finetune(tmp_path):
    out = tmp_path / "mae"
    done = CliRunner().invoke(
        app,
        [
            "pretrain",
            "--data",
            "digits",
            "--epochs",
            "1",
            "--no-probe",
            "--out",
            str(out),
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["method"] == "mae"
    from fastvit.train.models import load_source

    source = load_source(str(out))
    assert source.model.num_classes == 0
    torch.manual_seed(0)
    fresh = VisionTransformer(**paper.PRESETS["vit_digits"] | {"num_classes": 0})
    name = "blocks.0.mlp.fc1.weight"
    trained, drawn = source.model.get_parameter(name), fresh.get_parameter(name)
    assert trained.shape == drawn.shape
    assert not torch.equal(trained, drawn)
    again = CliRunner().invoke(app, ["pretrain", "--data", "digits", "--out", str(out)])
    assert again.exit_code == 1
    assert "finished pre-training" in again.output
