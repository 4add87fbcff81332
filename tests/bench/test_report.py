"""What `fastvit report` draws from invented records, what it refuses, the floor's arithmetic."""

import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fastvit._compat import import_timm
from fastvit.bench import figures, floor, gallery, models, records, report
from fastvit.bench.timing import Race, Timing
from fastvit.cli.main import app

ROOF = {"matmul_flops_per_s": 100.0, "copy_bytes_per_s": 10.0}


def result(kind: str, case: str, times: dict[str, float], **more: Any) -> dict[str, Any]:
    timings = {name: Timing(time, 0.9 * time, 1.2 * time, 5) for name, time in times.items()}
    race = Race(timings, first_call=dict.fromkeys(times, 1.0))
    numerics = {"passed": True, "ratio": 1.0, "error": None}
    name = "layer" if kind == "op" else "vit"
    made = report.Result(kind, name, case, "bfloat16", race, numerics, flops=100, **more)
    return report.as_json(made, ROOF)


def gpu_record(**changes: Any) -> dict[str, Any]:
    """Two batches of a model with techniques, a training step, an op."""
    times = {"fastvit": 2.0, "fastvit + CUDA graphs": 1.0, "timm": 4.0}
    techniques = {name: models.TECHNIQUES[name] for name in times}
    results = [
        result("model", f"batch {batch}", times, batch=batch, techniques=techniques)
        for batch in (8, 1)
    ]
    results += [
        result("train", "batch 8", {"fastvit": 3.0, "timm": 4.0}, batch=8),
        result("op", "square", {"fastvit": 2.0, "eager": 3.0}, bytes=50),
    ]
    environment = {
        "date": "2030-01-02T00:00:00+00:00", "gpu": "Invented GPU", "cpu": "Invented CPU",
        "threads": 1, "torch": "9.9", "triton": "8.8", "timm": "7.7",
    }  # fmt: skip
    record = {
        "environment": environment, "device": "cuda", "dtype": "bfloat16", "seed": 1,
        "notes": [], "roof": ROOF, "results": results,
    }  # fmt: skip
    return record | changes


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, record in files.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["report", *arguments])


def test_every_picture_of_a_gpu_and_one_page_that_holds_them(tmp_path: Path):
    folder = write(tmp_path / "records", gpu=gpu_record())
    out = tmp_path / "out"
    done = run(str(folder), "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["notes"] == []
    pictures = {path.name.rpartition("_")[2] for path in out.glob("*.png")}
    assert pictures == {
        "models.png", "training.png", "ops.png", "latency.png", "roofline.png", "waterfall.png"
    }  # fmt: skip
    page = (out / "index.html").read_text()
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert base64.b64encode(path.read_bytes()).decode() in page
    for text in ("Invented GPU, torch 9.9", "vit, batch 1", "fastvit + CUDA graphs", "gpu.json"):
        assert text in page
    assert "http" not in page
    assert "No record" not in page


def test_without_a_gpu_record_it_says_so(tmp_path: Path):
    record = gpu_record(device="cpu")
    folder = write(tmp_path / "records", cpu=record)
    done = run(str(folder), "--out", str(tmp_path / "out"))
    assert done.exit_code == 0
    assert "No record" in done.stdout
    page = (tmp_path / "out" / "index.html").read_text()
    assert "no speed on a GPU is shown" in page
    assert "Invented CPU" in page
    assert "Invented GPU, torch" not in page


def test_an_empty_folder_gives_a_page_that_says_so_and_a_missing_one_an_error(tmp_path: Path):
    paths, notes = gallery.write(write(tmp_path / "empty"), tmp_path / "out")
    assert [path.name for path in paths] == ["index.html"]
    assert len(notes) == 1
    assert run(str(tmp_path / "missing")).exit_code == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dry_run": True}, "a dry run"),
        ({"predicted": True}, "a prediction"),
        ({"roof": None}, "beside what roof"),
        ({"environment": {"date": "2030-01-02", "gpu": None}}, "on what GPU"),
        ({"environment": {"gpu": "Invented GPU"}}, "when it was measured"),
    ],
)
def test_what_was_not_measured_in_earnest_is_not_drawn(tmp_path: Path, change, reason):
    machines, passed_over = records.read(write(tmp_path / "records", a=gpu_record(**change)))
    assert not machines
    (note,) = passed_over
    assert reason in note


def test_times_without_rounds_are_not_drawn(tmp_path: Path):
    record = gpu_record()
    for timed in record["results"][1:]:
        timed["contenders"]["fastvit"].pop("rounds")
    (machine,), _ = records.read(write(tmp_path / "records", a=record))
    assert [timed["case"] for timed in machine["results"]] == ["batch 8"]


