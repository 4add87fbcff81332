"""Gradients of attention by Hopper's kernel without a GPU: its source on a model of a
multiprocessor, launched as the product launches it; who is given it; what runs where it cannot.
`test_ledger.py` compiles it."""

from __future__ import annotations

import functools
import math
from typing import Any

import gluon_sim as sim
import numpy as np
import pytest
import seeds
import torch
from test_hopper_attention import (  # noqa: F401  a fixture
    HALF,
    ROOT,
    Form,
    compiled_path,
    draw,
    name_of,
    names,
    on_meta,
    problem,
    truth,
)

from fastvit import ops
from fastvit.check.launches import recorded
from fastvit.kernels import _backend, _device, _hopper, _tuning
from fastvit.kernels._backend import describe, packed
from fastvit.kernels._tuning import TileConfig
from fastvit.kernels.attention import hopper_plan
from fastvit.kernels.attention.hopper_plan import Whole, backward_choice, prepare_whole
from fastvit.numerics import measure

FILES = (ROOT / "hopper_parts.py", ROOT / "hopper_backward.py")


def choice(form: Form, given: tuple[Any, ...], needed: tuple[bool, ...] = (True,) * 3) -> Any:
    """What `backward_choice` says."""
    asked, metas = problem(form, *given)
    out = packed(metas[0].dtype, (form.b, form.n, form.h, form.d), metas[0].device)
    return backward_choice(asked, metas, out, out, needed)


def split(form: Form, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.unflatten(2, (3, form.h, form.d)).permute(2, 0, 3, 1, 4))


