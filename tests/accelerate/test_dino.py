"""`accelerate` on DINO's and DINOv2's own classes. Their repositories are on no package index:
``stand_ins/`` has classes of the same names, signatures and arithmetic, written for these tests."""

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from timm_models import TOLERANCE, Doubled, classes, error, reseed
from torch import Tensor

from fastvit.accelerate import accelerate, explain, restore
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.plan import make_plan
from fastvit.numerics import measure, randomise

STAND_INS = Path(__file__).parents[1] / "helpers" / "stand_ins"


@pytest.fixture(autouse=True)
def repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.hub does it."""
    monkeypatch.syspath_prepend(str(STAND_INS))


def dinov2(**options: Any) -> Any:
    reseed()
    module = importlib.import_module("dinov2.models.vision_transformer")
    model = module.DinoVisionTransformer(**options).eval()
    randomise(model, 1)
    return model


def dino(**options: Any) -> Any:
    reseed()
    model = importlib.import_module("vision_transformer").VisionTransformer(**options).eval()
    randomise(model, 1)
    return model


MODELS = {
    "dino": dino,
    "dinov2": dinov2,
    "registers": lambda **options: dinov2(registers=2, **options),
    "block": lambda **options: dinov2(nested=False, scaled=False, **options),
    "swiglu": lambda **options: dinov2(swiglu=True, **options),
}


def images(model: Any) -> Tensor:
    size = 4 * model.patch_embed.proj.kernel_size[0]
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_same_output_gradients_and_restore(make):
    model = make()
    twin, before, x = copy.deepcopy(model), classes(model), images(model)
    accelerate(model, strict=True)
    plan = make_plan(model, find_parts(model))
    assert plan.fused_blocks == ["blocks.0", "blocks.1"]
    assert plan.fully_fused
    theirs, ours = twin(x), model(x)
    assert error(ours, theirs) <= TOLERANCE
    theirs.square().mean().backward()
    ours.square().mean().backward()
    largest = max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert b.grad is None or float((a.grad - b.grad).abs().max()) <= TOLERANCE * largest
    assert classes(restore(model)) == before
    assert torch.equal(model(x), theirs)


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_training_draws_the_same_random_numbers(name):
    options = {"drop": 0.3, "drop_path": 0.3} if name == "dino" else {"drop": 0.3}
    model = MODELS[name](**options).train()
    twin, x = copy.deepcopy(model), images(model)
    accelerate(model)
    outputs = []
    for each in (twin, model, model):
        torch.manual_seed(7 if len(outputs) < 2 else 8)
        outputs.append(each(x))
    assert error(outputs[1], outputs[0]) <= TOLERANCE
    assert error(outputs[2], outputs[0]) > 100 * TOLERANCE


def test_sample_drop_in_training_is_the_repositorys():
    model = dinov2(drop_path=0.4).train()
    twin, x = copy.deepcopy(model), images(model)
    accelerate(model)
    torch.manual_seed(7)
    theirs = twin(x)
    torch.manual_seed(7)
    assert error(model(x), theirs) <= TOLERANCE


def test_attention_maps_and_lists_of_images():
    model = dino()
    theirs = model.get_last_selfattention(images(model))
    x = images(model)
    theirs = model.get_last_selfattention(x)
    assert error(accelerate(model).get_last_selfattention(x), theirs) <= TOLERANCE
    block = dinov2().blocks[0]
    tokens = [torch.randn(1, 5, 32), torch.randn(1, 9, 32)]
    theirs = block(tokens)
    for ours, wanted in zip(accelerate(block)(tokens), theirs, strict=True):
        assert error(ours, wanted) <= TOLERANCE


def test_hooks_and_replaced_layers():
    model = dinov2()
    x = images(model)
    accelerate(model)
    seen = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    model.blocks[1].attn.proj = Doubled(model.blocks[1].attn.proj)
    theirs = restore(copy.deepcopy(model))(x)
    seen.clear()
    assert error(model(x), theirs) <= TOLERANCE
    assert seen == [1]
    reasons = [str(row.reason) for row in explain(model).rows if not row.fused]
    assert ["hook" in reasons[0], "Doubled" in reasons[1]] == [True, True]


def test_a_copy_with_another_forward_is_left(monkeypatch):
    block = importlib.import_module("dinov2.layers.block").Block

    def forward(self: Any, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return x

    monkeypatch.setattr(block, "forward", forward)
    model = dinov2(nested=False)
    plan = make_plan(model, find_parts(model))
    assert plan.left_blocks == ["blocks.0", "blocks.1"]
    assert {row.reason for row in plan.rows if row.block} == {"its forward takes x, pos"}


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_pickles(name):
    model = accelerate(MODELS[name]())
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin.blocks[0]) is type(model.blocks[0])
    x = images(model)
    assert torch.equal(twin(x), model(x))


def test_compile():
    model = dinov2(registers=2)
    x = images(model)
    theirs = model(x)
    compiled = torch.compile(accelerate(model), fullgraph=True, backend="aot_eager")
    assert error(compiled(x), theirs) <= TOLERANCE


def test_triton_path(triton_path):
    model = dinov2(swiglu=True, depth=1)
    x = images(model)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        plain = copy.deepcopy(model)(x)
        row = measure("features", accelerate(model)(x), truth, plain)
    assert row.passed, row


def test_an_embedded_backbone():
    """As a detector or a probe holds it."""
    model = torch.nn.Sequential(dinov2(), torch.nn.Linear(32, 3))
    x = images(model[0])
    theirs = model(x)
    assert error(accelerate(model, strict=True)(x), theirs) <= TOLERANCE
