"""The search for tiles: what it tries, what it drops, what it writes. Kernels run in the
interpreter on toy sizes, and the times are made up."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fastvit.bench import tables, tune
from fastvit.bench.tiles import SPACES, Space, candidates, fits, label
from fastvit.bench.timing import Timing
from fastvit.cli.main import app
from fastvit.kernels import _backend, _device, _spec, _tuning, specs
from fastvit.kernels._tuning import Query, TileConfig, lookup

CPU = torch.device("cpu")
SHAPES = {
    "linear": [{"M": m, "N": 768, "K": 3072} for m in (197, 50432)],
    "patch_embed": [{"M": 50432, "N": 768, "K": 588}],
    "attention": [{"N": n, "M": n, "D": d} for n in (50, 197, 1024) for d in (64, 72, 256)],
    "layer_norm": [{"M": 197, "D_POW2": 2**i} for i in range(6, 15)],
}


def query(op: str, arch: str = "sm90", dtype: str = "bfloat16", **shape: int) -> Query:
    return Query(op, arch, dtype, tuple(sorted(shape.items())))


ALL = [
    query(op, arch, dtype, **shape)
    for op, shapes in SHAPES.items()
    for arch, dtype in itertools.product(
        ("sm80", "sm90", "sm100", "gfx942"), ("bfloat16", "float32")
    )
    for shape in shapes
]


# --------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("asked", ALL, ids=str)
def test_there_are_candidates_and_they_fit(asked: Query):
    """From the present tile on, through every step."""
    space, shared = SPACES[asked.op], _device.SHARED_MEMORY[asked.arch]
    dtype = getattr(torch, asked.dtype)
    present = lookup(asked.op, asked.arch, dtype, **dict(asked.shape))
    found = [space.start if fits(asked, space.start, shared) else present]
    seen: set[TileConfig] = set()
    for step in space.steps:
        found = candidates(asked, found, step, shared)
        assert len(set(found)) == len(found)
        seen |= set(found)
        found = found[:3]
    assert seen
    assert len({label(tile) for tile in seen}) == len(seen)
    sizes = dict(asked.shape)
    for tile in seen:
        assert tile.backend != "tma" or asked.arch in ("sm90", "sm100")
        assert tile.backend != "tma" or dtype.itemsize == 2
        if asked.op in ("linear", "patch_embed") and tile.backend != "cublas":
            staged = tile.num_stages * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K
            assert staged * dtype.itemsize <= shared
            assert max(16, 2 * sizes["M"]) >= tile.BLOCK_M


def test_the_sizes_that_facts_speak_for_are_tried():
    asked = query("linear", M=50432, N=768, K=768)
    shared = _device.SHARED_MEMORY["sm90"]
    first = candidates(asked, [SPACES["linear"].start], SPACES["linear"].steps[0], shared)
    names = {label(tile) for tile in first}
    assert {"64x64x64 w4 s3", "128x128x64 w8 s3 tma", "128x256x64 w8 s3 tma", "cublas"} <= names
    assert "256x256x64 w8 s3" not in names  # more sums than registers
    wide = TileConfig(128, 256, 64, 8, 3, "tma")
    assert label(dataclasses.replace(wide, subtiles=2)) in {
        label(tile) for tile in candidates(asked, [wide], SPACES["linear"].steps[2], shared)
    }
    assert not fits(asked, dataclasses.replace(wide, num_stages=5), shared)  # 245,760 bytes


# --------------------------------------------------------------------------- tables


def test_a_measured_size_speaks_for_a_neighbourhood():
    found = [
        (query("linear", M=197, N=768, K=768), TileConfig(16, 16)),
        (query("linear", M=788, N=768, K=768), TileConfig(32, 32)),
        (query("linear", M=197, N=3072, K=768), TileConfig(64, 64)),
        (query("linear", "sm90", "float16", M=197, N=768, K=768), TileConfig(16, 16)),
    ]
    rows = {
        (row["tile"]["BLOCK_M"], *row["dtype"]): row["when"]
        for row in tables.measured_rows(found, {"M": 4.0})
    }
    exact = {"K": [768, 768], "N": [768, 768]}
    assert rows == {
        (16, "bfloat16"): {**exact, "M": [50, 394]},  # half-way to 788
        (32, "bfloat16"): {**exact, "M": [395, 3152]},
        (64, "bfloat16"): {"K": [768, 768], "N": [3072, 3072], "M": [50, 788]},
        (16, "float16"): {**exact, "M": [50, 788]},
    }


def test_one_row_for_dtypes_that_agree():
    found = [
        (query("attention", "sm90", dtype, N=197, M=197, D=64), TileConfig(64, 64))
        for dtype in ("bfloat16", "float16")
    ]
    (row,) = tables.measured_rows(found, {"N": 1.25, "M": 1.25})
    assert row == {
        "dtype": ["bfloat16", "float16"],
        "when": {"D": [64, 64], "M": [158, 246], "N": [158, 246]},
        "tile": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    }


def test_new_rows_come_first_and_hide_old_ones():
    tile = {"BLOCK_M": 16, "BLOCK_N": 16}
    new = [{"dtype": ["float16"], "when": {"M": [50, 400]}, "tile": tile}]
    old = [
        {"dtype": ["bfloat16", "float16"], "when": {"M": [100, 200], "N": [1, 9]}, "tile": tile},
        {"dtype": ["float16"], "when": {"M": [60, 300]}, "tile": tile},
        {"dtype": ["float16"], "when": {"M": [60, 500]}, "tile": tile},
        {"dtype": ["float16"], "tile": tile},
    ]
    assert tables.merged(new, old) == [new[0], {**old[0], "dtype": ["bfloat16"]}, *old[2:]]


def test_the_source_says_where_it_was_measured():
    here = {"gpu": "H", "cpu": "c", "date": "2030-01-02T03:04", "torch": "2.11", "triton": "3.6"}
    first = tables.merged_source(here, "by hand")
    assert first == (
        "measured by fastvit tune on H, 2030-01-02, torch 2.11, triton 3.6; the rest: by hand"
    )
    later = {**here, "date": "2031-01-02T03:04"}
    assert tables.merged_source(later, first) == first.replace("2030", "2031")
    assert tables.merged_source({**here, "gpu": "I"}, first).count("measured") == 2
    assert tables.merged_source(here, None).endswith("triton 3.6")


# --------------------------------------------------------------------------- the search

WRONG, BROKEN, FLAKY = TileConfig(32, 16), TileConfig(16, 32), TileConfig(32, 32)


def faulty(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`op` with tiles that give wrong results, do not run, or fail on other inputs than the
    first."""
    first: list[Tensor] = []

    @functools.wraps(op)
    def call(x: Tensor, **arguments: Any) -> Tensor:
        y = op(x, **arguments)
        first.append(x)
        forced = _tuning._forced.get()
        sizes = (0, 0) if forced is None else (forced[1].BLOCK_M, forced[1].BLOCK_N)
        if sizes == (BROKEN.BLOCK_M, BROKEN.BLOCK_N):
            raise RuntimeError("out of resource: shared memory")
        if sizes == (WRONG.BLOCK_M, WRONG.BLOCK_N):
            return y * 1.1
        if sizes == (FLAKY.BLOCK_M, FLAKY.BLOCK_N) and not torch.equal(x, first[0]):
            return y + 0.1
        return y

    return call


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`linear` at two toy sizes and with four tiles; the cache lies in `tmp_path`."""
    every = specs.all_specs()
    case = every["linear"].cases[0]

    def sized(m: int) -> _spec.Case:
        def make(draw: _spec.Draw) -> dict[str, Any]:
            return {"x": draw(m, 32), "weight": draw(32, 32, std=32**-0.5), "bias": draw(32)}

        return dataclasses.replace(
            case, name=f"{m} rows", sizes={"M": m, "K": 32, "N": 32, "residual": 0}, make=make
        )

    linear = dataclasses.replace(
        every["linear"], op=faulty(every["linear"].op), bench_cases=(sized(5), sized(40))
    )
    monkeypatch.setattr(specs, "all_specs", lambda: {**every, "linear": linear})
    steps = (
        {"BLOCK_M": (16, 32), "BLOCK_N": (16, 32), "num_warps": (1,)},
        {"num_stages": (2, 3)},
    )
    space = Space(TileConfig(16, 16, 32, num_warps=1), steps, {"M": 4.0})
    monkeypatch.setitem(SPACES, "linear", space)
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    _tuning.reload()
    yield
    _tuning.reload()


class Clock:
    """Times by label: those given, else 1 for what is on no list."""

    def __init__(self, **times: float) -> None:
        self.times = {name.replace("_", " "): time for name, time in times.items()}
        self.calls: list[set[str]] = []

    def __call__(self, works: Mapping[str, Callable[[], Any]], **how: Any) -> dict[str, Timing]:
        assert how["cold"]
        assert how["device"] == CPU
        self.calls.append(set(works))
        medians = {name: self.times.get(name, 1.0) for name in works}
        return {name: Timing(time, time, time, how["min_rounds"]) for name, time in medians.items()}


def search(clock: Clock, **options: Any) -> dict[str, Any]:
    return tune.tune(["linear"], **{"device": CPU, "measure": clock, "minutes": 5.0, **options})


BFLOAT16 = {"dtypes": [torch.bfloat16]}


def present(m: int, dtype: torch.dtype = torch.bfloat16) -> TileConfig:
    return lookup("linear", "sm90", dtype, M=m, N=32, K=32)


def test_the_fastest_that_works_is_kept_and_looked_up(toy: None, tmp_path: Path):
    clock = Clock(**{"16x16x32_w1_s3": 0.4, "32x32x32_w1_s2": 0.2, "32x16x32_w1_s2": 0.1})
    out = tmp_path / "record.json"
    record = search(clock, out=out, **BFLOAT16)
    assert [result["case"] for result in record["results"]] == ["40 rows", "5 rows"]
    result = record["results"][0]
    assert result["chosen"] == "16x16x32 w1 s3"
    assert result["gain"] == pytest.approx(1 / 0.4)
    dropped = result["dropped"]
    assert dropped["16x32x32 w1 s2"] == "RuntimeError: out of resource: shared memory"
    assert dropped["32x16x32 w1 s2"].startswith("numerics: output: max ")
    assert dropped["32x32x32 w1 s2"].startswith("on other inputs, numerics: ")
    best = TileConfig(16, 16, 32, num_warps=1, num_stages=3)
    assert present(40) == present(160) == best
    assert present(161) != best
    assert present(40, torch.float16) != best
    path = _tuning.cache_path("linear", "sm90")
    assert record["written"] == [str(path)]
    assert json.loads(path.read_text())["source"].startswith("measured by fastvit tune on ")
    assert json.loads(out.read_text()) == json.loads(json.dumps(record))
    assert list(path.parent.iterdir()) == [path]


def test_the_present_tile_stays_unless_it_is_beaten_by_more_than_noise(toy: None):
    before = present(40)
    clock = Clock(**{label(before).replace(" ", "_"): 1.0, "16x16x32_w1_s2": 0.99})
    result = search(clock, **BFLOAT16)["results"][0]
    assert result["chosen"] == label(before)
    assert result["gain"] == 1
    assert present(40) == before


def test_later_steps_go_on_from_the_fastest(toy: None):
    clock = Clock(**{"32x32x32_w1_s2": 0.5})
    search(clock, **BFLOAT16)
    first, second, final = clock.calls[:3]
    assert "32x32x32 w1 s2" in first
    assert "32x32x32 w1 s3" in second - first
    assert final >= {"32x32x32 w1 s2", "32x32x32 w1 s3"}


def test_the_other_half_dtype_tries_only_what_was_fastest(toy: None):
    clock = Clock(**{"16x16x32_w1_s3": 0.4})
    record = search(clock)
    half = [result for result in record["results"] if result["dtype"] == "float16"]
    assert [result["chosen"] for result in half] == ["16x16x32 w1 s3"] * 2
    assert all(result["measured"] <= tune.BEAM + 1 for result in half)
    assert present(40, torch.float16) == present(40)
    rows = json.loads(_tuning.cache_path("linear", "sm90").read_text())["rows"]
    assert [row["dtype"] for row in rows] == [["bfloat16", "float16"]] * len(rows)


def test_cases_that_ask_for_the_same_are_searched_once(toy: None, monkeypatch: pytest.MonkeyPatch):
    every = specs.all_specs()
    twice = (*every["linear"].bench_cases, every["linear"].bench_cases[0])
    linear = dataclasses.replace(every["linear"], bench_cases=twice)
    monkeypatch.setattr(specs, "all_specs", lambda: {**every, "linear": linear})
    assert len(search(Clock(), **BFLOAT16)["results"]) == 2


def test_a_search_again_replaces_what_it_found(toy: None):
    search(Clock(**{"16x16x32_w1_s3": 0.4}), **BFLOAT16)
    path = _tuning.cache_path("linear", "sm90")
    count = len(json.loads(path.read_text())["rows"])
    search(Clock(**{"16x16x32_w1_s2": 0.3}), **BFLOAT16)
    table = json.loads(path.read_text())
    assert len(table["rows"]) == count
    assert table["source"].count("measured") == 1
    assert present(40).num_stages == 2


def test_write_goes_into_the_package(toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "tables"
    folder.mkdir()
    old = _tuning.table_folder("linear") / "sm90.json"
    (folder / "sm80.json").write_text(old.read_text())  # sm90 has none: it takes sm80's till now
    monkeypatch.setattr(_tuning, "table_folder", lambda op: folder)
    _tuning.reload()
    large = present(50432)
    record = search(Clock(**{"16x16x32_w1_s3": 0.4}), write=True, **BFLOAT16)
    assert record["written"] == [str(folder / "sm90.json")]
    assert not _tuning.cache_path("linear", "sm90").exists()
    assert present(40).num_stages == 3
    assert present(50432) == large
    table = json.loads((folder / "sm90.json").read_text())
    assert table["source"].endswith(f"; the rest: {json.loads(old.read_text())['source']}")
    assert (folder / "sm80.json").read_text() == old.read_text()


def test_what_there_is_no_time_for_is_named(toy: None):
    record = search(Clock(), minutes=0.0, **BFLOAT16)
    assert record["results"] == []
    assert record["left_out"] == ["linear, 40 rows, bfloat16", "linear, 5 rows, bfloat16"]
    assert record["written"] == []


def test_results_so_far_are_kept_when_it_stops(toy: None, tmp_path: Path):
    class Stops(Clock):
        def __call__(self, works: Any, **how: Any) -> dict[str, Timing]:
            if len(self.calls) == 3:  # two steps and the final of the first case
                raise KeyboardInterrupt
            return super().__call__(works, **how)

    with pytest.raises(KeyboardInterrupt):
        search(Stops(**{"16x16x32_w1_s3": 0.4}), out=tmp_path / "out", **BFLOAT16)
    assert present(40).num_stages == 3
    (result,) = json.loads((tmp_path / "out").read_text())["results"]
    assert result["case"] == "40 rows"


def test_a_case_that_fails_is_noted_and_the_next_goes_on(toy: None):
    class Fails(Clock):
        def __call__(self, works: Any, **how: Any) -> dict[str, Timing]:
            times = super().__call__(works, **how)
            if len(self.calls) == 1:
                raise torch.OutOfMemoryError("too little")
            return times

    record = search(Fails(), **BFLOAT16)
    assert record["results"][0]["note"] == "OutOfMemoryError: too little"
    assert record["results"][0]["chosen"] is None
    assert record["results"][1]["chosen"] is not None


def test_the_most_work_comes_first():
    jobs = tune._jobs(tune._tunable(None), tune.HALF)
    names = [f"{spec.name} {case.name}" for spec, case, _ in jobs]
    assert "256" in names[0]
    half = len(jobs) // 2
    assert [dtype for _, _, dtype in jobs] == [torch.bfloat16] * half + [torch.float16] * half
    last = {name.rsplit("batch ", 1)[1] for name in names[half - 8 : half]}
    assert last == {"1"}
    assert "linear ViT-B fc1, batch 256" in names[:6]
    assert not any(name.startswith("mlp") for name in names)  # two linears
    assert "fp8_linear ViT-B fc1, batch 256" in names
    assert not any(name.startswith("fp8_quantize") for name in names)  # its tile is no table's


def test_unknown_ops_and_no_gpu(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"no op 'mlp' has tiles to tune; .*linear"):
        tune.tune(["mlp"], device=CPU)
    monkeypatch.setattr(_backend, "gpu_problem", lambda: "there is no GPU")
    with pytest.raises(RuntimeError, match="fastvit tune needs a GPU: there is no GPU"):
        tune.tune()


# --------------------------------------------------------------------------- the command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", *arguments])


def test_the_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    assert run().exit_code == 2
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(_backend, "gpu_problem", lambda: "no CUDA or ROCm device is available")
    done = run()
    assert done.exit_code == 1
    assert "fastvit tune needs a GPU: no CUDA or ROCm device is available" in done.output


def test_the_command_prints_what_it_found(toy: None, monkeypatch: pytest.MonkeyPatch):
    record = search(Clock(**{"16x16x32_w1_s3": 4e-6}), **BFLOAT16)
    record["left_out"] = ["layer_norm, ViT-B"]
    given: dict[str, Any] = {}

    def tuned(names: list[str], **options: Any) -> dict[str, Any]:
        given.update(options, names=names)
        options["progress"]("linear", 1, 2)
        return record

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(_backend, "gpu_problem", lambda: None)
    monkeypatch.setattr(tune, "tune", tuned)
    done = run("--op", "linear", "--dtype", "float16", "--minutes", "3", "--write")
    assert done.exit_code == 0, done.output
    assert given["names"] == ["linear"]
    assert given["dtypes"] == [torch.float16]
    assert given["minutes"] == 3
    assert given["write"]
    for text in ("linear, 40 rows", "16x16x32 w1 s3", "4.0", "250000.00x", "no time for 1 more",
                 f"wrote {record['written'][0]}"):  # fmt: skip
        assert text in done.output
    assert json.loads(run("--json").stdout) == json.loads(json.dumps(record))
    monkeypatch.undo()


def test_unknown_ops_on_the_command_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(_backend, "gpu_problem", lambda: None)
    done = run("--op", "mlp")
    assert done.exit_code == 2
    assert "no op 'mlp' has tiles to tune" in done.output
