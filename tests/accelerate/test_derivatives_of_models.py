"""Users' other derivatives than `backward`'s, of accelerated models: those of the library's own,
to float64's rounding."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from library_models import GATED, LIBRARIES, OTHERS, Case
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from fastvit import ops
from fastvit.accelerate import accelerate
from fastvit.check.families import tensors

ALL = {**LIBRARIES, **GATED, **OTHERS}


def in_float64(case: Case) -> Case:
    return Case(case.model.double(), tree_map(lambda x: x.double(), case.inputs))


def spelled_out(case: Case) -> Case:
    """As libraries say to get derivatives that PyTorch's fused attention has not."""
    for module in case.model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if isinstance(module, torch.nn.MultiheadAttention):
            module.train()  # in eval mode it may take a way without tangents
    if hasattr(case.model, "set_attn_implementation"):
        case.model.set_attn_implementation("eager")
    return case


def loss(case: Case, model: Any, weights: Any, x: Tensor) -> Tensor:
    given: Any = ((x,),)
    if not isinstance(case.inputs, Tensor):
        given = (), {**case.inputs, "pixel_values": x}
    return tensors(functional_call(model, weights, *given))[0].square().mean()


def private_training(case: Case, model: Any) -> Any:
    """A gradient for each image."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def one(weights: Any, x: Tensor) -> Tensor:
        return loss(case, model, weights, x[None])

    return vmap(grad(one), in_dims=(None, 0))(weights, case.images)


def tangents(case: Case, model: Any) -> Any:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    given = (weights, case.images)
    along = ({name: p.cos() for name, p in weights.items()}, case.images.cos())
    return jvp(lambda weights, x: loss(case, model, weights, x), given, along)


def dual_images(case: Case, model: Any) -> Any:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(case.images, case.images.cos())
        return tuple(forward_ad.unpack_dual(loss(case, model, {}, x)))


def curvature(case: Case, model: Any) -> Any:
    """A product with the Hessian, forward mode over reverse mode."""
    x = case.images
    return jvp(grad(lambda x: loss(case, model, {}, x)), (x,), (x.cos(),))


def rows_at_once(case: Case, model: Any) -> Any:
    def both(x: Tensor) -> Tensor:
        return torch.stack([loss(case, model, {}, x), loss(case, model, {}, 2 * x)])

    return jacobian(both, case.images, vectorize=True)


def gradient_penalty(case: Case, model: Any) -> Any:
    model.zero_grad()
    x = case.images.clone().requires_grad_()
    value = loss(case, model, {}, x)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (value + first.square().sum()).backward()
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


TRANSFORMS = [private_training, tangents, dual_images, curvature]
MODELS = ["timm", "timm, things", "transformers", "torchvision", "dinov2"]


def assert_as_the_librarys(name: str, way: Any) -> None:
    case = spelled_out(in_float64(ALL[name]()))
    twin = copy.deepcopy(case.model)
    accelerate(case.model)
    # torchvision's way out is PyTorch's own
    out = sdpa_kernel(SDPBackend.MATH) if name == "torchvision" else contextlib.nullcontext()
    with out:
        ours, theirs = way(case, case.model), way(case, twin)
    ours, theirs = tree_leaves(ours), tree_leaves(theirs)
    largest = max(b.abs().max().item() for b in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * largest)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # SDPA on a CPU, under vmap
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("way", TRANSFORMS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_function_transforms(backend, name, way):
    with ops.backend(backend):
        assert_as_the_librarys(name, way)


@pytest.mark.parametrize("way", [rows_at_once, gradient_penalty], ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "torch") for name in MODELS),
        # on kernels, in the interpreter
        *(pytest.param(name, "auto", marks=pytest.mark.slow) for name in MODELS),
    ],
)
def test_of_what_autograd_recorded(backend, name, way):
    with ops.backend(backend):
        assert_as_the_librarys(name, way)
