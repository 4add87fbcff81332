"""The linear for few rows on Hopper, without a GPU: its source on a model of a multiprocessor, its
tiles, its numerics."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import fresh
import gluon_sim as sim
import numpy as np
import pytest
import seeds
import torch
from small_sim import load
from torch.nn import functional as F

from fastvit.kernels.linear import hopper_small_launch as small
from fastvit.kernels.linear.hopper_small_launch import BANDS, ROWS, Variant, fold, small_choice
from fastvit.kernels.linear.launch import exact_activation
from fastvit.kernels.linear.reference import finish_reference
from fastvit.numerics import measure

EPS = 1e-6


class Form(NamedTuple):
    """An epilogue, and a norm or none."""

    activation: str = "none"
    norm: bool = False
    bias: bool = True
    scale: bool = False
    residual: bool = False
    keep: bool = False


FORMS = {
    "bare": Form(bias=False),
    "activation": Form("relu"),
    "norm": Form(norm=True),
    "norm, activation": Form("relu", norm=True),
    "residual": Form(residual=True, keep=True),
    "all": Form("relu", norm=True, scale=True, residual=True, keep=True),
}
# of all of K at a time, of a ring, of one chunk a step; of two products and of one; of cut sums
VARIANTS = (
    Variant(64, 8, 1, 4, 3, 3), Variant(16, 8, 1, 2, 3, 5), Variant(64, 32, 4, 2, 3, 4),
    Variant(32, 0, 2, 1, 4, 6), Variant(16, 0, 1, 1, 1, 1),
)  # fmt: skip


class Before:
    """The launch before: what it writes is not there until `gdc_wait`."""

    def __init__(self, given: list[np.ndarray], made: list[np.ndarray]) -> None:
        self.given, self.made = given, made
        self.values = [array.copy() for array in given]

    def start(self) -> None:
        """A block begins."""
        self.then = [array.copy() for array in self.made]
        for array in self.given:
            array[...] = np.nan

    def wait(self) -> None:
        """What `gdc_wait` does."""
        for array, then in zip(self.made, self.then, strict=True):
            if not np.array_equal(array, then, equal_nan=True):
                raise sim.Wrong("a store before gdc_wait")
        for array, values in zip(self.given, self.values, strict=True):
            array[...] = values


def launch(
    space: dict[str, Any], v: Variant, form: Form, tensors: dict[str, Any], *, seed: int,
    bands: int = 1, units: int = 100, dtype: torch.dtype = torch.bfloat16,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """y, and the statistics of its rows; every element of y has to be written exactly once.

    Args:
        tensors: x, weight, and of bias, colsum, scale, residual and statistics those there are.
    """
    x, weight = tensors["x"], tensors["weight"]
    (m, k), n = x.shape, len(weight)
    rows = -(-m // ROWS) * ROWS
    y = sim.Pointer(np.full(m * n, np.nan))
    kept = np.full((2, rows, BANDS), np.nan)
    tiles = v.tiles(m, n)
    work = np.full(tiles * v.splits * ROWS * v.columns, np.nan)
    count = np.zeros(tiles, int)

    def box(matrix: np.ndarray, width: int) -> sim.Descriptor:
        chunks = matrix.reshape(len(matrix), -1, 64).transpose(1, 0, 2)
        return sim.Descriptor(chunks, (v.chunks, width, 64), dtype)

    def pointer(name: str) -> sim.Pointer | None:
        return sim.Pointer(tensors[name].reshape(-1)) if name in tensors else None

    args = (
        box(x, ROWS), box(weight, v.p0), box(weight, v.p1) if v.p1 else None, y,
        *map(pointer, ("bias", "colsum", "scale", "residual", "statistics")),
        sim.Pointer(kept.reshape(-1)) if form.keep else None,
        *(map(sim.Pointer, (work, count)) if v.splits > 1 else (None, None)),
        pointer("weight"), sim.Scalar(units), m, sim.Scalar(bands), n, k, EPS, form.activation,
        v.steps, v.stages, v.splits,
    )  # fmt: skip
    given = [tensors[name] for name in ("x", "residual", "statistics") if name in tensors]
    before = Before(given, [y.array, kept, work, count])
    space["gdc_wait"] = before.wait

    def kernel(*args: Any) -> None:
        before.start()
        space["hopper_small_linear_kernel"](*args)

    sim.run(kernel, args, warps=4, programs=tiles * v.splits, seed=seed)
    if not (y.writes == 1).all():
        raise sim.Wrong("an element not written exactly once")
    if count.any():
        raise sim.Wrong("counts left")
    if sim.brought != {256 * unit for unit in range(min(units, 128 * tiles * v.splits))}:
        raise sim.Wrong("other weights brought")
    return y.array.reshape(m, n), kept


def bands_of(x: Any, bands: int) -> tuple[Any, Any]:
    """Mean and squares around it of each band of each row."""
    x = x.reshape(len(x), bands, -1)
    mean = x.mean(2)
    return mean, ((x - mean[..., None]) ** 2).sum(2)


def simulate(space: dict[str, Any], v: Variant, form: Form, m: int, seed: int) -> None:
    """One launch of small integers, exact up to the norm; raises where anything is wrong."""
    rng = np.random.default_rng(seed)
    n, k, bands = 2 * v.columns, 64 * v.chunks * v.steps * v.splits, (1, 4, 32)[seed % 3]
    shapes = {"x": (m, k), "weight": (n, k), "bias": (n,), "scale": (n,), "residual": (m, n)}
    there = {"x", "weight"} | {name for name in shapes if getattr(form, name, False)}
    tensors: dict[str, Any] = {
        name: rng.integers(-3, 4, shapes[name]).astype(float) for name in shapes if name in there
    }
    want = tensors["x"] @ tensors["weight"].T
    if form.norm:
        x = tensors["x"]
        rstd = 1 / np.sqrt(x.var(1) + EPS)[:, None]
        colsum = tensors["colsum"] = tensors["weight"].sum(1)
        want = (want - x.mean(1)[:, None] * colsum) * rstd
        statistics = tensors["statistics"] = np.full((2, -(-m // ROWS) * ROWS, BANDS), np.nan)
        statistics[0, :m, :bands], statistics[1, :m, :bands] = bands_of(x, bands)
    want = want + tensors.get("bias", 0)
    want = np.maximum(want, 0) if form.activation == "relu" else want
    want = want * tensors.get("scale", 1) + tensors.get("residual", 0)
    y, kept = launch(space, v, form, tensors, seed=seed, bands=bands, units=300)
    right = np.allclose if form.norm else np.array_equal
    if not right(y, want):
        raise sim.Wrong("wrong result")
    if form.keep:
        for got, wanted in zip(kept[:, :m, : n // v.columns], bands_of(y, 2), strict=True):
            if not np.allclose(got, wanted):
                raise sim.Wrong("wrong statistics")


@pytest.fixture(scope="module")
def space() -> dict[str, Any]:
    return load()


@pytest.mark.parametrize("m", [1, 64, 130, 197])
@pytest.mark.parametrize("v", VARIANTS, ids=str)
def test_the_protocol_holds(space, v, m):
    for seed, form in enumerate(FORMS.values()):
        simulate(space, v, form, m, seed)


ALL, RING, CUT, ONE, _ = VARIANTS
FAULTS = {
    "x before the wait": (ALL, "bare", "    gdc_wait()\n", "    pass\n"),
    "statistics before the wait": (
        ALL, "norm", "    gdc_wait()\n",
        "    early = gl.load(statistics + gl.arange(0, 64, layout=None))\n    gdc_wait()\n"
        "    bias0 = bias0 + early[0] * 0\n",
    ),
    "slot filled while its products run": (
        RING, "bare", "acc0, acc1 = warpgroup_mma_wait(2 * CHUNKS,",
        "acc0, acc1 = warpgroup_mma_wait(4 * CHUNKS,",
    ),
    "slot of this step filled": (
        RING, "bare", "free = gl.where(slot == 0, STAGES - 1, slot - 1)", "free = slot",
    ),
    "slot filled before all warps have read it": (
        RING, "bare", "            barrier()  # in all warps: its slot is free\n", "",
    ),
    "a step too many": (
        RING, "bare", "(step - 1 + STAGES < STEPS)", "(step - 1 + STAGES <= STEPS)",
    ),
    "slot read before it has landed": (
        RING, "bare", "        mbarrier.wait(full.index(slot), phase)\n", "",
    ),
    "bytes of x not expected": (
        ALL, "bare", "CHUNKS * (ROWS + P0 + P1) * 128", "CHUNKS * (P0 + P1) * 128",
    ),
    "results of products in flight": (
        ONE, "bare", "acc0 = warpgroup_mma_wait(0, deps=(acc0,))", "pass",
    ),
    "second columns of the first": (ALL, "bare", "[chunk, col + P0, 0]", "[chunk, col, 0]"),
    "rows past the end": (RING, "residual", "(rows < M)[:, None] &", "(rows < M + 1)[:, None] &"),
    "columns of another tile": (RING, "bare", "col = band * BLOCK_N", "col = band * P0"),
    "another chunk": (ALL, "bare", "flat.slice(J * ROWS_OF_ONE", "flat.slice(0 * ROWS_OF_ONE"),
    "split that begins at 0": (CUT, "bare", "chunk = split * (STEPS", "chunk = 0 * (STEPS"),
    "first to finish adds": (CUT, "bare", "== SPLITS - 1", "== 0"),
    "a part left out": (CUT, "bare", "gl.static_range(1, SPLITS)", "gl.static_range(2, SPLITS)"),
    "counts left": (CUT, "bare", "            gl.store(count + tile, 0)\n", ""),
    "parts of another tile": (
        CUT, "bare", "tile.to(gl.int64) * (SPLITS * ROWS", "tile.to(gl.int64) * (ROWS",
    ),
    "mean of all bands": (ALL, "norm", "known = (stat_bands < bands)", "known = (stat_bands < 32)"),
    "means apart not counted": (ALL, "norm", "+ width * apart * apart", "+ 0 * apart"),
    "norm without its mean": (ALL, "norm", "- mean[:, None] * colsum", "- 0 * colsum"),
    "norm after the bias": (
        ALL, "norm", "        value = (value - mean",
        "        value = (value + bias[None, :] - mean",
    ),
    "statistics of half a band": (
        RING, "residual", "middle = total / BLOCK_N", "middle = total / P0",
    ),
    "statistics of another band": (RING, "residual", "* BANDS + band\n", "* BANDS\n"),
    "statistics around another mean": (
        RING, "residual", "apart1 = f1 - gl.convert", "apart1 = f1 - 0 * gl.convert",
    ),
    "weights brought twice": (ALL, "bare", "* gl.num_programs(0) + gl.program_id(0)", "* 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    v, form, old, new = FAULTS[fault]
    broken = load((old, new))

    def try_orders() -> None:
        for seed in range(1, 10):
            simulate(broken, v, FORMS[form], 130, seed)

    with pytest.raises(sim.Wrong):
        try_orders()


@pytest.mark.parametrize("dtype", small.HALF, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_numerics_behind_a_norm(space, activation, dtype):
    """Within the certificate's policy: values, sums and stores rounded as the kernel asks; x as
    trained ViTs have it, with large channels that the norm's weight makes small, and a mean."""
    torch.manual_seed(seeds.draw())
    m, n, k, bands = 130, 144, 768, 8
    gamma, beta = torch.rand(k) + 0.5, torch.randn(k) * 0.2
    x = torch.randn(m, k) * 2 + 3 * torch.randn(m, 1)
    x[:, :: k // 4] *= 100
    gamma[:: k // 4] /= 50
    weight, bias = torch.randn(n, k) * k**-0.5, torch.randn(n)
    given = [t.to(dtype) for t in (x, gamma, beta, weight, bias)]

    def through_torch(kind: torch.dtype) -> torch.Tensor:
        x, gamma, beta, weight, bias = (t.to(kind) for t in given)
        normal = F.layer_norm(x, (k,), gamma, beta, EPS)
        return finish_reference(F.linear(normal, weight, bias), activation, None, None)

    x, gamma, beta, weight, bias = given
    folded, bias, colsum = fold(gamma, beta, weight, bias)
    statistics = np.full((2, -(-m // ROWS) * ROWS, BANDS), np.nan)
    statistics[0, :m, :bands], statistics[1, :m, :bands] = bands_of(x.double().numpy(), bands)
    arrays = {"x": x, "weight": folded, "bias": bias, "colsum": colsum}
    tensors: dict[str, Any] = {name: t.float().numpy() for name, t in arrays.items()}
    tensors["statistics"] = statistics
    form = Form(exact_activation(activation, dtype), norm=True)
    v = small_choice(m, n, k, 132)
    assert isinstance(v, Variant)
    with sim.rounded():
        y, _ = launch(space, v, form, tensors, seed=0, bands=bands, dtype=dtype)
    got = torch.from_numpy(y).to(dtype)
    row = measure("y", got, through_torch(torch.float64), through_torch(dtype))
    assert row.passed, row


@pytest.mark.parametrize("dtype", small.HALF, ids=str)
def test_numerics_of_a_cut_sum(space, dtype):
    torch.manual_seed(seeds.draw())
    m, n, k = 65, 192, 3072
    given = {
        "x": torch.randn(m, k), "weight": torch.randn(n, k) * k**-0.5, "bias": torch.randn(n),
        "scale": torch.randn(n), "residual": torch.randn(m, n),
    }  # fmt: skip
    given = {name: t.to(dtype) for name, t in given.items()}
    v = small._variant(64, 32, 4, k)
    assert v is not None
    truth, eager = (
        finish_reference(F.linear(x, weight, bias), "none", scale, residual)
        for x, weight, bias, scale, residual in (
            [t.to(kind) for t in given.values()] for kind in (torch.float64, dtype)
        )
    )
    tensors: dict[str, Any] = {name: t.float().numpy() for name, t in given.items()}
    form = Form(scale=True, residual=True, keep=True)
    with sim.rounded():
        y, kept = launch(space, v, form, tensors, seed=0, dtype=dtype)
    row = measure("y", torch.from_numpy(y).to(dtype), truth, eager)
    assert row.passed, row
    # of the rounded values, which are what the next launch reads
    for got, want in zip(kept[:, :m, :2], bands_of(y, 2), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------- tiles


def test_vit_b_takes_the_tiles_that_fill_one_wave():
    """One image on an H200's 132 multiprocessors; what a block takes in is least."""
    for n, k, keep, columns, splits in (
        (2304, 768, False, 72, 1), (768, 768, True, 24, 1), (3072, 768, False, 96, 1),
        (768, 3072, True, 96, 4),
    ):  # fmt: skip
        v = small_choice(197, n, k, 132, keep=keep)
        assert isinstance(v, Variant)
        assert (v.columns, v.splits) == (columns, splits)
        assert v.tiles(197, n) * v.splits == 128


@pytest.mark.parametrize("width", [192, 384, 512, 768, 1024, 1152, 1280, 1408, 1536, 1664])
def test_every_width_has_tiles_that_fit(width):
    for m in (1, 50, 197, 577, small.MOST_ROWS):
        for n, k in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            v = small_choice(m, n, k, 132, keep=n == width)
            assert isinstance(v, Variant)
            assert v.chunks * v.steps * v.splits * 64 == k
            assert n % v.columns == 0
            assert n != width or n // v.columns <= BANDS
            held = v.stages * v.chunks * (ROWS + v.columns) * 128 + small.BARRIERS
            assert held <= 232_448


def test_what_has_no_tile_says_so():
    assert small_choice(801, 768, 768, 132) == "801 rows are more than 800"
    for n, k in ((768, 100), (100, 768)):
        assert small_choice(197, n, k, 132) == f"no tile fits N={n} and K={k}"


@pytest.mark.usefixtures("triton_path")
def test_row_statistics():
    x = (torch.randn(3, 37, 100) * 2 + 30).bfloat16()
    values, bands = small.row_statistics(x)
    assert bands == 1
    for got, want in zip(values[:, :111, 0], bands_of(x.double().view(111, 100), 1), strict=True):
        torch.testing.assert_close(got.double(), want[:, 0], rtol=1e-5, atol=1e-5)


ORDER = """
import json, re, torch
from fastvit.check import audit, few_tokens
found = {}
for spec in few_tokens.SPECS.values():
    for case in spec.bench_cases:
        launch = audit.record_launches(spec, case, torch.bfloat16, "sm90")[-1]
        audit.use_target("sm90")
        compiled = launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.options)
        sass, _ = audit._disassemble(compiled.asm["cubin"])
        opcodes = re.findall(r"/\\*[0-9a-f]{4,}\\*/\\s+(?:@!?U?P\\w+ )?(\\w+)", sass)
        assert opcodes.count("ACQBULK") == opcodes.count("PREEXIT") == 1
        at = opcodes.index("ACQBULK")
        found[case.name] = [[o.count(x) for x in ("UTMALDG", "STG", "ATOMG", "UBLKPF")]
                            for o in (opcodes[:at], opcodes[at:])]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_machine_code_waits_for_the_launch_ahead():
    """Before ``griddepcontrol.wait`` weights only are brought, by so many copies, and nothing is
    written."""
    found = json.loads(fresh.python("-c", ORDER))
    before = {name: counts for name, (counts, _) in found.items()}
    slots = {"ViT-B qkv": 3, "ViT-B proj": 3, "ViT-B fc1": 5, "ViT-B fc2": 5, "ViT-B": 0}
    assert before == {name: [2 * count, 0, 0, 0] for name, count in slots.items()}
    for name, (_, after) in found.items():
        assert after[0] >= slots[name]  # x
        assert after[1] > 0
        assert after[3] == (name != "ViT-B")
    assert [name for name, (_, after) in found.items() if after[2]] == ["ViT-B fc2"]
