"""Timing with a clock that the test holds, and a whole small run whose files are read back."""

import base64
import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from typer.testing import CliRunner

from fastvit import VisionTransformer, numerics
from fastvit.bench import models, ops, report, timing
from fastvit.cli.main import app
from fastvit.kernels import _spec, specs

CPU = torch.device("cpu")


class Clock:
    """Stands still but for what the timed functions take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def takes(self, *seconds: float, calls: list[str] | None = None, name: str = "") -> timing.Work:
        """A function whose calls take these times in turn, the last one for ever."""
        left = list(seconds)

        def work() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            if calls is not None:
                calls.append(name)

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_every_round_calls_each_function_once_in_a_new_order(clock: Clock):
    calls: list[str] = []
    works = {name: clock.takes(1, calls=calls, name=name) for name in "abc"}
    times = timing.interleaved(works, budget_s=0, min_rounds=40, device=CPU)
    assert all(time.rounds == 40 for time in times.values())
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 41  # the first warms up
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds[1:])) == 6  # all orders come up, so no function always follows another


def test_medians_and_percentiles_leave_the_warm_up_out(clock: Clock):
    slow_start = clock.takes(100, 3, 1, 2, 5, 4)
    times = timing.interleaved(
        {"a": slow_start, "b": clock.takes(7)}, budget_s=0, min_rounds=5, device=CPU
    )
    a = times["a"]
    assert (a.median, a.p10, a.p90, a.rounds) == (3, pytest.approx(1.4), pytest.approx(4.6), 5)
    assert times["b"] == timing.Timing(median=7, p10=7, p90=7, rounds=5)


def test_rounds_go_on_for_as_long_as_the_budget(clock: Clock):
    works = {"a": clock.takes(1), "b": clock.takes(3)}
    assert timing.interleaved(works, budget_s=39, min_rounds=2, device=CPU)["a"].rounds == 10
    assert timing.interleaved(works, budget_s=0.5, min_rounds=2, device=CPU)["a"].rounds == 2


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="nothing to time"):
        timing.interleaved({}, budget_s=1, min_rounds=1, device=CPU)


def test_inputs_rotate_and_no_two_functions_are_given_the_same_one_in_a_round():
    inputs = [{"x": i} for i in range(3)]
    works = timing.rotating(dict.fromkeys("abcd", lambda x: x), inputs)
    rounds = [[works[name]() for name in "abcd"] for _ in range(4)]
    assert rounds == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2], [0, 1, 2, 0]]


def test_a_race_compares_with_the_fastest_peer(clock: Clock):
    works = {
        timing.OURS: clock.takes(50, 2),
        "slow": clock.takes(9),
        "fast": clock.takes(3),
    }
    result = timing.race(works, budget_s=0, min_rounds=3, device=CPU)
    assert result.fastest_peer == "fast"
    assert result.speedup == 1.5
    assert result.first_call == {timing.OURS: 50, "slow": 9, "fast": 3}


def test_a_contender_that_does_not_run_is_named_and_not_timed(clock: Clock):
    def broken() -> None:
        raise OSError("no such\ncompiler")

    result = timing.race(
        {timing.OURS: clock.takes(1), "compiled": broken}, budget_s=0, min_rounds=1, device=CPU
    )
    assert result.failed == {"compiled": "OSError: no such compiler"}
    assert list(result.timings) == [timing.OURS]
    assert result.speedup is None


def test_torch_compile_without_a_compiler_is_such_a_contender():
    factor = random.random()  # machine code that no earlier test left behind

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * factor

    torch._dynamo.reset()
    compiled = torch.compile(scaled, dynamic=False)
    x = torch.randn(64)
    # caches would hand out what an earlier run compiled
    off = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with inductor_config.patch(off):
        result = timing.race(
            {"eager": lambda: scaled(x), "compiled": lambda: compiled(x)},
            budget_s=0, min_rounds=1, device=CPU,
        )  # fmt: skip
    assert list(result.timings) == ["eager"]
    assert "compiled" in result.failed


def test_the_roof_is_flops_and_bytes_over_time(monkeypatch: pytest.MonkeyPatch):
    def half_a_second(works: dict[str, timing.Work], **kwargs: Any) -> dict[str, timing.Timing]:
        return {name: timing.Timing(0.5, 0.5, 0.5, 1) for name in works}

    monkeypatch.setattr(timing, "interleaved", half_a_second)
    roof = timing.roof(CPU, torch.float32)
    assert roof["matmul_flops_per_s"] == 4 * 1024**3
    assert roof["copy_bytes_per_s"] == 4 * 2**27


def test_a_gpu_is_timed_by_events_around_the_call_alone(monkeypatch: pytest.MonkeyPatch):
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("wait for end")

        def elapsed_time(self, end: object) -> float:
            return 2.5  # milliseconds

    class Scratch:
        def zero_(self) -> None:
            happened.append("clear cache")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("wait"))
    scratch: Any = Scratch()
    work = lambda: happened.append("work")  # noqa: E731
    assert timing._seconds(work, torch.device("cuda"), scratch) == 2.5e-3
    assert happened == ["wait", "clear cache", "record", "work", "record", "wait for end"]


# --------------------------------------------------------------------------- what is timed


def small_spec(**changes: Any) -> _spec.OpSpec:
    """layer_norm, whose benchmark is one of its test cases."""
    spec = specs.all_specs()["layer_norm"]
    case = next(case for case in spec.cases if case.name == "odd width")
    return dataclasses.replace(spec, bench_cases=(case,), **changes)


def bench_small(spec: _spec.OpSpec) -> report.Result:
    return ops.bench_op(
        spec, spec.bench_cases[0], dtype=torch.float32, device=CPU, seed=0, budget_s=0.01
    )


def test_an_op_whose_numerics_fail_is_not_timed():
    def no_bias(x: torch.Tensor, weight: Any, bias: Any, eps: float) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, None, eps)

    result = bench_small(small_spec(op=no_bias))
    assert not result.numerics["passed"]
    assert result.race.timings == {}
    entry = report.as_json(result, {"matmul_flops_per_s": 1.0, "copy_bytes_per_s": 1.0})
    assert report.remarks(entry) == ["not timed: numerics fail, see fastvit numerics"]


def test_an_op_that_raises_is_not_timed():
    def broken(**kwargs: Any) -> torch.Tensor:
        raise MemoryError("too large")

    result = bench_small(small_spec(op=broken))
    assert result.numerics["error"] == "MemoryError: too large"
    assert result.race.timings == {}


def test_a_cpu_leaves_large_cases_out_and_says_so():
    jobs, note = ops.plan(CPU, quick=False)
    assert note is not None
    assert "too large for a CPU" in note
    assert all("batch 256" not in case.name for _, case in jobs)
    quick, _ = ops.plan(CPU, quick=True)
    assert [spec.name for spec, _ in quick] == list(specs.all_specs())
    gpu, note = ops.plan(torch.device("cuda"), quick=False)
    assert len(gpu) > len(jobs)
    assert note is None


def test_a_training_step_changes_weights_and_each_peer_has_its_own():
    model = models._timm_model("test_vit", seed=0)
    step = models._job(model, batch=2, device=CPU, train=True, autocast=None)
    before = model.blocks[0].attn.qkv.weight.clone()
    step(torch.randn(2, 3, 160, 160))
    assert not torch.equal(before, model.blocks[0].attn.qkv.weight)
    contenders = dict(models._peers(model, CPU, batch=2, train=True, level="few"))
    assert list(contenders) == ["timm", "timm + torch.compile"]
    own = contenders["timm + torch.compile"]().get_parameter("_orig_mod.norm.weight")
    assert own is not model.norm.weight


def test_a_form_of_ours_whose_numerics_fail_is_not_timed():
    linear = torch.nn.Linear(1, 1)
    good = {"passed": True, "ratio": 1.0, "error": None}
    assert models._passed(lambda: linear, lambda form: good) is linear
    with pytest.raises(ValueError, match="numerics fail, ratio 9"):
        models._passed(lambda: linear, lambda form: {**good, "passed": False, "ratio": 9.0})


def test_our_own_model_is_timed_beside_the_accelerated_one(monkeypatch: pytest.MonkeyPatch):
    """A tiny variant stands for one of the listed names; its weights are timm's."""
    monkeypatch.setattr(models, "list_models", lambda: ["test_vit"])
    sizes = {"img_size": 160, "embed_dim": 64, "depth": 6, "num_heads": 2, "mlp_ratio": 3}
    monkeypatch.setattr(
        models, "create_model", lambda name, **options: VisionTransformer(**sizes, **options)
    )
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    result = models.bench_model(
        "model", "test_vit", 1, dtype=torch.float32, device=CPU, seed=0, level="all", budget_s=0.0
    )
    assert not result.race.failed
    assert list(result.race.timings) == [
        "fastvit", "fastvit create_model", "timm", "timm + torch.compile",
        "transformers", "transformers + torch.compile", "torchvision",
    ]  # fmt: skip
    assert result.techniques == {"timm": [], "fastvit": ["Triton kernels"]}
    assert not timing.is_ours(result.race.fastest_peer or "")


