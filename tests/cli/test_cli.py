"""The commands as a user runs them: output, JSON, exit status, bad input."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from seeds import SEED
from torch import Tensor
from typer.testing import CliRunner

from fastvit import numerics, ops
from fastvit.check import environment
from fastvit.cli import _shared
from fastvit.cli.main import app
from fastvit.cli.numerics import choose_path
from fastvit.kernels import _tuning, specs

ROOT = Path(__file__).parents[2]
SEEDED = ("--seed", str(SEED))  # where the verdict counts


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def run_json(*arguments: str, exit_code: int = 0) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def run_process(*arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """A fresh Python with some environment variables changed, or removed by None."""
    values = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    env = {name: value for name, value in values.items() if value is not None}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def test_help_names_every_command():
    done = run()  # no arguments
    assert done.exit_code == 2
    for name in ("demo", "numerics", "bench", "list", "doctor"):
        assert name in done.output
        assert run(name, "--help").exit_code == 0


def test_json_has_no_nan():
    assert _shared.finite({"a": [1.0, float("nan")], "b": (float("inf"), "x")}) == {
        "a": [1.0, None],
        "b": [None, "x"],
    }


# --------------------------------------------------------------------------- numerics


def test_numerics_certifies_kernels_in_the_interpreter():
    record = run_json("numerics", "--op", "linear", "--op", "rms_norm", "--forward-only", *SEEDED)
    assert record["passed"]
    assert record["path"] == "Triton in its interpreter"
    assert record["policy"]["allowed_ratio"] == numerics.ALLOWED_RATIO
    every = specs.all_specs()
    assert [(e["op"], e["dtype"], e["case"]) for e in record["certificate"]] == [
        (op, dtype, case.name)
        for op in ("rms_norm", "linear")  # in the order of a forward
        for dtype in ("bfloat16", "float16", "float32")
        for case in every[op].cases
    ]
    for entry in record["certificate"]:
        (row,) = entry["rows"]
        assert row["name"] == "output"
        assert row["passed"] is entry["passed"] is True


def test_numerics_prints_the_certificate_with_gradients():
    arguments = ("--op", "linear", "--dtype", "float32", "--path", "torch", "--seed", "5")
    done = run("numerics", *arguments)
    assert done.exit_code == 0, done.output
    for text in ("linear", "float32", "outlier", "output", "grad of", "pass", "seed 5",
                 "path: plain PyTorch", f"torch {torch.__version__}"):  # fmt: skip
        assert text in done.stdout
    assert "FAIL" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= _shared.FILE_WIDTH


def test_seeds_are_fresh_and_repeatable():
    arguments = ("numerics", "--op", "rms_norm", "--dtype", "float32", "--path", "torch")
    first = run_json(*arguments)
    second = run_json(*arguments)
    assert first["seed"] != second["seed"]
    assert first["certificate"] != second["certificate"]
    again = run_json(*arguments, "--seed", str(first["seed"]))
    assert again["certificate"] == first["certificate"]


def plant(monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., Tensor]) -> None:
    every = specs.all_specs()
    every[name] = dataclasses.replace(every[name], op=broken)
    monkeypatch.setattr(specs, "all_specs", lambda: every)


def wrong_softmax_scale(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None) -> Tensor:
    return ops.attention(q, k, v, attn_mask, scale=(q.shape[-1] + 8) ** -0.5)


def swapped_layer_scale(
    x: Tensor, *rest: Any, scale: Any = None, residual: Any = None, **options: Any
) -> Tensor:
    """The residual sum first, LayerScale after it."""
    y = ops.linear(x, *rest, **options, residual=residual)
    return y if scale is None else y * scale


def missing_bias(x: Tensor, weight: Tensor, bias: Any = None, **options: Any) -> Tensor:
    return ops.linear(x, weight, None, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "broken", "wrong_cases"),
    [
        ("attention", wrong_softmax_scale, {"ViT 224, N=197", "bias per head", "d=72"}),
        ("linear", swapped_layer_scale, {"several tiles, residual"}),
        ("linear", missing_bias, {"one row", "odd sizes, gelu", "several tiles, residual"}),
    ],
)
def test_numerics_catches_a_planted_bug(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    broken: Callable[..., Tensor],
    wrong_cases: set[str],
    dtype: str,
):
    plant(monkeypatch, name, broken)
    arguments = ("--op", name, "--dtype", dtype, "--path", "torch", "--forward-only", *SEEDED)
    record = run_json("numerics", *arguments, exit_code=1)
    assert not record["passed"]
    assert wrong_cases <= {e["case"] for e in record["certificate"] if not e["passed"]}
    done = run("numerics", *arguments)
    assert done.exit_code == 1
    assert "FAIL" in done.stdout


def test_numerics_fails_an_op_that_raises_and_goes_on(monkeypatch: pytest.MonkeyPatch):
    def broken(x: Tensor, **rest: Any) -> Tensor:
        if x.shape[0] == 1:
            raise RuntimeError("out of shared memory")
        return ops.linear(x, **rest)

    plant(monkeypatch, "linear", broken)
    arguments = ("numerics", "--op", "linear", "--dtype", "float32", "--path", "torch", *SEEDED)
    record = run_json(*arguments, exit_code=1)
    failed = [entry for entry in record["certificate"] if not entry["passed"]]
    assert [(e["case"], e["error"]) for e in failed] == [
        ("one row", "RuntimeError: out of shared memory")
    ]
    assert len(record["certificate"]) == len(specs.all_specs()["linear"].cases)
    assert "raised (1x): RuntimeError: out of shared memory" in run(*arguments).stdout


def test_numerics_fails_nan(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, "rms_norm", lambda x, weight, eps: x * float("nan"))
    arguments = ("numerics", "--op", "rms_norm", "--path", "torch", "--forward-only")
    record = run_json(*arguments, exit_code=1)
    assert not any(entry["passed"] for entry in record["certificate"])
    assert record["certificate"][0]["rows"][0]["max_error"] is None
    assert "nan" in run(*arguments).stdout


def test_numerics_certifies_a_model_through_the_kernels():
    (entry,) = run_json(
        "numerics", "--model", "test_vit", "--depth", "1", "--dtype", "float32", *SEEDED
    )["certificate"]  # fmt: skip
    assert entry["model"] == "test_vit"
    assert entry["unfused"] == []
    assert entry["images"] == 4
    names = [row["name"] for row in entry["rows"]]
    assert names[:2] == ["logits", "pooled"]
    assert len(names) == 8  # and six gradients


def test_numerics_prints_a_models_certificate():
    arguments = ("--model", "test_vit", "--path", "torch", "--dtype", "float16", *SEEDED)
    done = run("numerics", *arguments)
    assert done.exit_code == 0, done.output
    for text in ("test_vit", "logits", "pooled", "top-1 as float64", "pass"):
        assert text in done.stdout


def test_numerics_catches_a_planted_bug_in_a_model(monkeypatch: pytest.MonkeyPatch):
    right = ops.attention_qkv

    def wrong_scale(qkv: Tensor, num_heads: int, *rest: Any) -> Tensor:
        return right(qkv, num_heads, *rest, scale=0.25)  # 32 ** -0.5 is right

    monkeypatch.setattr(ops, "attention_qkv", wrong_scale)
    record = run_json(
        "numerics", "--model", "test_vit", "--depth", "2", "--path", "torch", *SEEDED, exit_code=1
    )
    assert [entry["dtype"] for entry in record["certificate"]] == ["bfloat16", "float16", "float32"]
    assert not any(entry["passed"] for entry in record["certificate"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--op", "lnear"), ["lnear", "patch_embed", "attention_qkv", "mlp"]),
        (("--model", "vit_base_patch16_225"), ["vit_base_patch16_225", "vit_base_patch16_224"]),
        (("--op", "mlp", "--model", "test_vit"), ["--op", "--model"]),
        (("--dtype", "float8"), ["float8", "bfloat16"]),
        (("--depth", "0"), ["--depth"]),
    ],
)
def test_numerics_refuses_what_it_does_not_know(arguments: tuple[str, ...], named: list[str]):
    done = run("numerics", *arguments)
    assert done.exit_code == 2
    for text in named:
        assert text in done.output


def test_numerics_restarts_itself_in_the_interpreter():
    arguments = ("--op", "rms_norm", "--dtype", "float32", "--forward-only", "--json", *SEEDED)
    done = run_process("-m", "fastvit", "numerics", *arguments, TRITON_INTERPRET=None)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == "Triton in its interpreter"


def test_path_without_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert choose_path("auto") == ("torch", "cpu")
    done = run("numerics", "--path", "triton")
    assert done.exit_code == 2
    assert "triton is not installed" in done.output


# --------------------------------------------------------------------------- list


def test_list_gives_timms_shapes():
    (found,) = run_json("list", "vit_tiny_patch16_224")
    model = timm.create_model("vit_tiny_patch16_224")
    assert found == {
        "name": "vit_tiny_patch16_224",
        "img_size": [224, 224],
        "patch_size": [16, 16],
        "embed_dim": 192,
        "depth": 12,
        "num_heads": 3,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def test_list_prints_a_table():
    done = run("list", "vit_tiny*")
    assert done.exit_code == 0, done.output
    assert "vit_tiny_patch16_224" in done.stdout
    assert "5.7 M" in done.stdout
    assert "vit_base" not in done.stdout


def test_list_refuses_a_pattern_that_matches_nothing():
    done = run("list", "resnet*")
    assert done.exit_code == 2
    assert "resnet*" in done.output


# --------------------------------------------------------------------------- doctor


def test_doctor_shows_the_tuning_cache(tmp_path, monkeypatch):
    row = {"dtype": ["bfloat16"], "tile": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}}
    path = tmp_path / "tuning" / "linear" / "sm90.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows": [row]}))
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    _tuning.reload()
    try:
        record = run_json("doctor")
        table = run("doctor").stdout
    finally:
        _tuning.reload()
    assert record["tuning_cache"] == [
        {"op": "linear", "arch": "sm90", "path": str(path), "rows": 1}
    ]
    assert "measured here, linear" in table


def test_doctor_tells_versions_paths_and_tables():
    with ops.backend("auto"):  # as a process with TRITON_INTERPRET=1 starts
        record = run_json("doctor")
        table = run("doctor").stdout
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["timm"] == timm.__version__
    assert record["environment"]["TRITON_INTERPRET"] == "1"
    assert record["paths"]["cpu"]["path"] == "interpret"
    tables = {(entry["op"], entry["arch"]) for entry in record["tuning_tables"]}
    files = {(path.parts[-3], path.stem) for path in (ROOT / "kernels").glob("*/tuning/*.json")}
    assert tables == files != set()
    for text in ("TRITON_INTERPRET=1", torch.__version__, "linear", "sm90"):
        assert text in table
    assert "were proven on NVIDIA H200" in record["hopper"]["ledger"]
    if not torch.cuda.is_available():
        assert "no CUDA or ROCm device" in record["hopper"]["problem"]
        assert "not used: no CUDA" in " ".join(table.split())


@pytest.mark.parametrize(
    ("changes", "path", "reason"),
    [
        ({}, "torch", "Triton needs a GPU"),
        ({"FASTVIT_BACKEND": "torch"}, "torch", "FASTVIT_BACKEND=torch"),
        ({"FASTVIT_BACKEND": "triton"}, "none", "FASTVIT_BACKEND=triton, but"),
    ],
)
def test_doctor_without_triton_and_timm(changes: dict[str, str], path: str, reason: str):
    code = (
        "import sys; sys.modules['triton'] = sys.modules['timm'] = None\n"
        "from fastvit.cli.main import app; app(['doctor', '--json'])"
    )
    done = run_process("-c", code, TRITON_INTERPRET=None, CUDA_VISIBLE_DEVICES="", **changes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["paths"]["cpu"]
    assert found["path"] == path
    assert reason in found["reason"]


def test_the_commit_is_of_this_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, timeout=30)

    package = tmp_path / "fastvit"
    package.mkdir()
    (package / "file.py").touch()
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    monkeypatch.setattr(environment, "PACKAGE", package)
    commit = environment.git_commit()
    assert commit is not None
    assert len(commit) == 40
    (package / "file.py").write_text("changed")
    assert environment.git_commit() == f"{commit}-dirty"
    monkeypatch.setattr(environment, "PACKAGE", package / "site-packages")
    (package / "site-packages").mkdir()
    assert environment.git_commit() is None
