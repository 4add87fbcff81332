"""timm's ViT families through the kernels, in the interpreter, by the numerics policy: one
architecture for every value of the axes of test_accelerate_families.py."""

import copy

import pytest
import torch
from test_accelerate_families import ARCHITECTURES
from timm_models import TOLERANCE, error, reseed

from fastvit import numerics
from fastvit.accelerate import accelerate
from fastvit.check.models import build_small
from fastvit.kernels import _backend

# grouped queries and rotary; relative bias; post-norm; differential and parallel
QUICK = [
    "vit_5b_patch16_sapiens2",
    "beit_base_patch16_224",
    "vit_base_patch16_rpn_224",
    "vit_dpwee_patch16_reg1_gap_256",
]
CASES = [(name, torch.float32, False) for name in QUICK] + [
    pytest.param(name, dtype, True, marks=pytest.mark.slow)  # some ten seconds each
    for name in ARCHITECTURES
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("name", "dtype", "backward"), CASES)
def test_the_numerics_policy(name, dtype, backward, triton_path):
    seed = reseed()
    eager, images = build_small(name, seed=seed, num_classes=10)
    if isinstance(images, dict):  # NaFlex: whole images here, patches below
        images = torch.randn(2, 3, 32, 48)
    eager, images = eager.to(dtype), images.to(dtype)
    # not differential attention's lambdas: their gradients are one sum each times a vector, and the
    # ratio of two roundings of one number is luck
    names = [
        name
        for name, _ in eager.named_parameters()
        if name.startswith("blocks.0") and "lambda" not in name
    ]
    fast = accelerate(copy.deepcopy(eager))
    gradients = [names[0], names[len(names) // 2], names[-1]] if backward else []
    report = numerics.compare_models(fast, eager, images, gradients=gradients, seed=seed)
    assert report.passed, report


def test_padded_patches(triton_path):
    """All tokens: those of the padding see none but lowest scores, which leave a plain average."""
    model, batch = build_small("naflexvit_so400m_patch16_siglip", seed=reseed())
    fast = accelerate(copy.deepcopy(model))
    with torch.no_grad():
        with _backend.backend("torch"):
            theirs = model.forward_features(**batch)["patches"]
        assert error(fast.forward_features(**batch)["patches"], theirs) <= TOLERANCE
