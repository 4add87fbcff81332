"""Exports are loaded again and give the model's outputs, for other batches and sizes too."""

import json
import sys
from typing import Any

import pytest
import timm
import torch
from timm_models import TOLERANCE, error, randomise, reseed
from torch import Tensor, nn
from typer.testing import CliRunner

import fastvit
from fastvit import export, samples
from fastvit.cli.main import app
from fastvit.export import export_model, load_exported

SMALL: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}


def model_of(library: Any, **options: Any) -> Any:
    reseed()
    model = library.create_model("vit_tiny_patch16_224", **SMALL | options).eval()
    randomise(model)
    return fastvit.accelerate(model) if library is timm else model


@torch.no_grad()
def check(model: Any, path: Any, to: str, shapes: list[tuple[int, ...]]) -> None:
    loaded = load_exported(path, to)
    for shape in shapes:
        x = torch.randn(shape)
        assert error(loaded(x), model(x)) <= TOLERANCE


@pytest.mark.parametrize(
    ("library", "to"),
    [(fastvit, "torch"), (timm, "torch"), (timm, "onnx")],
    ids=["fastvit torch", "timm torch", "timm onnx"],  # onnx takes three seconds
)
def test_any_batch(tmp_path, library, to):
    model = model_of(library, reg_tokens=2, init_values=0.5)
    path = tmp_path / f"model{export.FORMATS[to]}"
    done = export_model(model, path, to)
    assert done.passed
    assert [c.shape for c in done.checks] == [(1, 3, 32, 32), (3, 3, 32, 32)]
    assert all(name.startswith("aten.") for name in done.operators)
    assert "aten.scaled_dot_product_attention.default" in done.operators
    check(model, path, to, [(5, 3, 32, 32), (1, 3, 32, 32)])
    if to == "onnx":
        check_onnx(path)


def check_onnx(path: Any) -> None:
    """Standard operators only, and a batch with a name rather than a number."""
    import onnx

    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param


@pytest.mark.parametrize(
    ("library", "to"),
    [(fastvit, "torch"), (timm, "torch"), (timm, "onnx")],
    ids=["fastvit torch", "timm torch", "timm onnx"],  # onnx takes three seconds
)
def test_any_size(tmp_path, library, to):
    model = model_of(library, dynamic_img_size=True)
    path = tmp_path / f"model{export.FORMATS[to]}"
    assert export_model(model, path, to, dynamic_size=True).passed
    check(model, path, to, [(1, 3, 32, 32), (2, 3, 48, 32), (2, 3, 32, 48), (1, 3, 80, 64)])


@pytest.mark.slow  # compiles C++: half a minute
@pytest.mark.parametrize("dynamic", [False, True])
def test_aoti(tmp_path, dynamic):
    try:
        export._check_tools("aoti")
    except RuntimeError as problem:
        pytest.skip(str(problem))
    model = model_of(timm, dynamic_img_size=dynamic)
    path = tmp_path / "model.pt2"
    assert export_model(model, path, "aoti", dynamic_size=dynamic).passed
    sizes = [(5, 3, 32, 32), *([(1, 3, 80, 64)] if dynamic else [])]
    check(model, path, "aoti", sizes)


def test_bfloat16_goes_by_the_numerics_policy(tmp_path):
    model = model_of(fastvit).bfloat16()
    assert export_model(model, tmp_path / "model.pt2").passed


def test_kernels_are_kept_out(triton_path, tmp_path):
    """Where Triton would run, the graph still has PyTorch's operators."""
    done = export_model(model_of(fastvit), tmp_path / "model.pt2")
    assert done.passed
    assert not any("fastvit" in name for name in done.operators)


class Foreign(nn.Module):
    """With an operator of ours that no other runtime knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fastvit.rms_norm(x, self.weight, 1e-6)


def test_foreign_operators_are_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"not of PyTorch: fastvit\.rms_norm"):
        export_model(Foreign().eval(), tmp_path / "x.pt2", img_size=(4, 4))


def test_a_wrong_export_is_seen(tmp_path, monkeypatch):
    model = model_of(fastvit)
    write = export._write

    def planted(program: Any, *args: Any) -> None:
        with torch.no_grad():
            program.state_dict["head.weight"].mul_(1.01)
        write(program, *args)
        with torch.no_grad():
            program.state_dict["head.weight"].div_(1.01)

    monkeypatch.setattr(export, "_write", planted)
    done = export_model(model, tmp_path / "model.pt2")
    assert not done.passed
    assert done.checks[0].max_error > 1e-3


@pytest.mark.parametrize(
    ("options", "problem", "message"),
    [
        ({"to": "jit"}, ValueError, "format 'jit' is not one of torch, aoti, onnx"),
        ({"to": "onnx"}, ValueError, "does not end in .onnx"),
        ({"model": nn.Linear(3, 3).eval()}, ValueError, r"img_size must be \(height, width\)"),
        ({"dynamic_size": True, "model": nn.Linear(3, 3).eval(), "img_size": (8, 8)}, ValueError,
         "needs a model with patch_embed.patch_size"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, options, problem, message):
    model = options.pop("model", None) or model_of(fastvit)
    with pytest.raises(problem, match=message):
        export_model(model, tmp_path / "model.pt2", **options)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        export_model(model_of(fastvit).train(), tmp_path / "model.pt2")


def test_missing_tools_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="needs onnxscript"):
        export_model(model_of(fastvit), tmp_path / "model.onnx", "onnx")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "absent-compiler"))
    with pytest.raises(RuntimeError, match="needs a C"):
        export_model(model_of(fastvit), tmp_path / "model.pt2", "aoti")


# --------------------------------------------------------------------------- the command


def test_command(tmp_path):
    path = tmp_path / "dino.pt2"
    arguments = ["export", "--img-size", "56", "--out", str(path), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["passed"]
    assert (record["format"], record["path"]) == ("torch", str(path))
    model = fastvit.create_model(
        samples.DINOV2_SMALL, img_size=56, num_classes=0, checkpoint=samples.dinov2_small(56)
    ).eval()
    check(model, path, "torch", [(2, 3, 56, 56)])


def test_command_fails_where_the_export_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "AGREEMENT", -1.0)
    arguments = ["export", "--img-size", "28", "--out", str(tmp_path / "x.pt2")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "differs" in done.output


def test_command_names_bad_input(tmp_path):
    done = CliRunner().invoke(app, ["export", "--img-size", "30", "--out", str(tmp_path / "x.pt2")])
    assert done.exit_code == 1
    assert "14x14 does not divide image size 30x30" in done.stderr
