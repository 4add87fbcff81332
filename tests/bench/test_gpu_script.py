"""benchmarks/gpu.py: a dry run through every step, and steps that go wrong in every way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvit.bench import records
from fastvit.kernels.specs import all_specs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
RECORDS = {
    "environment": ("environment",),
    "numerics": (
        "numerics_attention_qkv", "numerics_attention", "numerics_linear", "parity", "numerics_mlp",
        "numerics_norm_linear", "numerics_patch_embed", "numerics_fp8_linear", "proofs",
    ),
    "models": ("models", "first_call", "training", "models_more"),
    "latency": ("latency",),
    "ops": ("ops",),
    "tune": ("tune",),
}  # fmt: skip
STEPS = [step for steps in RECORDS.values() for step in steps]

# what gpu.py does with items that fail; each marks that it ran in the folder
FAULTY = """
import os, sys, time
from pathlib import Path
import gpu

def items(settings):
    def item(name, fault=None):
        def run():
            first = not (settings.out / name).exists()
            with (settings.out / name).open("a") as marks:
                marks.write("x")
            if first and fault:
                fault()
            return {"passed": True}
        return run
    def raises():
        raise ValueError("no such shape")
    return {
        "good": item("good"),
        "raises": item("raises", raises),
        "crashes": item("crashes", lambda: os._exit(9)),
        "hangs": item("hangs", lambda: time.sleep(600)),
        "last": item("last"),
    }

def roof(settings):
    return {"roof": lambda: {"roof": {"matmul_flops_per_s": 1e12, "copy_bytes_per_s": 1e12}}}

gpu.STEPS = (
    gpu.Step("environment", roof, "environment", limit=60),
    gpu.Step("faulty", items, "all", limit=120, stall=STALL),
    gpu.Step("broken", lambda settings: 1 / 0, "all", limit=60),
    gpu.Step("next", lambda settings: {"one": lambda: {"passed": True}}, "all", limit=60),
)
sys.exit(gpu.main())
"""
STALL = 12  # seconds without news before a step is killed; its imports take a few


# what a machine with little more than torch, triton and timm does not have
ABSENT = ("typer", "rich", "matplotlib", "transformers", "onnx", "skimage", "safetensors")


def run(script: Path, *arguments: str, modules: Path = SCRIPT.parent) -> Any:
    # an archive's script finds its own package
    root = ROOT if script.parent.name != "benchmarks" else script.parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{modules}"}
    return subprocess.run(
        [sys.executable, str(script), "--dry-run", *arguments],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip


def read(folder: Path, record: str) -> dict[str, Any]:
    return json.loads((folder / f"{record}.json").read_text())


def results(folder: Path, step: str) -> list[dict[str, Any]]:
    record = next(name for name, steps in RECORDS.items() if step in steps)
    return [result for result in read(folder, record)["results"] if result["step"] == step]


@pytest.mark.slow
def test_a_dry_run_walks_through_every_step_and_none_is_run_twice(tmp_path: Path):
    """In a copy without .git, as an archive is."""
    archive, out, modules = (tmp_path / name for name in ("archive", "out", "modules"))
    for name in ("benchmarks", "fastvit", "kernels"):
        shutil.copytree(ROOT / name, archive / name, symlinks=True)
    modules.mkdir()
    lacking = "import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    (modules / "sitecustomize.py").write_text(lacking.format(ABSENT=ABSENT))
    script = archive / "benchmarks" / "gpu.py"
    options = ("--out", str(out), "--commit", "75cf362")
    done = run(script, *options, "--seed", "5", modules=modules)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([*out.iterdir()]) <= 9 - 2  # a GPU adds two ops' proofs
    for name, steps in RECORDS.items():
        record = read(out, name)
        assert sorted(record["complete"]) == sorted(steps), record["failed"]
        assert record["dry_run"]
        assert record["seed"] == 5
        assert record["environment"]["TRITON_INTERPRET"] == "1"
        assert record["environment"]["git_commit"] == "75cf362"
    assert read(out, "numerics")["environment"]["FASTVIT_BACKEND"] == "triton"
    numerics = [step for step in STEPS if step.startswith("numerics")]
    for step in (*numerics, "parity"):
        assert all(result["passed"] and result["rows"] for result in results(out, step))
    dtypes = {result["dtype"] for result in results(out, "numerics_patch_embed")}
    assert dtypes == {"torch.bfloat16", "torch.float16", "torch.float32"}
    ops = {result["op"] for step in numerics for result in results(out, step)}
    assert ops == all_specs().keys()
    variants = {(r["configuration"] or {}).get("variant") for r in results(out, "proofs")}
    assert {"pingpong", "coop", "roles", "head", "stream", "whole"} < variants
    for step in ("models", "ops", "training", "models_more"):
        for result in results(out, step):
            assert result["contenders"]["fastvit"]["median"] > 0
            assert result["item"] in done.stdout
    assert results(out, "first_call")[0]["first_call_s"] > 0

    machines, passed_over = records.read(out)
    assert not machines  # toy sizes in the interpreter are no speeds
    assert len([text for text in passed_over if text.endswith("a dry run")]) == len(RECORDS)

    again = run(script, *options, modules=modules)
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(STEPS)


def test_no_failure_stops_the_rest_and_the_next_run_tries_it_again(tmp_path: Path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.replace("STALL", str(STALL)))
    out = tmp_path / "out"
    done = run(script, "--out", str(out))
    assert done.returncode == 1
    record = read(out, "all")
    assert sorted(result["item"] for result in record["results"]) == ["good", "last", "one"]
    assert record["failed"]["faulty"] == {
        "raises": "ValueError: no such shape",
        "crashes": "ended with status 9",
        "hangs": f"took longer than {STALL} s",
    }
    assert record["complete"] == ["next"]
    assert "broken                 failed: ended with status 1" in done.stdout
    assert "ZeroDivisionError" in (out / "gpu.log").read_text()
    for reason in record["failed"]["faulty"].values():
        assert reason in done.stdout

    again = run(script, "--out", str(out))
    assert read(out, "all")["complete"] == ["next", "faulty"]
    assert not read(out, "all")["failed"]["faulty"]
    marks = {name: (out / name).read_text() for name in ("good", "raises", "hangs", "last")}
    assert marks == {"good": "x", "raises": "xx", "hangs": "xx", "last": "x"}
    assert "next                   done before" in again.stdout


def test_without_time_nothing_is_started(tmp_path: Path):
    done = run(SCRIPT, "--out", str(tmp_path), "--minutes", "0")
    assert done.returncode == 1
    assert not list(tmp_path.glob("*.json"))


def test_without_a_gpu_it_says_what_works_without_one(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
