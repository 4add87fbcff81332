"""`fastvit coverage`: what it counts is so, and what goes wrong fails it."""

import json
import sys
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fastvit
from fastvit import obstacles
from fastvit.check import coverage
from fastvit.check.coverage import Covered, Library, cover, select
from fastvit.cli.main import app

ONE_EACH = [
    ("timm", "vit_tiny_patch16_224"),
    ("transformers", "Dinov2"),
    ("torchvision", "vit_b_32"),
    ("open_clip", "ViT-B-32"),
]


@pytest.mark.parametrize(("library", "architecture"), ONE_EACH)
def test_one_of_each_library(library, architecture):
    if library == "open_clip":
        pytest.importorskip("open_clip")
    row = cover(library, architecture)
    assert row.raised is None
    assert row.sound
    assert row.fully_fused
    assert (row.fused, row.left, row.why) == (2, 0, ())


OTHER_BLOCKS = ["eva02_tiny_patch14_224", "beit_base_patch16_224", "naflexvit_base_patch16_gap"]


@pytest.mark.parametrize(
    ("library", "architecture"), [*ONE_EACH[:3], *(("timm", name) for name in OTHER_BLOCKS)]
)
def test_fused_blocks_call_our_attention(library, architecture):
    """The plan says what runs; here is counted what did."""
    model, run = coverage.libraries()[library].build(architecture)
    fastvit.accelerate(model)
    calls: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.endswith("kernels/attention/op.py"):
            calls.append(code.co_name)

    with torch.no_grad():
        sys.setprofile(profile)
        try:
            run(model)
        finally:
            sys.setprofile(None)
    assert sum(name.startswith("attention") for name in calls) >= 2


def test_names():
    pairs, _ = select(["timm"])
    assert len(pairs) >= 270  # 293 in timm 1.0.31
    assert ("timm", "eva02_tiny_patch14_224") in pairs
    pairs, _ = select(["torchvision", "transformers"], "*vit_b*")
    assert pairs == [("torchvision", "vit_b_16"), ("torchvision", "vit_b_32")]


def test_what_is_not_installed_is_said(monkeypatch):
    def absent() -> list[str]:
        raise ImportError("no such library")

    known = coverage.libraries()
    library = Library(absent, known["timm"].build)
    monkeypatch.setattr(coverage, "libraries", lambda: known | {"timm": library})
    pairs, missing = select(pattern="vit_b_16")
    assert (pairs, missing) == ([("torchvision", "vit_b_16")], ["timm"])
    with pytest.raises(ImportError, match="no such library"):
        select(["timm"])


def test_bad_choices():
    with pytest.raises(ValueError, match="unknown library 'keras'; known: timm, transformers"):
        select(["keras"])
    with pytest.raises(ValueError, match="no architecture matches 'resnet50'"):
        select(["timm"], "resnet50")


class Scaled(nn.Module):
    """A model that `accelerate` leaves, with an output to spoil."""

    factor = 1.0

    def forward(self, x: torch.Tensor) -> Any:
        return {"y": x * self.factor, "none": None}


def fake(monkeypatch: Any, spoil: Any) -> None:
    """A library of one model, on which `accelerate` does `spoil`."""
    x = torch.randn(2, 3)
    library = Library(lambda: ["one"], lambda name: (Scaled(), lambda model: model(x)))
    monkeypatch.setattr(coverage, "libraries", lambda: {"fake": library})
    monkeypatch.setattr(coverage, "accelerate", spoil)


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_a_wrong_model_is_not_sound(monkeypatch, tmp_path, factor):
    fake(monkeypatch, lambda model: setattr(model, "factor", factor))
    row = cover("fake", "one")
    assert not row.sound
    assert row.raised is None
    done = CliRunner().invoke(app, ["coverage", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "0 of 1 keep their numbers" in " ".join(done.output.split())
    assert json.loads((tmp_path / "coverage.json").read_text())["passed"] is False


def test_what_raises_is_reported(monkeypatch):
    def planted(model: nn.Module) -> None:
        raise RuntimeError("planted")

    fake(monkeypatch, planted)
    row = cover("fake", "one")
    assert row == Covered("fake", "one", raised="RuntimeError: planted")
    done = CliRunner().invoke(app, ["coverage", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["summary"]["fake"]["raised"] == 1


def test_blocks_left_are_counted_with_their_reason(monkeypatch):
    """A block of which no layer is known is left, and still gives the library's numbers."""
    monkeypatch.setattr(obstacles, "MAX_HEAD_DIM", 8)
    row = cover("torchvision", "vit_b_32")
    assert row.sound
    assert not row.fully_fused
    assert (row.fused, row.left) == (0, 2)
    assert "head dimension 64 is above 8" in row.why[0]


def test_command(tmp_path):
    arguments = ["coverage", "vit_tiny_patch16_???", "--library", "timm", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert json.loads((tmp_path / "coverage.json").read_text()) == record
    assert record["passed"]
    names = [row["architecture"] for row in record["architectures"]]
    assert names == ["vit_tiny_patch16_224", "vit_tiny_patch16_384"]
    assert record["summary"]["timm"]["fully_fused"] == 2
    text = (tmp_path / "coverage.md").read_text()
    assert "| `vit_tiny_patch16_384` | 2 | 0 |" in text
    done = CliRunner().invoke(app, ["coverage", "absent*"])
    assert done.exit_code == 1
    assert "no architecture matches 'absent*'" in done.stderr


@pytest.mark.slow
def test_every_architecture():
    rows = [cover(*pair) for pair in select()[0]]
    assert [row for row in rows if not row.sound] == []
    fused = sum(row.fully_fused for row in rows if row.library == "timm")
    assert fused >= 286
