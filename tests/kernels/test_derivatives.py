"""Derivatives of ops in other ways than `backward`: of higher order, in forward mode, by function
transforms, batched. All are those of the reference, to float64's rounding."""

import functools
from typing import Any

import pytest
import torch
from seeds import SEED
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

from fastvit import ops
from fastvit.kernels.specs import all_specs

SPECS = {name: spec for name, spec in all_specs().items() if not spec.inference}

autograd: Any = functools.partial(
    torch.autograd.grad, allow_unused=True, materialize_grads=True, retain_graph=True
)


def weighted(f, xs):
    """A function to one number, of a different gradient at each output."""
    out = f(*xs)
    weight = torch.arange(1.0, out.numel() + 1, dtype=out.dtype).cos().view(out.shape)
    return (out * weight).square().sum()


def leaves(xs):
    return [x.clone().requires_grad_() for x in xs]


def functional(f, xs):
    return jvp(f, xs, tuple(x.cos() for x in xs))


def dual_tensors(f, xs):
    with forward_ad.dual_level():
        out = f(*(forward_ad.make_dual(x, x.cos()) for x in xs))
        return tuple(forward_ad.unpack_dual(out))


def a_dual_tensor(f, xs):
    with forward_ad.dual_level():
        out = f(forward_ad.make_dual(xs[0], xs[0].cos()), *xs[1:])
        return tuple(forward_ad.unpack_dual(out))


def gradient(f, xs):
    return grad(lambda *xs: weighted(f, xs), argnums=tuple(range(len(xs))))(*xs)


def samples(f, xs):
    batch = [torch.stack((x, x * 1.1, -x)) for x in xs]
    return vmap(lambda *xs: gradient(f, xs))(*batch)


def hessian_product(f, xs):
    """Forward mode over reverse mode."""
    return jvp(lambda *xs: gradient(f, xs), xs, tuple(x.cos() for x in xs))


def rows(f, xs):
    return jacrev(lambda x: f(x, *xs[1:]).flatten()[-3:])(xs[0])


def vectorized(f, xs):
    return jacobian(lambda *xs: f(*xs).flatten()[-3:], xs, vectorize=True)


def batched(f, xs):
    xs = leaves(xs)
    out = f(*xs)
    return autograd(out, xs, torch.stack((out.detach(), out.detach().cos())), is_grads_batched=True)


def mapped(f, xs):
    xs = leaves(xs)
    out = f(*xs)
    return vmap(lambda g: autograd(out, xs, g))(torch.stack((out.detach(), out.detach().cos())))


def third_order(f, xs):
    xs = leaves(xs)
    first = autograd(weighted(f, xs), xs, create_graph=True)
    second = autograd(sum(g.square().sum() for g in first), xs, create_graph=True)
    return first, second, autograd(sum(g.sin().sum() for g in second), xs)


def penalty_of_batched(f, xs):
    xs = leaves(xs)
    out = f(*xs)
    twice = torch.stack((out.detach(), out.detach().cos()))
    first = autograd(out, xs, twice, is_grads_batched=True, create_graph=True)
    return autograd(sum(g.square().sum() for g in first), xs)


def penalty_of_functional(f, xs):
    """Autograd around a function transform."""
    xs = leaves(xs)
    return autograd(sum(g.square().sum() for g in gradient(f, xs)), xs)


WAYS = [
    functional, dual_tensors, a_dual_tensor, gradient, samples, hessian_product, rows, vectorized,
    batched, mapped, third_order, penalty_of_batched, penalty_of_functional,
]  # fmt: skip


def case(spec):
    """Functions of the floating inputs of the smallest case, for the op and its reference."""
    smallest = min(spec.cases[1:], key=lambda case: spec.bytes(case.sizes, 4))
    inputs = spec.inputs(smallest, torch.float64, seed=SEED)
    names = [
        name for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "row_scale"
    ]  # fmt: skip

    def of(function):
        return lambda *xs: function(**{**inputs, **dict(zip(names, xs, strict=True))})

    return of(spec.op), of(spec.reference), tuple(inputs[name] for name in names)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # SDPA on a CPU, under vmap
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_as_the_reference(triton_path, spec, way):
    ours, reference, xs = case(spec)
    found = tree_leaves(way(ours, xs))
    with ops.backend("torch"):
        expected = tree_leaves(way(reference, xs))
    assert any(x.abs().max() > 0 for x in expected)
    for a, b in zip(found, expected, strict=True):
        # products of up to three derivatives, each a few thousand roundings of 1e-16
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("transform", [gradient, functional, samples])
def test_compiles_within_a_transform(triton_path, transform):
    ours, _, xs = case(SPECS["norm_linear"])
    torch.compiler.reset()
    compiled = torch.compile(lambda *xs: transform(ours, xs), fullgraph=True, backend="aot_eager")(
        *xs
    )
    torch.testing.assert_close(compiled, transform(ours, xs))


def test_kernels_run_where_no_argument_has_a_tangent(triton_path, launched):
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with forward_ad.dual_level():
        ops.linear(x, weight)
        assert len(launched) == 1
        ops.linear(forward_ad.make_dual(x, x), weight)
        assert len(launched) == 1


def test_a_penalty_under_autocast(triton_path):
    """What the op's rule has cast is not cast again in the backward."""
    x, weight = torch.randn(4, 16), torch.randn(8, 16)
    found = []
    for linear in (ops.linear, torch.nn.functional.linear):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = linear(leaf, weight)
            (first,) = autograd(out.float().square().sum(), leaf, create_graph=True)
            (second,) = autograd(first.square().sum(), leaf)
        found.append((out, first, second))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        # three roundings to 8 bits
        torch.testing.assert_close(
            a.float(), b.float(), rtol=0.03, atol=0.03 * b.abs().max().item()
        )
