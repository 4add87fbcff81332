"""A whole ViT through the kernels, in the interpreter, against timm by the numerics policy; and
faults planted in the kernels' arguments, each of which it catches."""

import copy
import time

import pytest
import timm
import torch
from timm_models import randomise

import fastvit
from fastvit import numerics
from fastvit.kernels import _library

SEED = int(time.time())  # fresh each run; a failure prints it


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
    if "SCALE" in arguments:
        arguments["SCALE"] *= 1.1


def swapped_layer_scale(arguments):
    if arguments.get("scale_ptr") is not None:
        arguments["scale_ptr"] = arguments["scale_ptr"].flip(0)


def missing_bias(arguments):
    if arguments.get("scale_ptr") is not None:
        arguments["bias_ptr"] = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("fault", [wrong_softmax_scale, swapped_layer_scale, missing_bias])
def test_a_fault_in_a_launch_is_caught(vit, dtype, fault, triton_path, monkeypatch):
    calls = []

    def launch(kernel, programs, tile, **arguments):
        before = dict(arguments)
        fault(arguments)
        calls.extend(name for name in before if arguments[name] is not before[name])
        _library.launch(kernel, programs, tile, **arguments)

    for room in ("attention.forward", "linear.op", "layer_norm.op", "patch_embed.op"):
        monkeypatch.setattr(f"fastvit.kernels.{room}.launch", launch)
    row = check(vit, dtype)
    assert calls
    assert not row.passed, f"seed {SEED}: {row}"
