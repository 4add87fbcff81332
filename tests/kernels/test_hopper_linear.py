"""Hopper's linear kernel without a GPU: its source on a model of a multiprocessor; who is given it;
what a launch hands to the driver; what runs where it cannot. `test_ledger.py` compiles it."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import fresh
import gluon_sim as sim
import numpy as np
import pytest
import seeds
import torch

from fastvit import ops
from fastvit.bench.tiles import SPACES, candidates
from fastvit.check.launches import recorded
from fastvit.kernels import _backend, _device, _hopper, _launch, _tuning
from fastvit.kernels._backend import packed
from fastvit.kernels._launch import Prepared
from fastvit.kernels._tuning import TileConfig
from fastvit.kernels.linear import hopper_plan
from fastvit.kernels.linear.hopper_plan import GROUP_M, Variant, hopper_choice, hopper_variant
from fastvit.kernels.linear.launch import exact_activation, looked_up, prepare
from fastvit.kernels.linear.reference import finish_reference
from fastvit.kernels.linear_fp8.op import fp8_linear
from fastvit.kernels.linear_fp8.reference import fp8_linear_reference
from fastvit.numerics import measure

ROOT = Path(__file__).parents[2] / "kernels"
FILES = (
    ROOT / "_activations.py", ROOT / "_hopper_e4m3.py", ROOT / "linear" / "hopper_parts.py",
    ROOT / "linear" / "hopper.py",
)  # fmt: skip
E4M3 = torch.float8_e4m3fn
INVERSE = 2.0  # of an e4m3 y's scale
SMALLER = 8  # tiles of the simulation: protocols do not depend on their size
TILES = [*(("pingpong", *tile) for tile in hopper_plan.PINGPONG_TILES), ("coop", 128, 256)]


class Form(NamedTuple):
    """An epilogue."""

    activation: str = "none"
    bias: bool = True
    scale: bool = False
    row_scale: bool = False
    residual: bool = False
    keep: bool = False
    factor: bool = False  # operands are e4m3
    e4m3: bool = False  # and y

    @property
    def bytes_of_k(self) -> int:
        """Of one value of an operand."""
        return 1 if self.factor else 2


FORMS = {
    "bias": Form(),
    "bare": Form(bias=False),
    "activation": Form("relu"),
    "scale, row scale": Form(scale=True, row_scale=True),
    "residual": Form(residual=True),
    "all of inference": Form("relu", scale=True, row_scale=True, residual=True),
    "kept": Form("relu", keep=True, scale=True, row_scale=True),
    "e4m3": Form(factor=True),
    "e4m3, residual": Form(factor=True, scale=True, residual=True),
    "e4m3 to e4m3": Form("relu", factor=True, e4m3=True),
}


def variant(tile: tuple[str, int, int], form: Form) -> Variant:
    options = {"residual": form.residual, "keep": form.keep, "e4m3": form.e4m3}
    return hopper_plan.variant_of(*tile, **options)


def launch(
    space: dict[str, Any],
    v: Variant,
    form: Form,
    tensors: dict[str, np.ndarray | None],
    dtype: Any,
    *,
    programs: int,
    seed: int,
    smaller: int = SMALLER,
    group: int = 2,
    inverse: float = INVERSE,
) -> tuple[np.ndarray, np.ndarray | None]:
    """y and pre of one launch, every element of which has to be written exactly once."""
    x, weight = tensors["x"], tensors["weight"]
    assert x is not None
    assert weight is not None
    (m, k), n = x.shape, len(weight)
    band = v.rows // smaller, v.cols // smaller
    block_k = hopper_plan.STEP // form.bytes_of_k // smaller
    operand = E4M3 if form.factor else dtype
    dtype = E4M3 if form.e4m3 else dtype
    out = [sim.Descriptor(np.full((m, n), np.nan), band, dtype) for _ in range(1 + form.keep)]
    residual = tensors["residual"]
    vectors = [tensors.get(name) for name in ("factor", "bias", "scale", "row_scale")]
    args = (
        sim.Descriptor(x, (v.rows // smaller, block_k), operand),
        sim.Descriptor(weight, (v.block_n // smaller, block_k), operand),
        out[0],
        None if residual is None else sim.Descriptor(residual, band, dtype),
        out[1] if form.keep else None,
        *(None if vector is None else sim.Pointer(vector) for vector in vectors),
        inverse if form.e4m3 else None, m, n, k, form.activation, v.name == "pingpong",
        form.factor and n % (v.block_n // smaller) == 0, group, v.stages, v.bufs, v.lag, 0, 0,
    )  # fmt: skip
    tiles = -(-m * smaller // v.block_m) * -(-n * smaller // v.block_n)
    sim.run(space["hopper_linear_kernel"], args, warps=4, programs=min(programs, tiles), seed=seed)
    for descriptor in out:
        if not (descriptor.writes == 1).all():
            raise sim.Wrong("an element not written exactly once")
    return out[0].array, out[1].array if form.keep else None


def simulate(
    space: dict[str, Any], tile: tuple[str, int, int], form: Form, m: int, n: int, k: int,
    programs: int, seed: int, smaller: int = SMALLER,
) -> None:  # fmt: skip
    """One launch of small integers; raises where anything is wrong."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (m, k), "weight": (n, k), "factor": (n,), "bias": (n,), "scale": (n,),
        "row_scale": (m,), "residual": (m, n),
    }  # fmt: skip
    there = {"x", "weight"} | {name for name in shapes if getattr(form, name, False)}
    tensors: dict[str, Any] = {
        name: rng.integers(-3, 4, shape).astype(float) if name in there else None
        for name, shape in shapes.items()
    }
    pre = tensors["x"] @ tensors["weight"].T
    if form.factor:
        pre = pre * tensors["factor"]
    if form.bias:
        pre = pre + tensors["bias"]
    want = np.maximum(pre, 0) if form.activation == "relu" else pre
    if form.scale:
        want = want * tensors["scale"]
    if form.row_scale:
        want = want * tensors["row_scale"][:, None]
    if form.residual:
        want = want + tensors["residual"]
    if form.e4m3:
        want = want * INVERSE
    y, kept = launch(
        space, variant(tile, form), form, tensors, torch.bfloat16, programs=programs, seed=seed,
        smaller=smaller,
    )  # fmt: skip
    if not np.array_equal(y, want) or (kept is not None and not np.array_equal(kept, pre)):
        raise sim.Wrong("wrong result")