def test_the_newest_result_of_a_case_counts(tmp_path: Path):
    old, new = gpu_record(), gpu_record()
    new["environment"] = {**new["environment"], "date": "2031-01-01T00:00:00+00:00"}
    new["results"] = [result("model", "batch 1", {"fastvit": 7.0, "timm": 8.0}, batch=1)]
    folder = write(tmp_path / "records", b_old=old, a_new=new, broken=None, other={"rows": []})
    (folder / "torn.json").write_text("{")
    (machine,), passed_over = records.read(folder)
    assert len(machine["results"]) == 4
    times = {r["case"]: r["contenders"]["fastvit"]["median"] for r in machine["results"]}
    assert times["batch 1"] == 7.0
    assert times["batch 8"] != 7.0
    assert [note.partition(":")[0] for note in passed_over] == [str(folder / "torn.json")]


def test_records_of_earlier_versions_are_read(tmp_path: Path):
    record = gpu_record()
    for timed in record["results"]:
        for field in ("bounds", "techniques"):
            timed.pop(field)
        for contender in timed["contenders"].values():
            contender.pop("speedup")
    (machine,), _ = records.read(write(tmp_path / "records", a=record))
    assert machine["results"][0]["contenders"]["fastvit"]["speedup"] == 2.0
    assert report.rows(machine["results"][0])


def test_cumulative_techniques_are_steps_of_a_waterfall():
    timed = gpu_record()["results"][0]
    steps, left_out = records.waterfall(timed)
    assert steps == [
        ("timm", "timm"),
        ("Triton kernels", "fastvit"),
        ("CUDA graphs", "fastvit + CUDA graphs"),
    ]
    assert not left_out


def test_techniques_left_out_one_at_a_time():
    timed = result("model", "batch 1", {name: 1.0 for name in ("all", "-a", "-b", "-c")})
    timed["techniques"] = {
        "all": ["a", "b", "c"], "-a": ["b", "c"], "-b": ["a", "c"], "-c": ["a", "b"],
    }  # fmt: skip
    steps, left_out = records.waterfall(timed)
    assert steps == [("-a", "-a"), ("a", "all")]
    assert left_out == [("b", "-b"), ("c", "-c")]
    assert records.waterfall(timed | {"techniques": {}}) == ([], [])


def test_a_set_with_a_technique_more_is_no_leave_one_out():
    """Two techniques that exclude one another: the chain takes the faster, and the other's set,
    which also lacks just one of the chain's, is not 'all without' that one."""
    sets = {"ab": ["a", "b"], "ac": ["a", "c"], "abc": ["a", "b", "c"], "abd": ["a", "b", "d"]}
    times = {"none": 9.0, "ab": 6.0, "ac": 8.0, "abc": 5.0, "abd": 4.0}
    timed = result("model", "batch 1", times) | {"techniques": {"none": [], **sets}}
    steps, left_out = records.waterfall(timed)
    assert steps == [("none", "none"), ("a + b", "ab"), ("d", "abd")]
    assert left_out == []
    slow = result("model", "batch 1", times | {"abd": 7.0}) | {"techniques": timed["techniques"]}
    steps, left_out = records.waterfall(slow)
    assert steps[-1] == ("c", "abc")
    assert left_out == [("b", "ac")]


def test_every_contender_has_a_line_of_its_own():
    ours = [f"fastvit {i}" for i in range(12)]
    peers = [f"timm {i}" for i in range(12)]
    styles = figures._styles([*peers, *ours])
    assert len(set(styles.values())) == 24
    assert {styles[name][0] for name in ours} == set(figures.OUR_COLORS)


def test_a_contender_that_was_not_timed_is_no_step():
    timed = copy.deepcopy(gpu_record()["results"][0])
    timed["contenders"].pop("fastvit")
    steps, _ = records.waterfall(timed)
    assert steps[1] == ("Triton kernels + CUDA graphs", "fastvit + CUDA graphs")


def test_nothing_to_draw_is_not_drawn(tmp_path: Path):
    record = gpu_record()
    one = record | {"results": [result("model", "batch 1", {"fastvit": 1.0}, batch=1)]}
    path = tmp_path / "picture.png"
    for draw in (figures.latency, figures.roofline, figures.waterfall):
        assert draw(one, path) is False
    assert not path.exists()


# --------------------------------------------------------------------------- the README's table

