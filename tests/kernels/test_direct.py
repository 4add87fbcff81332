"""Calls that go straight to their kernels: the same bits as through PyTorch's dispatcher, and only
where the dispatcher has nothing to do."""

import contextlib

import pytest
import torch
from seeds import SEED
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastvit import ops
from fastvit.kernels._register import OPS
from fastvit.kernels.specs import all_specs

# the lengths of packed images are checked, where they are at hand, at each call
SPECS = {name: spec for name, spec in all_specs().items() if name != "attention_packed"}


class Subclass(torch.Tensor):
    """As FSDP's and quantisers' tensors are."""


@pytest.fixture
def registered(triton_path, monkeypatch):
    """Counts the calls that go through the dispatcher."""
    calls = []
    kind = type(OPS["linear"])
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda op, *args: calls.append(op) or call(op, *args))
    return calls


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_same_bits_as_through_the_dispatcher(registered, spec):
    for case in sorted(spec.cases, key=lambda case: spec.bytes(case.sizes, 4))[:4]:
        inputs = spec.inputs(case, spec.dtypes[0], seed=SEED)
        straight = spec.op(**inputs)
        assert registered == []
        with FlopCounterMode(display=False):
            other = spec.op(**inputs)
        assert len(registered) == 1
        registered.clear()
        assert straight.dtype == other.dtype
        assert straight.stride() == other.stride()
        assert torch.equal(straight.float(), other.float())


def linear(x):
    return ops.linear(x, torch.ones(4, 8))


STRAIGHT = {
    "no gradient": contextlib.nullcontext,
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}
DISPATCHED = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a dispatch mode": lambda: FlopCounterMode(display=False),
    "a function mode": BaseTorchFunctionMode,
    "a profiler": torch.profiler.profile,
    "forward-mode gradients": forward_ad.dual_level,
}


@pytest.mark.parametrize("context", STRAIGHT.values(), ids=STRAIGHT)
def test_straight_within(registered, context):
    with context():
        linear(torch.ones(2, 8))
    assert registered == []


@pytest.mark.parametrize("context", DISPATCHED.values(), ids=DISPATCHED)
def test_dispatched_within(registered, context):
    with context():
        linear(torch.ones(2, 8))
    assert len(registered) == 1


def test_dispatched_for_a_gradient(registered):
    x = torch.ones(2, 8, requires_grad=True)
    linear(x).sum().backward()
    assert len(registered) == 1
    with torch.no_grad():
        linear(x)
    assert len(registered) == 1


def test_dispatched_for_a_subclass(registered):
    linear(torch.ones(2, 8).as_subclass(Subclass))
    assert len(registered) == 1


def test_dispatched_under_function_transforms(registered):
    x = torch.ones(3, 2, 8)
    y = torch.func.functionalize(linear)(x)
    assert len(registered) == 1
    torch.testing.assert_close(y, linear(x))


def test_dispatched_while_compiling(registered):
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(torch.ones(2, 8)), torch.full((2, 4), 8.0))
    assert not any(op is None for op in registered)


def test_plain_pytorch_is_none_of_both(registered):
    with ops.backend("torch"):
        linear(torch.ones(2, 8))
    assert registered == []


def test_bad_input_is_refused_once_and_again(registered):
    """What `prepare` refuses it does not keep."""
    for _ in range(2):
        with pytest.raises(ValueError, match="8"):
            ops.linear(torch.ones(2, 7), torch.ones(4, 8))
