"""Hopper's attention kernels without a GPU: their source on a model of a multiprocessor, launched
as the product launches it; who is given them; what runs where they cannot. `test_ledger.py`
compiles them."""

from __future__ import annotations

import functools
import json
import math
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
from fastvit.kernels import _backend, _device, _hopper, _tuning
from fastvit.kernels._backend import describe, prepare_and_run
from fastvit.kernels._tuning import TileConfig
from fastvit.kernels.attention import hopper_plan
from fastvit.kernels.attention.hopper_plan import (
    LONG,
    SHORT,
    Variant,
    hopper_variant,
    portable_tile,
    prepare_hopper,
    variant_of,
)
from fastvit.kernels.attention.launch import Options, prepare, problem_of, run
from fastvit.kernels.linear_fp8.reference import fp8_quantize_reference
from fastvit.numerics import measure

ROOT = Path(__file__).parents[2] / "kernels" / "attention"
PARTS = ROOT.parent / "_hopper_e4m3.py", ROOT / "hopper_parts.py"
FILES = {
    **dict.fromkeys(SHORT, (*PARTS, ROOT / "hopper.py")),
    **dict.fromkeys(LONG, (*PARTS, ROOT / "hopper_long.py")),
}
LOG2E = math.log2(math.e)
E4M3 = torch.float8_e4m3fn
LOWEST = torch.finfo(torch.float32).min


class Form(NamedTuple):
    """One attention; M is N where it is None."""

    b: int
    h: int
    n: int
    d: int = 64
    m: int | None = None
    packed: bool = True
    keep: bool = True
    mask: str = ""  # "bias" of each head, "key" of each image, "bool"
    inverse: float | None = None  # of the scale of an output in e4m3