def shapes_of(tile: tuple[str, int, int], form: Form, seed: int) -> list[tuple[int, ...]]:
    """M, N, K and blocks, of tiles an eighth as large: one row, one tile, tails of all three, an
    odd and a large count of tiles, fewer steps than slots and many more."""
    v = variant(tile, form)
    bm, bn = v.block_m // SMALLER, v.block_n // SMALLER
    bk = hopper_plan.STEP // form.bytes_of_k // SMALLER
    short = (v.stages + 1) * bk if v.lag else bk  # fewest steps that `hopper_choice` gives it
    draw = random.Random(seed)
    return [
        (1, 1, max(short, 3 * bk), 1),
        (bm, bn, short, 4),
        (2 * bm + 1, bn - 3, short + 5, 1),
        (5 * bm - 1, 2 * bn + 1, short + 2 * bk + 1, 3),
        (bm * draw.randint(5, 9), bn + draw.randint(1, bn), short + draw.randint(0, 99), 2),
    ]


@pytest.fixture(scope="module")
def space() -> dict[str, Any]:
    return sim.load(*FILES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_protocol_holds(space, tile, form):
    for seed, shape in enumerate(shapes_of(tile, FORMS[form], 0)):
        simulate(space, tile, FORMS[form], *shape, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_protocol_holds_at_length(space, tile, form):
    for seed in range(3, 27):
        for shape in shapes_of(tile, FORMS[form], seed):
            simulate(space, tile, FORMS[form], *shape, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_protocol_holds_with_real_tiles(space, tile):
    for name in ("bias", "all of inference", "kept"):
        simulate(space, tile, FORMS[name], 391, 520, 456, 3, seed=5, smaller=1)


COOP, PINGPONG = TILES[3], TILES[0]
FAULTS = {
    "slot given back while its product runs": (
        COOP, "bias",
        "    acc = warpgroup_mma_wait(1, deps=(acc,))\n    mbarrier.arrive(empty",
        "    acc = warpgroup_mma_wait(2, deps=(acc,))\n    mbarrier.arrive(empty",
    ),
    "slots given back by one consumer only": (
        COOP, "bias", "mbarrier.init(empty.index(i), count=SHARE)",
        "mbarrier.init(empty.index(i), count=1)",
    ),
    "slot filled before it is free": (
        PINGPONG, "bias", "            mbarrier.wait(empty.index(stage), phase ^ 1)\n", "",
    ),
    "slot read before it has landed": (
        PINGPONG, "bias",
        "    mbarrier.wait(full.index(stage), phase)\n    acc = warpgroup_mma(\n        x_bufs",
        "    acc = warpgroup_mma(\n        x_bufs",
    ),
    "wrong parity": (
        PINGPONG, "bias", "mbarrier.wait(empty.index(stage), phase ^ 1)",
        "mbarrier.wait(empty.index(stage), phase)",
    ),
    "consumers not in turns": (
        PINGPONG, "bias", "    if PINGPONG:\n        if CONSUMER",
        "    if False:\n        if CONSUMER",
    ),
    "turn given too early": (
        PINGPONG, "bias",
        "    if PINGPONG:\n        mbarrier.arrive(lead.index(CONSUMER))\n", "",
    ),
    "lead never given": (COOP, "bias", "mbarrier.arrive(lead.index(CONSUMER))", "pass"),
    "buffer of y reused too early": (
        COOP, "bias", "tma.store_wait(BUFS - 1)", "tma.store_wait(BUFS)",
    ),
    "buffer of pre reused too early": (
        PINGPONG, "kept", "                tma.store_wait(1)  # not the last band's y\n", "",
    ),
    "buffer given to the residual too early": (
        COOP, "residual", "                tma.store_wait(1)\n                mbarrier",
        "                mbarrier",
    ),
    "last buffer given back too early": (
        PINGPONG, "residual", "        tma.store_wait(0)\n        mbarrier", "        mbarrier",
    ),
    "residual of the wrong turn": (
        PINGPONG, "residual", "(turn * USES + chunk // BUFS) & 1", "(turn * 2 + chunk) & 1",
    ),
    "residual not waited for": (
        COOP, "residual",
        "                mbarrier.wait(residual_full.index(which), "
        "(turn * USES + chunk // BUFS) & 1)\n", "",
    ),
    "no fence before y's store": (
        COOP, "bias", "fence_async_shared()\n            tma.async_copy_shared_to_global(y",
        "tma.async_copy_shared_to_global(y",
    ),
    "no fence before pre's store": (
        PINGPONG, "kept", "                fence_async_shared()\n", "",
    ),
    "too many bytes expected": (
        COOP, "bias", "(BOXES * ROWS + BLOCK_N) * BLOCK_K * WIDTH",
        "(BOXES * ROWS + BLOCK_N) * BLOCK_K * WIDTH + 16",
    ),
    "the other consumer's rows": (
        COOP, "bias", "row = (tile_m * SHARE + OFFSET) * ROWS\n        bands",
        "row = tile_m * SHARE * ROWS\n        bands",
    ),
    "bias past its end": (PINGPONG, "bias", "mask=cols < N, other", "mask=cols < N + 8, other"),
    "factors past their end": (PINGPONG, "e4m3", "    if EVEN:", "    if True:"),
    "factors of the tile before": (
        PINGPONG, "e4m3", "_of_columns(factor, tile_n * BLOCK_N", "_of_columns(factor, 0 * BLOCK_N",
    ),
    "bytes of half operands": (PINGPONG, "e4m3", "BLOCK_K * WIDTH", "BLOCK_K * 2"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    tile, form, old, new = FAULTS[fault]
    broken = sim.load(*FILES, edits=[(old, new)])

    def try_orders() -> None:
        for seed in range(12):
            simulate(broken, tile, FORMS[form], 83, 73, 100, 2, seed)

    with pytest.raises(sim.Wrong):
        try_orders()


ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numerics(space, activation, dtype):
    """Within the certificate's policy, with real tiles: values, sums and stores rounded as the
    kernel asks."""
    torch.manual_seed(seeds.draw())
    m, n, k = 130, 136, 328
    given = {
        "x": torch.randn(m, k), "weight": torch.randn(n, k) * k**-0.5, "bias": torch.randn(n),
        "scale": torch.randn(n), "row_scale": torch.randn(m), "residual": torch.randn(m, n),
    }  # fmt: skip
    for keep in (False, True):
        form = Form(
            exact_activation(activation, dtype), scale=True, row_scale=True, residual=not keep,
            keep=keep,
        )  # fmt: skip
        tensors = {name: t.to(dtype) for name, t in given.items()}
        if keep:
            del tensors["residual"]
        truth, eager = (
            through_torch(activation, {name: t.to(kind) for name, t in tensors.items()})
            for kind in (torch.float64, dtype)
        )
        arrays: dict[str, Any] = {name: t.float().numpy() for name, t in tensors.items()}
        with sim.rounded():
            ours = launch(
                space, variant(PINGPONG, form), form, {"residual": None, **arrays}, dtype,
                programs=1, seed=0, smaller=1, group=GROUP_M,
            )  # fmt: skip
        for name, got, true, theirs in zip(("y", "pre"), ours, truth, eager, strict=True):
            if got is not None:
                row = measure(name, torch.from_numpy(got).to(dtype), true, theirs)
                assert row.passed, row


OUT_SCALE = 0.013  # of an e4m3 y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, E4M3], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
def test_numerics_of_e4m3_operands(space, activation, dtype):
    """As `test_numerics`, beside `fp8_linear_reference`; what is not stored in e4m3 is added to a
    residual."""
    torch.manual_seed(seeds.draw())
    m, n, k = 130, 144, 336
    narrow = dtype == E4M3
    out_scale = OUT_SCALE if narrow else None
    exact = exact_activation(activation, dtype)
    name = hopper_plan.e4m3_activation(exact, None, 1 / OUT_SCALE if narrow else None)
    form = Form(name, scale=not narrow, residual=not narrow, factor=True, e4m3=narrow)
    given: dict[str, torch.Tensor] = {
        "x": (torch.randn(m, k) * 20).to(E4M3), "weight": (torch.randn(n, k) * 40).to(E4M3),
        "factor": (torch.rand(n) + 0.5) * (k**-0.5 / 800), "bias": torch.randn(n).bfloat16(),
    }  # fmt: skip
    if not narrow:
        given |= {"scale": torch.randn(n).to(dtype), "residual": torch.randn(m, n).to(dtype)}
    options: dict[str, Any] = {"activation": activation, "out_scale": out_scale}
    truth = fp8_linear_reference(**{x: t.double() for x, t in given.items()}, **options)
    eager = fp8_linear_reference(**given, dtype=torch.bfloat16 if narrow else dtype, **options)
    arrays: dict[str, Any] = {name: t.float().numpy() for name, t in given.items()}
    with sim.rounded():
        y, _ = launch(
            space, variant(PINGPONG, form), form, {"residual": None, **arrays}, dtype,
            programs=1, seed=0, smaller=1, group=GROUP_M, inverse=1 / OUT_SCALE,
        )  # fmt: skip
    row = measure("y", torch.from_numpy(y).to(dtype), truth, eager)
    assert row.passed, row


def through_torch(activation: str, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """y and pre."""
    pre = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
    rest = (tensors["scale"], tensors.get("residual"), tensors["row_scale"])
    return finish_reference(pre, activation, *rest), pre


# --------------------------------------------------------------------------- choice

CPU = torch.device("cpu")


def metas(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, *, residual: bool = False):
    """x, weight and residual."""
    shapes = ((m, k), (n, k), (m, n))
    x, weight, added = (packed(dtype, shape, CPU) for shape in shapes)
    return x, weight, added if residual else None


def choose(m: int, n: int, k: int, *, residual: bool = False) -> tuple[str, int, int] | str:
    found = hopper_choice(*metas(m, n, k, residual=residual), None, torch.bfloat16)
    return found[:3] if isinstance(found, Variant) else found


def test_the_fastest_of_the_h200_is_chosen():
    """For ViT-B/16 at batch 256, of what `proven/sm90.json` has times of."""
    proven = json.loads((ROOT / "linear" / "proven" / "sm90.json").read_text())["entries"]
    for n, k, residual in (
        (2304, 768, False), (768, 768, True), (3072, 768, False), (768, 3072, True),
    ):  # fmt: skip
        times = {
            (entry["configuration"]["variant"], *entry["configuration"]["tile"][:2]): time["us"]
            for entry in proven
            for time in entry["proof"]["times"]
            if (time["N"], time["K"]) == (n, k)
        }
        assert len(times) >= 2
        assert choose(50432, n, k, residual=residual) == min(times, key=lambda v: times[v])


def test_few_rows_get_small_tiles():
    assert choose(197, 768, 768) == ("pingpong", 64, 64)
    assert choose(1000, 768, 768) == ("pingpong", 64, 128)
    assert choose(1576, 768, 768) == ("pingpong", 128, 128)
    assert choose(1, 8, 8) == ("pingpong", 64, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_size_of_16_byte_rows_is_taken(dtype):
    for m in (1, 7, 197, 1000, 50432):
        for n, k in ((192, 192), (4304, 1152), (1152, 4304), (1408, 6144), (1000, 1280), (8, 8)):
            for residual in (False, True):
                found = hopper_choice(*metas(m, n, k, dtype, residual=residual), None, dtype)
                assert isinstance(found, Variant)
                assert found.stages >= 3
                assert not found.lag or -(-k * 2 // hopper_plan.STEP) > found.stages


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, E4M3], ids=str)
def test_e4m3_operands_are_taken(dtype):
    """Of every size whose rows fill 16 bytes; of many rows as the table says."""
    for m, n, k in ((197, 192, 192), (1000, 4304, 1152), (50432, 3072, 768), (7, 16, 16)):
        x, weight, _ = metas(m, n, k, E4M3)
        found = hopper_choice(x, weight, None, None, dtype)
        assert isinstance(found, Variant)
        assert found.stages >= 3
    with _device.emulate("sm90"), recorded() as launches:
        x, weight = (torch.empty(s, dtype=E4M3) for s in ((2048, 768), (3072, 768)))
        out_scale = 0.01 if dtype == E4M3 else None
        options: dict[str, Any] = {"activation": "gelu", "out_scale": out_scale}
        y = fp8_linear(x, weight, torch.ones(3072), dtype=torch.bfloat16, **options)
    ((launch, arguments),) = launches
    assert launch.tile.backend == "pingpong"
    assert ("gelu_e4m3" in arguments) == (y.dtype == E4M3)


def test_gelu_in_float16_is_for_scales_that_float16_holds():
    def chosen(inverse: float | None, **other: Any) -> str:
        return hopper_plan.e4m3_activation(
            exact_activation("gelu", E4M3), other.get("scale"), inverse
        )

    assert chosen(100.0) == "gelu_e4m3"
    for inverse in (None, 1e-5, 1e5):
        assert chosen(inverse) == "gelu_polynomial"
    assert chosen(100.0, scale=packed(torch.bfloat16, (64,), CPU)) == "gelu_polynomial"


def test_a_row_scale_shares_no_tile():
    x, weight, residual = metas(50432, 768, 3072, residual=True)
    scale = packed(torch.bfloat16, (50432,), CPU)
    for tile in (None, TileConfig(128, 256, 64, backend="coop")):
        found = hopper_choice(x, weight, residual, scale, torch.bfloat16, tile=tile)
        assert isinstance(found, Variant)
        assert found.name == "pingpong"


def test_a_table_may_name_the_tile():
    x, weight, _ = metas(50432, 768, 768)
    tile = TileConfig(64, 64, 64, backend="pingpong")
    found = hopper_choice(x, weight, None, None, torch.bfloat16, tile=tile)
    assert found == hopper_plan.variant_of("pingpong", 64, 64)


def test_the_search_for_tiles_tries_its_variants():
    query = _tuning.Query("linear", "sm90", "bfloat16", (("K", 768), ("M", 50432), ("N", 768)))
    space = SPACES["linear"]

    def tried(asked: _tuning.Query) -> set[tuple[str, int, int]]:
        found = candidates(asked, [space.start], space.steps[0], 232_448)
        return {(t.backend, t.BLOCK_M, t.BLOCK_N) for t in found} & {*TILES}

    assert tried(query) == {*TILES}
    assert tried(query._replace(arch="sm100")) == set()
    assert tried(query._replace(dtype="float32")) == set()
    assert tried(query._replace(shape=(("K", 588), ("M", 50432), ("N", 768)))) == set()
    present = TileConfig(128, 128, 64, 8, 3, "hopper tma")
    assert candidates(query, [present], space.steps[1], 232_448) == []


def test_what_it_cannot_take_has_a_reason():
    half, single = torch.bfloat16, torch.float32
    x, weight, residual = metas(64, 64, 64, residual=True)
    assert residual is not None
    for given, dtype, keep, reason in (
        (metas(64, 64, 64, single), single, False, "operands are torch.float32"),
        ((x, weight, None), single, False, "the result torch.float32"),
        (
            (x, weight, metas(64, 64, 64, single, residual=True)[2]),
            half,
            False,
            "the residual torch.float32",
        ),
        (metas(64, 65, 64), half, False, "N=65"),
        (metas(64, 64, 588), half, False, "K=588"),
        ((x._replace(aligned=False), weight, None), half, False, "rows of x"),
        ((x._replace(strides=(65, 1)), weight, None), half, False, "rows of x"),
        ((x, weight._replace(strides=(1, 64)), None), half, False, "rows of weight"),
        ((x, weight, residual._replace(strides=(0, 1))), half, False, "rows of residual"),
        ((x, weight, residual), half, True, "kept beside a residual"),
        (metas(64, 64, 64, E4M3, residual=True), E4M3, False, "e4m3 beside a residual"),
        (metas(64, 72, 64, E4M3), E4M3, False, "N=72"),
        (metas(64, 64, 72, E4M3), half, False, "K=72"),
        (metas(64, 64, 64, E4M3), single, False, "the result torch.float32"),
    ):
        found = hopper_choice(*given, None, dtype, keep=keep)
        assert isinstance(found, str), reason
        assert reason in found


@pytest.fixture
def compiled_path(monkeypatch):
    """As on a GPU: this process's kernels are interpreted otherwise."""
    monkeypatch.setattr(_backend, "_path", "auto")
    monkeypatch.setattr(_hopper, "_triton_version", lambda: "3.7.1")
    _device.forget()
    yield
    monkeypatch.undo()
    _device.forget()


def prepared(m: int, n: int, k: int, **options: Any) -> Any:
    x, weight, _ = metas(m, n, k)
    return prepare(x, weight, None, None, None, None, "gelu", "highest", **options)


@pytest.mark.usefixtures("compiled_path")
def test_prepare_follows_table_and_machine(monkeypatch):
    many = prepared(50432, 2304, 768).launch
    assert (many.tile.backend, many.programs) == ("pingpong", 132)
    assert prepared(1000, 768, 768, keep=True).launch.tile.backend == "pingpong"
    few = metas(197, 768, 768)[:2]
    assert "tuning table" in str(hopper_variant(*few, None, None, torch.bfloat16, looked_up(*few)))
    with _device.emulate("sm80"):
        assert prepared(50432, 2304, 768).launch.tile.backend == ""
    with _tuning.forced("linear", TileConfig(64, 64, 64, backend="pingpong")):
        assert prepared(197, 768, 768).launch.tile.BLOCK_M == 64
    with _tuning.forced("linear", TileConfig(64, 64, 64, backend="tma")):
        assert prepared(50432, 768, 768).launch.tile.backend == "tma"
    monkeypatch.setattr(_hopper, "_triton_version", lambda: "3.9.0")
    _device.forget()
    assert prepared(50432, 3072, 768).launch.tile.backend == ""
    large = metas(50432, 3072, 768)[:2]
    reason = hopper_variant(*large, None, None, torch.bfloat16, looked_up(*large))
    assert reason == "triton 3.9.0 is not 3.6.0 or 3.7.1"


@pytest.mark.usefixtures("triton_path")
def test_the_interpreter_takes_the_portable_kernel():
    assert _hopper.hopper_problem(CPU) == "Triton's interpreter does not run Gluon"


# --------------------------------------------------------------------------- launch


class Kernel:
    """In the place of a Triton kernel."""

    pre_run_hooks = ()

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.launches = error, 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            if self.error is not None:
                raise self.error
            self.launches += 1

        return launch


@pytest.mark.usefixtures("compiled_path")
def test_what_does_not_compile_gives_way_to_the_portable_kernel(monkeypatch):
    from triton.errors import TritonError

    monkeypatch.setattr(_hopper, "_refused", None)
    plain = functools.partial(Prepared, programs=1, arguments=lambda *tensors: tensors)
    tile = TileConfig(16, 16)
    error = TritonError("no\nregisters")
    portable, told = plain(Kernel(), tile=tile), []

    def spare(error: Exception) -> Prepared:
        told.append(error)
        return portable

    first = plain(Kernel(error), tile=tile, spare=spare)
    for _ in range(2):
        _launch.run(first, torch.zeros(1))
    assert portable.kernel.launches == 2
    assert told == [error]
    # neither a fault of a launch nor anything that FASTVIT_BACKEND=triton asks for
    with pytest.raises(RuntimeError, match="CUDA"):
        _launch.run(plain(Kernel(RuntimeError("CUDA")), tile=tile, spare=spare))
    monkeypatch.setattr(_backend, "_path", "triton")
    with pytest.raises(TritonError):
        _launch.run(plain(Kernel(error), tile=tile, spare=spare))
    monkeypatch.setattr(_backend, "_path", "auto")

    many = prepared(50432, 3072, 768).launch
    _backend.warn_once.cache_clear()  # another test may have been told
    with pytest.warns(RuntimeWarning, match="portable kernels on this Hopper GPU"):
        given = many.spare(error)
    assert given.tile.backend == ""
    assert _hopper.hopper_problem(CPU) == (
        "Triton could not compile one: TritonError: no registers"
    )
    assert prepared(50432, 3072, 768).launch.tile == given.tile


@pytest.mark.usefixtures("triton_path")
def test_launches_that_are_only_recorded_may_be_hoppers():
    x, weight = torch.zeros(1000, 64).bfloat16(), torch.zeros(64, 64).bfloat16()
    with recorded() as launches:
        ops.linear(x, weight)
    ((launch, _),) = launches
    assert launch.tile.backend == "pingpong"


EXPAND = """
import json
from types import SimpleNamespace
import torch
from triton.backends.nvidia import driver
from fastvit.check import ledger
from fastvit.kernels import _launch

describe = lambda given, settings: [f"map of {given.base.data_ptr()} {settings['block_size']}", 1]
driver.make_tensordesc_arg = describe
found = []
for configuration in json.loads(CONFIGURATIONS):
    prepared, arguments = ledger.build(configuration)
    compiled = ledger.compile_offline(prepared, arguments)
    given = [torch.empty(2048).bfloat16() if hasattr(a, "base") or torch.is_tensor(a) else a
             for a in arguments]
    for a, tensor in zip(arguments, given):
        if hasattr(a, "base"):
            a.base = tensor
    theirs = []
    wrapped = driver.wrap_handle_tensordesc(
        lambda *args: theirs.append(args), compiled.src.signature, compiled.metadata.tensordesc_meta
    )
    described = [a if hasattr(a, "base") else t for a, t in zip(arguments, given)]
    # triton 3.7 hands the kernel's arguments on as one
    old = getattr(driver, "_BASE_ARGS_FORMAT_LEN", None)
    wrapped(*range(old), *described) if old else wrapped(described)
    theirs = list(theirs[0][old:]) if old else theirs[0][0]
    ours = _launch._Ready.expand(SimpleNamespace(compiled=compiled), prepared.boxes, tuple(given))
    assert len(ours) == len(theirs)
    assert all(a is b or a == b for a, b in zip(ours, theirs)), (ours, theirs)
    found.append(sum(isinstance(a, str) and a.startswith("map of") for a in ours))
print(json.dumps(found))
"""


def test_the_driver_gets_what_tritons_own_launch_gives_it():
    """Descriptors among the arguments, with and without an operand left out between them."""
    base: dict[str, Any] = {
        "op": "linear", "variant": "pingpong", "tile": [64, 64, 64], "dtype": "bfloat16",
        "activation": "relu", "N": 768, "K": 768,
    }  # fmt: skip
    configurations = [
        base | {"operands": operands}
        for operands in (["bias"], ["bias", "residual"], ["scale", "pre"])
    ]
    code = f"CONFIGURATIONS = {json.dumps(configurations)!r}\n{EXPAND}"
    assert json.loads(fresh.python("-c", code)) == [3, 4, 4]


def test_nobody_imports_gluon_before_a_hopper_gpu_asks():
    code = (
        "import sys, torch, fastvit\n"
        "from fastvit.kernels import _device\n"
        "from fastvit.kernels._backend import packed\n"
        "from fastvit.kernels.linear.hopper_plan import hopper_variant\n"
        "from fastvit.kernels.linear.launch import looked_up, prepare\n"
        "x, w = (packed(torch.bfloat16, s, torch.device('cpu')) for s in ((50432, 768),) * 2)\n"
        "print(hopper_variant(x, w, None, None, torch.bfloat16, looked_up(x, w))[0])\n"
        "with _device.emulate('sm100'):\n"
        "    prepare(x, w, None, None, None, None, 'none', 'highest')\n"
        "print([name for name in sys.modules if name.startswith('triton.experimental')])\n"
    )
    assert fresh.python("-c", code).split() == ["pingpong", "[]"]