def test_convolutions_are_exact_where_errors_and_speeds_are_taken(monkeypatch: pytest.MonkeyPatch):
    taken = []

    def look(x: torch.Tensor, **rest: Any) -> torch.Tensor:
        taken.append(torch.backends.cudnn.allow_tf32)
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        inputs = {"x": torch.randn(2, 8)}
        numerics.compare(look, look, inputs)
        bench_small(small_spec(op=look, reference=look))
        assert torch.backends.cudnn.allow_tf32
    assert len(taken) > 10
    assert not any(taken)


def test_cublas_alone_is_shown_beside_linear_and_no_peer_where_linear_does_more():
    spec = specs.all_specs()["linear"]
    cases = {case.name: case for case in spec.cases}
    for name, bounds in (
        ("one row", ()),
        ("odd sizes, gelu", (ops.CUBLAS, ops.CUBLASLT, ops.SCALED)),
    ):
        inputs = spec.inputs(cases[name], torch.float32)
        jobs, missing = ops._contenders(spec, spec.op, inputs, CPU)
        assert list(jobs) == ["fastvit", "eager", "torch.compile", ops.CUBLAS]
        assert not missing
        assert ops._bounds(inputs) == bounds
        expected = torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"])
        torch.testing.assert_close(jobs[ops.CUBLAS](**inputs), expected)