ROOT = Path(__file__).parents[2]
H200 = "benchmarks/results/nvidia-h200_202611_torch2.11.0"


def test_the_record_of_the_h200_is_read():
    (machine,), passed_over = records.read(ROOT / H200)
    assert records.machine(machine) == "NVIDIA H200, torch 2.11.0+cu130"
    assert machine["environment"]["git_commit"] == "75cf362"
    assert {result["case"] for result in machine["results"]} == {"batch 1", "batch 256"}
    assert not passed_over


def test_the_readme_has_the_times_of_the_record():
    readme = (ROOT / "README.md").read_text()
    record = json.loads((ROOT / H200 / "models.json").read_text())
    assert f"({H200}/models.json)" in readme
    one, many = (
        next(r["contenders"] for r in record["results"] if r["batch"] == b) for b in (1, 256)
    )
    lines = [line for line in readme.splitlines() if line.startswith(("| timm", "| fastvit"))]
    gone = "folded norms"  # no longer in the package
    names = {name for name in (*one, *many) if gone not in name} - {models.OWN_MODEL}
    expected = set()
    for name in names:
        rate = f", {many[name]['images_per_s']:,.0f} images/s" if name in many else ""
        cells = [report.seconds(found[name]["median"]) if name in found else "" for found in
                 (one, many)]  # fmt: skip
        expected.add(f"| {name} | {cells[0]} | {cells[1]}{rate} |")
    assert set(lines) == expected


def test_the_readme_has_the_verdicts_of_the_record():
    readme = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / H200 / "numerics.json").read_text())["results"]
    failed = [result for result in results if not result["passed"]]
    assert {result["dtype"] for result in failed} == {"float32"}
    assert f"{len(results) - len(failed)} of the certificate's {len(results)} cases pass" in readme


# --------------------------------------------------------------------------- the floor


@pytest.mark.parametrize(
    ("name", "rtol"),
    [
        ("vit_base_patch16_224", 0),
        ("deit3_small_patch16_224", 0),
        ("vit_so400m_patch14_siglip_gap_224", 0),
        ("vit_base_patch14_reg4_dinov2", 0),
        # timm projects the pooling's one query anew for every image
        ("vit_base_patch16_siglip_224", 1e-4),
    ],
)
def test_the_floor_counts_the_flops_that_pytorch_counts(name: str, rtol: float):
    with torch.device("meta"):
        model = import_timm().create_model(name)
        images = torch.empty(2, 3, *model.patch_embed.img_size)
    with FlopCounterMode(display=False) as counter:
        model(images)
    counted = sum(layer.flops for layer in floor.layers(name, 2))
    assert counted == pytest.approx(counter.get_total_flops(), rel=rtol, abs=0)


def test_the_floor_of_one_layer_by_hand():
    layers = {layer.name: layer for layer in floor.layers("vit_base_patch16_224", 256)}
    rows = 256 * 197
    qkv = layers["attn.qkv"]
    assert qkv.count == 12
    assert qkv.flops == 12 * 2 * rows * 768 * 2304
    assert qkv.bytes == 12 * 2 * (rows * 768 + 768 * 2304 + rows * 2304)
    peak = floor.Peak("", flops=790e12, bandwidth=4.3e12, source="")
    assert qkv.seconds(peak) == qkv.flops / 790e12
    assert qkv.bound(peak) == "compute"
    norm = layers["norm1, norm2"]
    assert norm.seconds(peak) == norm.bytes / 4.3e12
    assert norm.bound(peak) == "memory"


def test_the_floor_is_arithmetic_says_so_and_is_never_drawn(tmp_path: Path):
    options = ("--floor", "--model", "vit_large_patch16_384", "--batch", "8", "--gpu", "mi300x")
    done = run(*options)
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    for words in ("arithmetic, not a measurement", "AMD MI300X", "datasheet", "mlp.fc2"):
        assert words in text
    floors = json.loads(run(*options, "--json").stdout)
    assert floors["floor_s"] == pytest.approx(sum(row["floor_s"] for row in floors["layers"]))
    halved = json.loads(run(*options, "--tflops", "653.7", "--tbytes", "2.65", "--json").stdout)
    assert halved["floor_s"] == pytest.approx(2 * floors["floor_s"])
    as_record = gpu_record(predicted=floors["predicted"])
    machines, _ = records.read(write(tmp_path / "records", a=floors, b=as_record))
    assert not machines


def test_the_floor_refuses_an_unknown_model():
    done = run("--floor", "--model", "vit_base_patch16_225")
    assert done.exit_code == 2
    assert "vit_base_patch16_224" in done.output
