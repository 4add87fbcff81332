"""Rotary positions before Hopper's attention: q and k turned by a kernel of their own."""

from __future__ import annotations

from typing import Any

import pytest
import seeds
import torch

from fastvit import ops
from fastvit.check.launches import recorded
from fastvit.kernels import _backend, _device, _hopper, _tuning
from fastvit.kernels._backend import describe
from fastvit.kernels._tuning import TileConfig
from fastvit.kernels.attention import hopper_plan
from fastvit.kernels.attention.hopper_plan import HALF
from fastvit.kernels.attention.launch import Options, prepare, run
from fastvit.kernels.attention.reference import attention_reference, rotate, unpack
from fastvit.numerics import measure

SEED = seeds.SEED
# B, H, N, d, tokens that turn, tables of each head, channels i and i + d/2, q k v apart
FORMS = (
    (2, 2, 21, 64, 16, False, True, False),
    (1, 3, 70, 72, 70, True, False, False),
    (2, 1, 65, 40, 60, False, False, True),
)


def tensors(form: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    b, h, n, d, turning, by_head, _, apart = form
    g = torch.Generator().manual_seed(SEED)
    angle = torch.randn(*(h,) * by_head, turning, d // 2, generator=g) * 5
    qkv = torch.randn(b, n, 3 * h * d, generator=g).to(dtype)
    q, k, v = map(torch.Tensor.contiguous, unpack(qkv, h)) if apart else (qkv, None, None)
    return q, k, v, None, angle.cos().to(dtype), angle.sin().to(dtype), None


def prepared(form: Any, given: tuple[Any, ...]) -> Any:
    options = Options(form[1], 0, form[3] ** -0.5, half=form[6])
    return prepare(*describe(*given), *options, "highest")


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", FORMS)
def test_q_and_k_are_turned_within_the_policy_and_attention_of_them_is_right(
    form, dtype, monkeypatch
):
    """With the kernel that spares Hopper's in its place, which reads the same tensors."""
    monkeypatch.setattr(hopper_plan, "HEADS_AT_ONCE", 0)  # heads are never few
    monkeypatch.setattr(_hopper, "_refused", None)
    given = tensors(form, dtype)
    with recorded():
        found = prepared(form, given)
    _backend.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="portable kernels"):
        spare = found.launch.spare(ValueError("no registers"))
    q, k, v, *_ = found.turn(*given)
    out = run(found._replace(launch=spare), *given)

    wide: Any = tuple(None if x is None else x.double() for x in given)
    exact, eager = (x[:3] if form[-1] else unpack(x[0], form[1]) for x in (wide, given))
    truth, yardstick = (
        attention_reference(x[0], x[1], x[2], rope=tables, rotate_half=form[6])
        for x, tables in ((exact, wide[4:6]), (eager, given[4:6]))
    )
    assert torch.equal(v, eager[2])
    rows = [measure("output", out.view(q.shape).transpose(1, 2), truth, yardstick)]
    for at, ours in enumerate((q, k)):
        truth = rotate(exact[at], wide[4], wide[5], form[6])
        yardstick = rotate(eager[at], given[4], given[5], form[6])
        rows.append(measure("qk"[at], ours.transpose(1, 2), truth, yardstick))
    assert all(row.passed for row in rows), rows


def test_who_is_turned():
    """Where Hopper's kernels are chosen, and the table can say no."""

    def kernels(form: Any) -> list[str]:
        b, *rest = form
        q, *others = tensors((1, *rest), torch.bfloat16)
        q = q.expand(b, *q.shape[1:]).contiguous()
        with recorded() as launches:
            ops.attention_qkv(q, form[1], rope=tuple(others[3:5]), rotate_half=form[6])
        return [launched.kernel.fn.__name__ for launched, _ in launches]

    many, few = ((b, 12, 201, 64, 196, False, True, False) for b in (64, 1))
    assert kernels(many) == ["turn_kernel", "attention_roles_kernel"]
    assert kernels(few) == ["attention_kernel"]
    with _device.emulate("sm80"):
        assert kernels(many) == ["attention_kernel"]
    with _tuning.forced("attention", TileConfig(64, 64)):
        assert kernels(many) == ["attention_kernel"]