def test_what_does_less_than_the_job_is_timed_but_no_peer(clock: Clock):
    works = {timing.OURS: clock.takes(2), "whole": clock.takes(3), "half": clock.takes(1)}
    result = timing.race(works, budget_s=0, min_rounds=3, device=CPU, bounds=["half", "absent"])
    assert result.bounds == ("half",)
    assert result.fastest_peer == "whole"
    assert result.speedup == 1.5
    assert result.timings["half"].median == 1


def test_our_other_forms_are_no_peers_either(clock: Clock):
    works = {timing.OURS: clock.takes(2), "fastvit + x": clock.takes(1), "peer": clock.takes(3)}
    assert timing.race(works, budget_s=0, min_rounds=3, device=CPU).fastest_peer == "peer"


@pytest.mark.parametrize("op", ["attention", "attention_qkv", "layer_norm", "rms_norm"])
def test_libraries_that_are_not_installed_are_named(op: str):
    spec = specs.all_specs()[op]
    inputs = spec.inputs(spec.cases[0], torch.float32)
    jobs, missing = ops._contenders(spec, spec.op, inputs, torch.device("cuda"))
    libraries = {
        "attention": ["flash-attn", "xFormers"], "attention_qkv": ["flash-attn"],
        "layer_norm": ["Liger"], "rms_norm": ["Liger"],
    }  # fmt: skip
    assert list(missing) == libraries[op]
    assert all("No module named" in reason for reason in missing.values())
    assert ("SDPA flash" in jobs) == op.startswith("attention")


def test_no_kernel_is_expected_to_beat_an_empty_launch():
    result = report.Result("op", "x", "y", "float32", timing.Race(), {}, flops=10, bytes=10)
    roof = {"matmul_flops_per_s": 10.0, "copy_bytes_per_s": 5.0}
    assert report.roof_seconds(result, roof) == 2.0
    assert report.roof_seconds(result, roof | {"launch_s": 3.0}) == 3.0