def expected(form: Form, q: Any, k: Any, v: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of q, k and v [B, H, tokens, d] by the formulas."""
    if k is None:
        q, k, v = split(form, q)
    g = grad.transpose(1, 2)
    p = torch.softmax(q @ k.mT * form.d**-0.5, -1)
    dp = g @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * form.d**-0.5
    return ds @ k, ds.mT @ q, p.mT @ g


def launch(
    space: dict[str, Any], form: Form, given: tuple[Any, ...], grad: torch.Tensor,
    out: torch.Tensor, kept: torch.Tensor, programs: int, seed: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The gradients of q, k and v by the product's own launch."""
    asked, metas = problem(form, *given)
    prepared = prepare_whole(choice(form, given), asked, metas[1], *describe(grad))
    q, k, v, mask = given
    dq = torch.full(q.shape, math.nan, dtype=q.dtype)
    dk, dv = (dq if x is None else torch.full(x.shape, math.nan, dtype=q.dtype) for x in (k, v))
    tensors = (q, k, v, mask, None, None, None, grad, out, kept, dq, dk, dv)
    written = [dq] if k is None else [dq, dk, dv]
    found = sim.launch(space, prepared, tensors, written, programs=programs, seed=seed)
    gradients = tuple(map(torch.from_numpy, found))
    return split(form, *gradients) if k is None else gradients


def gradient(form: Form, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Of the output."""
    g = torch.Generator().manual_seed(seed + 1)
    return torch.randn(form.b, form.n, form.h, form.d, generator=g).to(dtype)


def simulate(space: dict[str, Any], form: Form, programs: int, seed: int) -> None:
    """One launch; raises where anything is wrong."""
    given, grad = draw(form, torch.bfloat16, seed), gradient(form, torch.bfloat16, seed)
    wide = [x if x is None else x.double() for x in given]
    out, kept = truth(form, *wide)
    found = launch(space, form, given, grad, out.contiguous(), kept, programs, seed)
    for ours, want in zip(
        found, expected(form, wide[0], wide[1], wide[2], grad.double()), strict=True
    ):
        if not np.allclose(ours, want, rtol=1e-9, atol=1e-12):
            raise sim.Wrong("wrong result")


@functools.cache
def space() -> dict[str, Any]:
    return sim.load(*FILES)


# form, programs; of every number of halves of keys, parts of queries, with and without a last one
CASES = (
    (Form(2, 3, 197), 2),
    (Form(1, 5, 208), 3),
    (Form(3, 1, 1), 1),
    (Form(3, 3, 50), 4),
    (Form(1, 3, 80), 1),
    (Form(1, 2, 128), 1),
    (Form(1, 3, 130), 2),
    (Form(2, 1, 192), 1),
    (Form(1, 3, 197, 48, packed=False), 2),
    (Form(2, 1, 70, 40, 256, packed=False), 1),
    (Form(1, 2, 208, 64, 33, packed=False), 1),
)


@pytest.mark.parametrize(("form", "programs"), CASES, ids=name_of)
def test_the_protocol_holds(form, programs):
    for seed in range(2):
        simulate(space(), form, programs, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "programs"), CASES, ids=name_of)
def test_the_protocol_holds_at_length(form, programs):
    for seed in range(2, 20):
        simulate(space(), form, 1 + seed % 5, seed)


DONE = "        barrier()  # all warps are done with q, G and V, and their dS^T and dV are there\n"
THERE = "        barrier()  # dQ and dK are there"
SLOPE = "            slope = _slope(p, dp, delta.index"
FENCE = "        fence_async_shared()\n"
FAULTS = {
    "q filled before all warps are done": (DONE, ""),
    "V filled before dV has left": (
        "            tma.store_wait(COUNT + HALVES)  # dV has been read\n", "",
    ),
    "G filled before dQ has left": (
        "            tma.store_wait(HALVES)  # dQ has been read\n", "",
    ),
    "K filled before dK has left": ("            tma.store_wait(0)  # dK has been read\n", ""),
    "stores in flight at the end": ("turn += 1\n    tma.store_wait(0)", "turn += 1"),
    "dP not waited for": (
        f"            dp = warpgroup_mma_wait(1, deps=(dp,))\n{SLOPE}", SLOPE,
    ),
    "no fence before dQ's products": (FENCE + DONE, DONE),
    "no fence before dQ and dK leave": (FENCE + THERE, THERE),
    "V not waited for": ("        mbarrier.wait(v_bar, turn & 1)\n", ""),
    "wrong parity of G": ("mbarrier.wait(g_bar, turn & 1)", "mbarrier.wait(g_bar, turn & 1 ^ 1)"),
    "too few bytes expected": ("(PARTS * PART + LAST) * bufs", "PARTS * PART * bufs"),
    "dK not scaled": ("dk_low = (dk_sums * slope)", "dk_low = (dk_sums * 1.0)"),
    "halves' dS^T mixed up": ("WHICH * PARTS + part + zero", "(1 - WHICH) * PARTS + part + zero"),
    "the last queries' dS^T of one half": ("ds_last.index(WHICH + zero)", "ds_last.index(zero)"),
    "another head's statistics": ("stat_ptr + item.to", "stat_ptr + head.to"),
    "gradients of another head": (
        "[image, part * PART, head, 0], g_bufs", "[image, part * PART, H + head, 0], g_bufs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    broken = sim.load(*FILES, edits=[FAULTS[fault]])

    def try_orders() -> None:
        for seed in range(6):
            simulate(broken, Form(2, 2, 197), 1, seed)

    with np.errstate(all="ignore"), pytest.raises(sim.Wrong):
        try_orders()


def check_numerics(space: dict[str, Any], form: Form, dtype: torch.dtype, inputs: str) -> None:
    """Within the certificate's policy: weights, sums and stores rounded as the kernel asks."""
    seed = seeds.draw()
    given, grad = list(draw(form, dtype, seed)), gradient(form, dtype, seed)
    if inputs == "sharp":
        given[0] *= 20
    elif inputs == "low":  # the weight of a key of zeros, as those past the last are, is infinite
        given[0], given[1] = 32 * given[0].abs(), -given[1].abs()
    wide = [x if x is None else x.double() for x in given]
    out, kept = truth(form, *wide)
    want = expected(form, wide[0], wide[1], wide[2], grad.double())
    q, k, v = (x.detach().requires_grad_() for x in (given[:3] if given[1] is not None else
                                                     split(form, given[0])))  # fmt: skip
    eager = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    theirs = torch.autograd.grad(eager, (q, k, v), grad.transpose(1, 2))
    with sim.rounded():
        found = launch(
            space, form, tuple(given), grad, out.to(dtype).contiguous(), kept.float(), 1, 0
        )
    for name, *gradients in zip(("dq", "dk", "dv"), found, want, theirs, strict=True):
        row = measure(name, gradients[0].to(dtype), *gradients[1:])
        assert row.passed, row


@pytest.mark.parametrize("dtype", HALVES := (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    ("form", "inputs"),
    [
        (Form(1, 2, 197), "random"),
        (Form(1, 1, 208), "sharp"),
        (Form(1, 2, 50, packed=False), "low"),
        (Form(1, 1, 197, 48, 130, packed=False), "low"),
        (Form(2, 2, 1), "random"),
    ],
    ids=name_of,
)
def test_numerics(form, inputs, dtype):
    check_numerics(space(), form, dtype, inputs)


def test_a_key_past_the_last_would_show():
    broken = sim.load(*FILES, edits=[("PADDED: gl.constexpr = WHICH == HALVES - 1",
                                      "PADDED: gl.constexpr = WHICH == 1")])  # fmt: skip
    with np.errstate(all="ignore"), pytest.raises(AssertionError):
        check_numerics(broken, Form(1, 2, 50, packed=False), torch.bfloat16, "low")


# --------------------------------------------------------------------------- choice


def test_what_is_chosen():
    for n, want in (
        (1, (1, 1, 0)), (50, (1, 1, 0)), (64, (1, 1, 0)), (65, (1, 1, 16)), (81, (1, 2, 0)),
        (129, (2, 2, 16)), (145, (2, 3, 0)), (192, (2, 3, 0)), (197, (2, 3, 16)),
        (208, (2, 3, 16)),
    ):  # fmt: skip
        for dtype in HALVES:
            form = Form(256, 12, n)
            assert choice(form, on_meta(form, dtype))[:3] == want
    form = Form(2, 3, 33, 40, 256, packed=False)
    assert choice(form, on_meta(form, HALF)) == Whole(2, 1, 0)


def test_what_it_cannot_take_has_a_reason():
    def said(form: Form, dtype: torch.dtype = HALF, **others: Any) -> str:
        return choice(form, on_meta(form, dtype), **others)

    assert "torch.float32" in said(Form(2, 2, 197), torch.float32)
    assert "mask" in said(Form(2, 2, 197, mask="bias"))
    assert "head dimension 72 is above 64" in said(Form(2, 2, 197, 72))
    assert "head dimension 44" in said(Form(2, 2, 197, 44))
    assert "209 queries" in said(Form(2, 2, 209))
    assert "257 keys" in said(Form(2, 2, 197, m=257, packed=False))
    assert "not all" in said(Form(2, 2, 197, packed=False), needed=(True, False, True))
    form = Form(2, 2, 197)
    asked, metas = problem(form, *on_meta(form, HALF))
    out = packed(HALF, (2, 197, 2, 64), metas[0].device)
    turned = out._replace(strides=(197 * 128, 1, 64 * 197, 197))
    wide = out._replace(strides=(0, 0, 0, 0))
    assert "output" in backward_choice(asked, metas, out, turned, (True,) * 3)
    for grad in (turned, wide, out._replace(aligned=False)):
        assert "the gradient's rows" in backward_choice(asked, metas, grad, out, (True,) * 3)


def trained(b: int, h: int, n: int, d: int = 64, dtype: torch.dtype = HALF, **options: Any) -> Any:
    """Names of the kernels of a training step's attention, for tensors that nobody wrote."""
    qkv = torch.empty(b, n, 3 * h * d, dtype=dtype, requires_grad=True)
    with recorded() as found:
        y = ops.attention_qkv(qkv, h, **options)
        torch.autograd.grad(y, qkv, torch.empty_like(y))
    return [launch.kernel.fn.__name__ for launch, _ in found], found[1][0]


PORTABLE = ["attention_backward_q_kernel", "attention_backward_kv_kernel"]


@pytest.mark.usefixtures("compiled_path")
def test_a_training_step_of_vit_b_16_takes_it(monkeypatch):
    monkeypatch.setattr(_hopper, "_refused", None)
    for batch in (1, 64, 256):
        kernels, backward = trained(batch, 12, 197)
        assert kernels[1:] == ["attention_backward_kernel"]
        assert backward.programs == min(132, 12 * batch)
        assert backward.tile.backend == "whole"
    assert trained(2, 12, 577)[0][1:] == PORTABLE
    assert trained(2, 12, 197, 72)[0][1:] == PORTABLE
    assert trained(2, 12, 197, dtype=torch.float32)[0][1:] == PORTABLE
    angles = torch.empty(197, 32, dtype=HALF)
    assert trained(2, 12, 197, rope=(angles, angles))[0][-2:] == PORTABLE
    with _device.emulate("sm80"):
        assert trained(2, 12, 197)[0][1:] == PORTABLE
    with _tuning.forced("attention_backward", TileConfig(32, 64)):
        kernels, backward = trained(2, 12, 197)
        assert kernels[1:] == PORTABLE
        assert backward.tile.BLOCK_M == 32


@pytest.mark.usefixtures("triton_path")
def test_where_triton_cannot_compile_it_the_portable_kernels_run(monkeypatch, launched):
    """With one warning, and the gradients are theirs."""
    from triton.errors import TritonError

    from fastvit.kernels.attention import hopper_backward

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            raise TritonError("no registers")

    monkeypatch.setattr(hopper_backward, "attention_backward_kernel", Kernel())
    monkeypatch.setattr(_hopper, "_refused", None)
    qkv = torch.randn(2, 17, 3 * 64, dtype=HALF, requires_grad=True)
    grad = torch.randn(2, 17, 64, dtype=HALF)
    with _tuning.forced("attention", TileConfig(64, 64)):
        y = ops.attention_qkv(qkv, 1)
        (want,) = torch.autograd.grad(y, qkv, grad, retain_graph=True)
        monkeypatch.setattr(hopper_plan, "hopper_problem", lambda device: _hopper._refused)
        _device.forget()
        _backend.warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match="no registers") as told:
            found = [torch.autograd.grad(y, qkv, grad, retain_graph=True)[0] for _ in range(2)]
    assert len(told) == 1
    assert all(torch.equal(x, want) for x in found)
    assert [launch.kernel.fn.__name__ for launch in launched[-2:]] == PORTABLE
