"""benchmarks/gpu.py: a dry run through every step, and steps that go wrong in every way."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastvit.bench import records
from fastvit.kernels.specs import all_specs

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
STEPS = (
    "environment", "numerics_linear", "numerics_attention", "numerics_other",
    "numerics_fp8", "parity", "tune",
    "models", "ops", "first_call", "training", "models_more",
)  # fmt: skip

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
    gpu.Step("environment", roof, limit=60),
    gpu.Step("faulty", items, limit=120, stall=STALL),
    gpu.Step("broken", lambda settings: 1 / 0, limit=60),
    gpu.Step("next", lambda settings: {"one": lambda: {"passed": True}}, limit=60),
)
sys.exit(gpu.main())
"""
STALL = 12  # seconds without news before a step is killed; its imports take a few


# what a machine with little more than torch, triton and timm does not have
ABSENT = ("typer", "rich", "matplotlib", "transformers", "onnx", "skimage", "safetensors")


def run(script: Path, *arguments: str, modules: Path = SCRIPT.parent) -> Any:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{modules}"}
    return subprocess.run(
        [sys.executable, str(script), "--dry-run", *arguments],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip


def read(folder: Path, step: str) -> dict[str, Any]:
    return json.loads((folder / f"{step}.json").read_text())


def test_a_dry_run_walks_through_every_step_and_none_is_run_twice(tmp_path: Path):
    lacking = "import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    (tmp_path / "sitecustomize.py").write_text(lacking.format(ABSENT=ABSENT))
    done = run(SCRIPT, "--out", str(tmp_path), "--seed", "5", modules=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in STEPS:
        record = read(tmp_path, step)
        assert record["complete"], (step, record["failed"])
        assert record["dry_run"]
        assert record["seed"] == 5
        assert record["environment"]["TRITON_INTERPRET"] == "1"
    numerics = [name for name in STEPS if name.startswith("numerics")]
    for step in (*numerics, "parity"):
        results = read(tmp_path, step)["results"]
        assert all(result["passed"] and result["rows"] for result in results)
        assert read(tmp_path, step)["environment"]["FASTVIT_BACKEND"] == "triton"
    dtypes = {result["dtype"] for result in read(tmp_path, "numerics_other")["results"]}
    assert dtypes == {"torch.bfloat16", "torch.float16", "torch.float32"}
    ops = {result["op"] for step in numerics for result in read(tmp_path, step)["results"]}
    assert ops == all_specs().keys()
    for step in ("models", "ops", "training", "models_more"):
        for result in read(tmp_path, step)["results"]:
            assert result["contenders"]["fastvit"]["median"] > 0
            assert result["item"] in done.stdout
    assert read(tmp_path, "first_call")["results"][0]["first_call_s"] > 0

    machines, passed_over = records.read(tmp_path)
    assert not machines  # toy sizes in the interpreter are no speeds
    assert len([text for text in passed_over if text.endswith("a dry run")]) == len(STEPS)

    again = run(SCRIPT, "--out", str(tmp_path))
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(STEPS)


def test_no_failure_stops_the_rest_and_the_next_run_tries_it_again(tmp_path: Path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.replace("STALL", str(STALL)))
    out = tmp_path / "out"
    done = run(script, "--out", str(out))
    assert done.returncode == 1
    faulty = read(out, "faulty")
    assert [result["item"] for result in faulty["results"]] == ["good", "last"]
    assert faulty["failed"] == {
        "raises": "ValueError: no such shape",
        "crashes": "ended with status 9",
        "hangs": f"took longer than {STALL} s",
    }
    assert not faulty["complete"]
    assert read(out, "next")["complete"]
    assert "broken             failed: ended with status 1" in done.stdout
    assert "ZeroDivisionError" in (out / "broken.log").read_text()
    for reason in faulty["failed"].values():
        assert reason in done.stdout

    again = run(script, "--out", str(out))
    assert read(out, "faulty")["complete"]
    assert not read(out, "faulty")["failed"]
    marks = {name: (out / name).read_text() for name in ("good", "raises", "hangs", "last")}
    assert marks == {"good": "x", "raises": "xx", "hangs": "xx", "last": "x"}
    assert "next               done before" in again.stdout


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