def draw(form: Form, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """q, k, v and the mask."""
    g = torch.Generator().manual_seed(seed)
    b, h, n, d = form[:4]
    m = n if form.m is None else form.m

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    if form.packed:
        q, k, v = normal(b, n, 3 * h * d), None, None
    else:  # each with strides of its own
        q = normal(b, n, h, d + 8)[..., :d].transpose(1, 2)
        k, v = normal(h, b, m, d).transpose(0, 1), normal(b, h, m + 3, d)[:, :, :m]
    mask = None
    if form.mask == "bias":
        mask = torch.randn(1, h, n, m, generator=g) * 3
        mask[torch.rand(mask.shape, generator=g) < 0.3] = -math.inf
        mask[0, :, n // 2] = -math.inf  # a query that may look nowhere
        mask[0, :, n // 3] = LOWEST  # one that looks everywhere alike
        mask[0, :, 1, : m - 1] = -math.inf
    elif form.mask:
        mask = torch.arange(m) < torch.tensor([[m - 3], [m // 3], [0]])[:b]
        mask = mask[:, None, None]
        if form.mask == "key":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    return q, k, v, mask


def truth(form: Form, q: Any, k: Any, v: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [B, N, H, d] in the dtype of q, and the statistics."""
    if k is None:
        q, k, v = q.unflatten(2, (3, form.h, form.d)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * form.d**-0.5
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        scores += torch.where(mask == -math.inf, mask, mask.clamp(min=-2e38)).to(scores.dtype)
    top = scores.amax(-1, keepdim=True)
    nowhere = top == -math.inf
    weights = (scores - top.masked_fill(nowhere, 0)).exp()
    inverse = 1 / weights.sum(-1, keepdim=True).masked_fill(nowhere, 1)
    kept = torch.stack([(top * LOG2E).masked_fill(nowhere, math.inf), inverse])[..., 0]
    return ((weights * inverse) @ v).transpose(1, 2), kept


def problem(form: Form, q: Any, k: Any, v: Any, mask: Any) -> Any:
    metas: Any = describe(q, k, v, mask, None, None, None)
    out_scale = None if form.inverse is None else 1 / form.inverse
    options = Options(form.h, 0, form.d**-0.5, half=False, out_scale=out_scale)
    return problem_of(metas, options, "highest"), metas


def chosen(name: str, form: Form, **changes: Any) -> Variant:
    given = draw(form, torch.bfloat16, 0)
    found = variant_of(name, problem(form, *given)[0], masked=bool(form.mask))
    assert found is not None
    return found._replace(**changes)


def launch(
    space: dict[str, Any], v: Variant, form: Form, given: tuple[Any, ...], programs: int, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Output and statistics of the product's own launch."""
    dtype = given[0].dtype
    asked, metas = problem(form, *given)
    prepared = prepare_hopper(v, asked, metas[1], metas[3], keep=form.keep)
    b, h, n, d = form[:4]
    out = torch.full((b, n, h, d), math.nan).to(dtype if form.inverse is None else E4M3)
    kept = torch.full((2, b, h, n), math.nan) if form.keep else None
    written = [x for x in (out, kept) if x is not None]
    tensors = (*given, None, None, None, out, kept)
    y, *rest = sim.launch(space, prepared, tensors, written, programs=programs, seed=seed)
    return y, rest[0] if rest else None


def simulate(space: dict[str, Any], v: Variant, form: Form, programs: int, seed: int) -> None:
    """One launch; raises where anything is wrong."""
    given = draw(form, torch.bfloat16, seed)
    y, kept = launch(space, v, form, given, programs, seed)
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in given]
    want, statistics = truth(form, *wide)
    want = want if form.inverse is None else want * form.inverse
    if not np.allclose(y, want, rtol=1e-9, atol=1e-12):
        raise sim.Wrong("wrong result")
    if kept is not None and not np.allclose(kept, statistics, rtol=1e-9, atol=1e-12):
        raise sim.Wrong("wrong statistics")


@functools.cache
def space(name: str) -> dict[str, Any]:
    return sim.load(*FILES[name])


# of each: variant, form, programs, changes of the variant
CASES: list[tuple[str, Form, int, dict[str, Any]]] = [
    ("roles", Form(2, 3, 197), 2, {}),  # three heads each: both stages again
    ("roles", Form(2, 3, 197), 2, {"ahead": False, "stages": 3}),
    ("roles", Form(1, 1, 1, keep=False), 1, {}),  # one block of queries: one consumer
    ("roles", Form(3, 1, 50, 32, packed=False), 1, {}),
    ("roles", Form(1, 3, 257), 2, {}),  # five blocks: consumers with unequal work
    ("roles", Form(2, 2, 70, 48, 150, packed=False), 3, {"ahead": False}),
    ("roles", Form(1, 2, 128, 40, 272, packed=False), 1, {}),
    ("head", Form(1, 2, 197), 99, {}),
    ("head", Form(2, 2, 197), 3, {"blocks": 4, "items": 4}),
    ("head", Form(1, 3, 130, 56, packed=False), 2, {"blocks": 3, "items": 3}),
    ("head", Form(2, 1, 1, 64, 224, packed=False, keep=False), 1, {}),
    ("stream", Form(1, 2, 197), 2, {}),
    ("stream", Form(1, 2, 330, 72), 1, {"stages": 2, "queries": 1}),
    ("stream", Form(2, 1, 257, 80, packed=False), 2, {"stages": 3}),
    ("stream", Form(2, 2, 128, mask="bias"), 3, {}),
    ("stream", Form(3, 1, 100, 128, 333, packed=False, mask="key"), 2, {}),
    ("stream", Form(2, 1, 90, 72, mask="bool"), 1, {"queries": 1}),
    ("stream", Form(1, 1, 400, 32, 200, packed=False), 1, {"tails": 2}),
    ("stream-turns", Form(2, 2, 300, 88), 2, {"stages": 2, "queries": 1}),
    ("stream-turns", Form(1, 2, 440, keep=False, mask="bias"), 2, {}),
    ("stay", Form(2, 2, 257), 1, {}),
    ("stay", Form(1, 3, 330, 80, mask="bool"), 2, {"queries": 1}),
    ("stay", Form(2, 2, 128, 104, packed=False, mask="bias"), 1, {"stages": 2}),
    ("stay-turns", Form(2, 2, 240), 2, {}),
    ("roles", Form(2, 3, 197, keep=False, inverse=9.0), 2, {}),
    ("roles", Form(1, 2, 70, 40, 257, packed=False, keep=False, inverse=9.0), 2, {}),
    ("head", Form(1, 2, 197, 32, keep=False, inverse=9.0), 99, {}),
    ("stream", Form(2, 2, 128, 72, keep=False, mask="bias", inverse=9.0), 3, {}),
    ("stay", Form(2, 2, 257, 104, keep=False, inverse=9.0), 1, {}),
]


def name_of(case: Any) -> str | None:
    return repr(case).replace("Form", "") if isinstance(case, Form | dict) else None


@pytest.mark.parametrize(("name", "form", "programs", "changes"), CASES, ids=name_of)
def test_the_protocol_holds(name, form, programs, changes):
    v = chosen(name, form, **changes)
    for seed in range(2):
        simulate(space(name), v, form, programs, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form", "programs", "changes"), CASES, ids=name_of)
def test_the_protocol_holds_at_length(name, form, programs, changes):
    v = chosen(name, form, **changes)
    for seed in range(2, 20):
        simulate(space(name), v, form, 1 + seed % 5, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG + SHORT)
def test_every_size_holds(name):
    """What the plan makes of lengths and head dimensions, as it makes it."""
    for seed, n in enumerate(
        (65, 113, 128, 129, 196, 197, 224, 256, 272, 273, 384, 577, 729, 1025)
    ):
        for d in (32, 64) if name in SHORT else (64, 72, 88, 104, 128):
            form = Form(1, 2, n, d)
            v = variant_of(name, problem(form, *draw(form, torch.bfloat16, 0))[0], masked=False)
            if v is not None:
                simulate(space(name), v, form, 1, seed)


FAULTS = {
    "scores read before keys have landed": (
        0, "            mbarrier.wait(full.index(coming_stage), coming_turn // STAGES & 1)\n", "",
    ),
    "head given back by one consumer only": (
        0, "mbarrier.init(empty.index(i), count=CONSUMERS)",
        "mbarrier.init(empty.index(i), count=1)",
    ),
    "head given back while its values are read": (
        0, "o = _settle_values(o, a0, a1, a2, PARTS, P1, P2)\n            if coming_turn",
        "if coming_turn",
    ),
    "wait that does not cover the output": (
        0, "_settle_values(o, a0, a1, a2, PARTS, P1, P2)",
        "_settle_values(o, a0, a1, a2, PARTS + 1, P1, P2)",
    ),
    "head filled before it is free": (
        0, "        mbarrier.wait(empty.index(stage), turn // STAGES & 1 ^ 1)\n", "",
    ),
    "too few bytes expected": (
        0, "(BLOCKS * ROWS + 2 * (P0 + P1 + P2)) * WIDTH * 2",
        "(BLOCKS * ROWS + P0 + P1 + P2) * WIDTH * 2",
    ),
    "keys past the last": (0, "t2 = hide(t2, M - P0 - P1)", "t2 = hide(t2, M - P0)"),
    "values of another head": (
        0, "image, head_of(head, H, 2, PACKED)", "image, head_of(head, H, 1, PACKED)",
    ),
    "queries overwritten": (
        8, "_load_queries(q, q_bufs, q_bars, step + 2", "_load_queries(q, q_bufs, q_bars, step + 1",
    ),
    "next keys before these are read": (
        8, "            s0, s1, s2, high = _settle_scores(s0, s1, s2, M, P0, P1, P2)\n\n", "",
    ),
    "wrong parity of the values": (
        8, "mbarrier.wait(v_bar, turn & 1)", "mbarrier.wait(v_bar, turn & 1 ^ 1)",
    ),
    "keys given back before their scores are there": (
        12, "            s = warpgroup_mma_wait(0, deps=(f,))\n            barrier()",
        "            mbarrier.arrive(k_empty.index(slot), count=1, pred=last)\n"
        "            last = False\n            s = warpgroup_mma_wait(0, deps=(f,))\n"
        "            barrier()",
    ),
    "values given back too early": (
        20, "mbarrier.arrive(v_empty.index(old), count=1, pred=last)",
        "mbarrier.arrive(v_empty.index(slot), count=1, pred=last)",
    ),
    "keys given back at the first use": (
        20, "last = (t + CONSUMERS) // CHUNK != turn", "last = turn == turn",
    ),
    "values not waited for": (
        12, "                mbarrier.wait(v_full.index(old), (step + j - 1) // STAGES & 1)\n", "",
    ),
    "smaller blocks not waited for": (
        12, "                mbarrier.wait(t_full.index(tail), turn // TAILS & 1)\n"
        "                a, o0", "                a, o0",
    ),
    "next queries over these": (11, "WHO * 2 + (done + 1) % 2", "WHO * 2 + done % 2"),
    "turn never given": (
        18, "        mbarrier.arrive(turn_bars.index((WHO + 1) % CONSUMERS), count=1)\n    bias =",
        "    bias =",
    ),
    "no turn where there are no queries": (
        18, "                    if j > 0:\n", "                    if j > 1:\n",
    ),
    "output not rescaled": (12, "    o0 = o0 * like_rows(decay, o0)\n", ""),
    "pairs of e4m3 at the places of single ones": (24, "stride = stride // 2", "stride = stride"),
    "an inverse left out": (26, "(1.0 if inverse is None else inverse)", "1.0"),
    "the scale of the output left out": (
        28, "factor = norm if inverse is None else norm * inverse", "factor = norm",
    ),
    "a query that may look nowhere": (
        14, 'shift = gl.where(new == float("-inf"), 0.0, new)', "shift = new",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    case, old, new = FAULTS[fault]
    name, form, programs, changes = CASES[case]
    broken = sim.load(*FILES[name], edits=[(old, new)])
    v = chosen(name, form, **changes)

    def try_orders() -> None:
        for seed in range(12):
            simulate(broken, v, form, programs, seed)

    with np.errstate(all="ignore"), pytest.raises(sim.Wrong):
        try_orders()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("roles", Form(1, 2, 197)),
        ("head", Form(1, 1, 130, packed=False)),
        ("stream", Form(1, 1, 330, 72)),
        ("stay", Form(1, 2, 257, 128, mask="bias")),
        ("roles", Form(1, 2, 197, keep=False, inverse=2000.0)),
        ("stream", Form(1, 1, 330, 72, keep=False, inverse=2000.0)),
    ],
    ids=name_of,
)
def test_numerics(name, form, dtype):
    """Within the certificate's policy: weights, sums and stores rounded as the kernel asks."""
    given = draw(form, dtype, seeds.draw())
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in given]
    want, statistics = truth(form, *wide)
    q, k, v, mask = given
    if k is None:
        q, k, v = q.unflatten(2, (3, form.h, form.d)).permute(2, 0, 3, 1, 4)
    mask = mask if mask is None else mask.to(dtype)
    eager = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    eager = torch.where(eager.isnan(), 0, eager)
    with sim.rounded():
        y, kept = launch(space(name), chosen(name, form), form, given, 1, 0)
    if form.inverse is not None:  # the largest values are beyond e4m3
        want, eager = (fp8_quantize_reference(x, 1 / form.inverse) for x in (want, eager))
        assert want.abs().max() == 448
        dtype = E4M3
    row = measure(name, torch.from_numpy(y).to(dtype), want, eager)
    assert row.passed, row
    if form.keep:
        assert kept is not None
        assert np.allclose(kept, statistics, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- choice

HALF, CPU = torch.bfloat16, torch.device("cpu")


def choice(form: Form, tile: TileConfig | None = None, dtype: torch.dtype = HALF) -> Variant | str:
    """For tensors that nobody wrote."""
    asked, metas = problem(form, *on_meta(form, dtype))
    return hopper_plan.hopper_choice(asked, *metas[:4], tile=tile)


def on_meta(form: Form, dtype: torch.dtype) -> tuple[Any, ...]:
    b, h, n, d = form[:4]
    m = n if form.m is None else form.m
    shapes: list[Any] = [(b, n, 3 * h * d), None, None]
    if not form.packed:
        shapes = [(b, h, n, d), (b, h, m, d), (b, h, m, d)]
    shapes.append((1, h, n, m) if form.mask else None)
    return tuple(s if s is None else torch.empty(s, dtype=dtype, device="meta") for s in shapes)


def names(found: Variant | str) -> str:
    return found.name if isinstance(found, Variant) else found


def test_the_fastest_of_the_h200_is_chosen():
    """Of what `proven/sm90.json` has times of."""
    proven = json.loads((ROOT / "proven" / "sm90.json").read_text())["entries"]
    for batch in (1, 256):
        times = {
            entry["configuration"]["variant"]: time["us"]
            for entry in proven
            for time in entry["proof"]["times"]
            if time["B"] == batch
        }
        assert len(times) >= 2
        assert names(choice(Form(batch, 12, 197))) == min(times, key=lambda v: times[v])


def test_what_is_chosen():
    assert names(choice(Form(1, 12, 257))) == "roles"  # a head's program has too few registers
    assert choice(Form(256, 12, 257)).ahead is False  # type: ignore[union-attr]
    assert names(choice(Form(256, 12, 50))) == "roles"
    assert names(choice(Form(256, 12, 577))) == "stay"
    assert names(choice(Form(1, 12, 577))) == "stream"
    assert names(choice(Form(256, 16, 257, 80))) == "stay"
    assert names(choice(Form(256, 12, 197, mask="bias"))) == "stay"
    assert names(choice(Form(64, 12, 1370))) == "stream"
    assert choice(Form(64, 16, 100, 72)).parts[0] == 64  # type: ignore[union-attr]
    tile = TileConfig(64, 64, backend="stream-turns")
    found = choice(Form(256, 12, 577), tile)
    assert isinstance(found, Variant)
    assert (found.name, found.parts) == ("stream-turns", (64, 16, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_length_and_head_dimension_is_taken(dtype):
    for d in range(64, 129, 8):
        for n in (128, 196, 197, 256, 257, 577, 729, 1370, 4096):
            for b in (1, 256):
                for mask in ("", "bias"):
                    for packed in (True, False):
                        form = Form(b, 12, n, d, packed=packed, mask=mask)
                        assert isinstance(choice(form, dtype=dtype), Variant)
    for n in range(1, 273):
        assert isinstance(choice(Form(1, 3, n), dtype=dtype), Variant)


def test_parts_cover_the_keys_and_only_the_last_is_masked():
    for m in range(1, 273):
        parts = [p for p in hopper_plan.key_parts(m) if p]
        assert sum(parts[:-1]) < m <= sum(parts)
    assert hopper_plan.key_parts(197) == (128, 64, 16)
    for block in (64, 128):
        for m in range(block, 1400):
            full, *parts = hopper_plan.long_parts(m, block)
            tail = [p for p in parts if p]
            assert all(p <= block for p in tail)
            assert full * block + sum(tail[:-1]) < m <= full * block + sum(tail) or not tail
    assert hopper_plan.long_parts(577, 128) == (4, 64, 16)


def test_what_they_cannot_take_has_a_reason():
    packed_form, form = Form(2, 2, 197), Form(2, 2, 197, packed=False)
    assert "torch.float32" in names(choice(packed_form, dtype=torch.float32))
    assert "head dimension 76" in names(choice(Form(2, 2, 197, 76)))
    assert "head dimension 256" in names(choice(Form(2, 2, 197, 256)))
    assert "too few" in names(choice(Form(2, 2, 50, 80)))
    assert "50 keys of 64 channels with a mask" in names(choice(Form(2, 2, 50, mask="bias")))
    _, metas = problem(form, *on_meta(form, HALF))
    mask = describe(torch.empty(1, 1, 197, 1))[0]
    cos = describe(torch.empty(197, 32))[0]
    bounds = describe(torch.tensor([0, 197], dtype=torch.int32))[0]
    plain = {"mask": None, "cos": None, "sin": None, "cu_seqlens": None}
    for changed, scale, reason in (
        ({"q": metas[0]._replace(aligned=False)}, 1.0, "q's rows"),
        ({"v": metas[2]._replace(strides=(2 * 197 * 64, 197 * 64, 1, 197))}, 1.0, "v's rows"),
        ({"k": metas[1]._replace(strides=(2 * 197 * 68, 197 * 68, 68, 1))}, 1.0, "k's rows"),
        ({"k": metas[1]._replace(strides=(197 * 64, 0, 64, 1))}, 1.0, "k's rows"),
        ({"mask": mask}, 1.0, "side by side"),
        ({"mask": mask._replace(shape=(197, 197), strides=(2**24, 1))}, 1.0, "32 bits count"),
        ({"cos": cos, "sin": cos}, 1.0, "rotary"),
        ({}, 0.0, "scale 0.0"),
        ({"q": describe(torch.empty(197, 384, dtype=HALF))[0], "k": None, "v": None,
          "cu_seqlens": bounds}, 1.0, "packed"),
    ):  # fmt: skip
        given: Any = {"q": metas[0], "k": metas[1], "v": metas[2], **plain, **changed}
        order = ("q", "k", "v", "mask", "cos", "sin", "cu_seqlens")
        tensors = tuple(given[name] for name in order)
        asked = problem_of(tensors, Options(2, 197, scale, half=False), "highest")
        sides = given["q"], given["k"], given["v"], given["mask"]
        assert reason in names(hopper_plan.hopper_choice(asked, *sides))


@pytest.fixture
def compiled_path(monkeypatch):
    """As on a GPU: this process's kernels are interpreted otherwise."""
    monkeypatch.setattr(_backend, "_path", "auto")
    monkeypatch.setattr(_hopper, "_triton_version", lambda: "3.7.1")
    _device.forget()
    yield
    monkeypatch.undo()
    _device.forget()


def prepared(form: Form, *, keep: bool = False) -> Any:
    metas: Any = describe(*on_meta(form, HALF))
    metas = [m if m is None else m._replace(device=CPU) for m in metas]
    out_scale = None if form.inverse is None else 1 / form.inverse
    options = Options(form.h, 0, form.d**-0.5, half=False, out_scale=out_scale)
    return prepare(*metas, None, None, None, *options, "highest", keep=keep).launch


@pytest.mark.usefixtures("compiled_path")
def test_prepare_follows_table_and_machine(monkeypatch):
    from triton.errors import TritonError

    monkeypatch.setattr(_hopper, "_refused", None)
    many = prepared(Form(256, 12, 197))
    assert (many.tile.backend, many.programs) == ("roles", 132)
    assert prepared(Form(256, 12, 197, 76)).tile == TileConfig(64, 64, num_stages=2)
    with _device.emulate("sm80"):
        assert prepared(Form(256, 12, 197)).tile.backend == ""
    with _tuning.forced("attention", TileConfig(64, 128, backend="stay")):
        assert prepared(Form(256, 12, 197)).tile.backend == "stay"
        assert prepared(Form(256, 12, 20, 80)).tile == portable_tile(
            TileConfig(64, 1, backend="stay")
        )
    with _tuning.forced("attention", TileConfig(128, 64)):
        assert prepared(Form(256, 12, 197)).tile.BLOCK_M == 128
    _backend.warn_once.cache_clear()  # another test may have been told
    with pytest.warns(RuntimeWarning, match="portable kernels on this Hopper GPU"):
        given = many.spare(TritonError("no registers"))
    assert given.tile == TileConfig(64, 64, num_stages=3)
    assert prepared(Form(256, 12, 197)).tile == given.tile


@pytest.mark.usefixtures("triton_path")
def test_launches_that_are_only_recorded_may_be_hoppers():
    qkv = torch.zeros(2, 197, 3 * 128).bfloat16()
    with recorded() as launches:
        ops.attention_qkv(qkv, 2)
        tensors = (qkv, None, None, None, None, None, None)
        prepare_and_run(prepare, run, tensors, *Options(2, 0, 0.1, False), keep=True)
    assert [launched.tile.backend for launched, _ in launches] == ["head", "head"]
    table = "tuning table of sm80"
    with _device.emulate("sm80"):
        asked, metas = problem(Form(2, 2, 197), qkv, None, None, None)
        assert table in names(hopper_variant(asked, *metas[:4]))


def test_the_search_for_tiles_tries_its_variants():
    sizes = (("D", 64), ("M", 197), ("N", 197), ("ROPE", 0))
    query = _tuning.Query("attention", "sm90", "bfloat16", sizes)
    step = SPACES["attention"].steps[0]

    def tried(asked: _tuning.Query) -> set[str]:
        return {t.backend for t in candidates(asked, [SPACES["attention"].start], step, 232_448)}

    assert tried(query) == {"", *SHORT, *LONG}
    wide = query._replace(shape=(("D", 80), *sizes[1:]))
    assert tried(wide) == {"", *LONG}
    assert tried(query._replace(arch="sm100")) == {""}
    assert tried(query._replace(dtype="float32")) == {""}
    assert tried(query._replace(shape=(*sizes[:3], ("ROPE", 1)))) == {""}


def test_nobody_imports_gluon_before_a_hopper_gpu_asks():
    code = (
        "import sys, torch, fastvit\n"
        "from fastvit.kernels._backend import describe\n"
        "from fastvit.kernels import _device\n"
        "from fastvit.kernels.attention.hopper_plan import hopper_variant\n"
        "from fastvit.kernels.attention.launch import Options, prepare, problem_of\n"
        "metas = describe(torch.empty(256, 197, 2304).bfloat16(), *(None,) * 6)\n"
        "options = Options(12, 0, 0.125, False)\n"
        "problem = problem_of(metas, options, 'highest')\n"
        "print(hopper_variant(problem, *metas[:4])[0])\n"
        "with _device.emulate('sm100'):\n"
        "    prepare(*metas, *options, 'highest')\n"
        "print([name for name in sys.modules if name.startswith('triton.experimental')])\n"
    )
    assert fresh.python("-c", code).split() == ["roles", "[]"]