def test_inference_needs_no_gradients():
    model = models._timm_model("test_vit", seed=0).eval()
    job = models._job(model, batch=2, device=CPU, train=False, autocast=None)
    logits = job(torch.randn(2, 3, 160, 160))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 1000)
    assert logits.is_inference()


# --------------------------------------------------------------------------- the command


@pytest.fixture
def one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec()
    monkeypatch.setattr(ops, "all_specs", lambda: {spec.name: spec})
    # compiling takes most of a minute; that it can fail is tested above
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for budget in ("OP_BUDGET", "MODEL_BUDGET"):
        monkeypatch.setattr(f"fastvit.cli.bench.{budget}", (0.05, 0.05))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.usefixtures("one_op")
def test_bench_writes_record_picture_and_page(tmp_path: Path):
    done = run("--quick", "--model", "test_vit", "--batch", "2", "--seed", "7", "--json",
               "--out", str(tmp_path))  # fmt: skip
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["seed"] == 7
    assert record["device"] == "cpu"
    assert record["notes"] == [report.CPU_NOTE]
    assert record["environment"]["torch"] == torch.__version__
    assert record["roof"]["matmul_flops_per_s"] > 0
    assert [(result["kind"], result["name"]) for result in record["results"]] == [
        ("op", "layer_norm"),
        ("model", "test_vit"),
    ]
    op, model = record["results"]
    assert list(op["contenders"]) == ["fastvit", "eager", "torch.compile"]
    assert list(model["contenders"]) == ["fastvit", "timm", "timm + torch.compile"]
    for result in record["results"]:
        assert result["numerics"]["passed"]
        best = min(
            time["median"] for name, time in result["contenders"].items() if name != "fastvit"
        )
        assert result["speedup"] == pytest.approx(best / result["contenders"]["fastvit"]["median"])
        for time in result["contenders"].values():
            assert 0 < time["p10"] <= time["median"] <= time["p90"]
            assert time["rounds"] >= 5
    assert model["batch"] == 2
    # two images of 101 tokens through test_vit's products of matrices
    assert model["flops"] == models._flops("test_vit", 1, train=False) * 2

    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(files) == {".json", ".png", ".html"}
    assert re.match(r"op\+model_cpu_float32_torch[\d.]+_\d{8}T\d{6}\.json", files[".json"].name)
    assert json.loads(files[".json"].read_text()) == record
    picture = files[".png"].read_bytes()
    assert picture.startswith(b"\x89PNG")
    page = files[".html"].read_text()
    assert base64.b64encode(picture).decode() in page
    for text in ("test_vit", "timm + torch.compile", report.CPU_NOTE, torch.__version__):
        assert text in page
    assert "http" not in page  # self-contained


@pytest.mark.usefixtures("one_op")
def test_bench_prints_a_table(tmp_path: Path):
    done = run("ops", "--quick", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    for text in ("layer_norm, odd width", "torch.compile", "roof: ", report.CPU_NOTE[:40]):
        assert text in done.stdout
    assert str(tmp_path) in done.stdout


def test_bench_exits_1_where_numerics_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    spec = small_spec(op=lambda x, **rest: x)
    monkeypatch.setattr(ops, "all_specs", lambda: {spec.name: spec})
    done = run("ops", "--quick", "--out", str(tmp_path))
    assert done.exit_code == 1
    assert "not timed: numerics fail" in done.stdout
    assert not list(tmp_path.glob("*.png"))  # nothing to draw


@pytest.mark.usefixtures("one_op")
def test_bench_trains(tmp_path: Path):
    done = run("train", "--quick", "--model", "test_vit", "--json", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    (result,) = json.loads(done.stdout)["results"]
    assert result["kind"] == "train"
    assert result["flops"] > 2 * models._flops("test_vit", 1, train=False)


def test_bench_refuses_an_unknown_model(tmp_path: Path):
    done = run("models", "--model", "vit_tiny_patch16_225", "--out", str(tmp_path))
    assert done.exit_code == 2
    assert "vit_tiny_patch16_224" in done.output


def test_times_are_printed_in_readable_units():
    printed = [report.seconds(value) for value in (2.0, 0.0123, 45.6e-6, 0.4567)]
    assert printed == ["2 s", "12.3 ms", "45.6 us", "457 ms"]
