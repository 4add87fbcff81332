"""A whole ViT through the kernels, in the interpreter, against timm by the numerics policy; and
faults planted in the kernels' arguments, each of which it catches."""

import copy

import pytest
import timm
import torch
from seeds import SEED
from timm_models import randomise

import fastvit
from fastvit import numerics
from fastvit.kernels import _launch


@pytest.fixture(scope="module")
def vit():
    """Two blocks of ViT-Ti/16 with LayerScale and 17 tokens, every vector random."""
    torch.manual_seed(SEED)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, init_values=0.1, num_classes=10
    )
    randomise(model)
    return model.eval()


def check(vit, dtype) -> numerics.Row:
    """The logits of the accelerated model in `dtype` by the policy."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    eager = copy.deepcopy(vit).to(dtype)
    fast = fastvit.accelerate(copy.deepcopy(eager), strict=True)
    with torch.inference_mode():
        with fastvit.ops.backend("torch"):
            truth = copy.deepcopy(eager).double()(images.double())
            plain = eager(images)
        return numerics.measure("logits", fast(images), truth, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_whole_vit_passes_the_policy(vit, dtype, triton_path):
    row = check(vit, dtype)
    assert row.passed, f"seed {SEED}: {row}"


def wrong_softmax_scale(arguments):
    if "FORM" in arguments:
        form = arguments["FORM"]
        arguments["FORM"] = form._replace(scale=form.scale * 1.1)


def swapped_layer_scale(arguments):
    out = arguments.get("out")
    if getattr(out, "scale", None) is not None:
        arguments["out"] = out._replace(scale=out.scale.flip(0))


def missing_bias(arguments):
    out = arguments.get("out")
    if getattr(out, "scale", None) is not None:
        arguments["out"] = out._replace(bias=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("fault", [wrong_softmax_scale, swapped_layer_scale, missing_bias])
def test_a_fault_in_a_launch_is_caught(vit, dtype, fault, triton_path, monkeypatch):
    changed = []

    def launch(prepared, tensors):
        given = dict(zip(prepared.kernel.arg_names, prepared.for_triton(*tensors), strict=True))
        before = dict(given)
        fault(given)
        changed.extend(name for name, value in before.items() if given[name] is not value)
        prepared.kernel[(prepared.programs,)](**given)

    monkeypatch.setattr(_launch, "_run_first", launch)
    row = check(vit, dtype)
    assert changed
    assert not row.passed, f"seed {SEED}: {row}"
