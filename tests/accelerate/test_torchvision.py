"""`accelerate` on torchvision's ViTs. Its own tests store the logits of models as they are made,
whose classifiers are zero, so that any model that runs has them (one test here); in the others
every parameter is drawn at random and torchvision itself is the reference."""

import copy
import pickle
from typing import Any

import pytest
import torch
from timm_models import TOLERANCE, Doubled, classes, error, reseed
from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from fastvit.accelerate import accelerate, explain, restore
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.plan import make_plan
from fastvit.numerics import measure, randomise

NAMES = ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"]


def small(**options: Any) -> Any:
    reseed()
    size: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2}
    size |= {"hidden_dim": 32, "mlp_dim": 64, "num_classes": 5}
    model = VisionTransformer(**{**size, **options}).eval()
    randomise(model, int(torch.randint(2**31, ()).item()))
    return model


IMAGES = torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_fused(name):
    with torch.device("meta"):
        model = models.get_model(name, num_classes=2)
    plan = make_plan(model, find_parts(model))
    assert plan.fully_fused
    assert len(plan.fused_blocks) == {"b": 12, "l": 24, "h": 32}[name[4]]


def test_the_logits_that_torchvision_stores():
    torch.manual_seed(0)
    model = models.vit_b_32(num_classes=50).eval()
    with torch.no_grad():
        assert accelerate(model, strict=True)(torch.rand(1, 3, 224, 224)).count_nonzero() == 0


def test_a_whole_architecture():
    """ViT-B/32 at 64 pixels, by the way in which users build it."""
    reseed()
    model: Any = models.vit_b_32(image_size=64)
    del model.encoder.layers[2:]
    randomise(model.eval(), 0)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs = model(x)
        assert error(accelerate(model, strict=True)(x), theirs) <= TOLERANCE


OPTIONS = {
    "plain": {},
    "pre_logits": {"representation_size": 24},
    "another_norm": {"norm_layer": nn.LayerNorm},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_output_gradients_and_restore(options):
    model = small(**options)
    twin, before = copy.deepcopy(model), classes(model)
    state = dict(model.state_dict(keep_vars=True))
    accelerate(model, strict=True)
    theirs, ours = twin(IMAGES), model(IMAGES)
    assert error(ours, theirs) <= TOLERANCE
    theirs.square().mean().backward()
    ours.square().mean().backward()
    largest = max(float(p.grad.abs().max()) for p in twin.parameters())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert float((a.grad - b.grad).abs().max()) <= TOLERANCE * largest
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is state[key] for key in state)
    assert classes(restore(model)) == before
    assert torch.equal(model(IMAGES), theirs)


def test_training_draws_the_same_random_numbers():
    """For one image: torch's MultiheadAttention gives its result with tokens before images in
    memory, and dropout draws in the order of memory."""
    model = small(dropout=0.3, attention_dropout=0.2).train()
    twin = copy.deepcopy(model)
    accelerate(model)
    outputs = []
    for each in (twin, model, model):
        torch.manual_seed(7 if len(outputs) < 2 else 8)
        outputs.append(each(IMAGES[:1]))
    assert error(outputs[1], outputs[0]) <= TOLERANCE
    assert error(outputs[2], outputs[0]) > 100 * TOLERANCE


def test_precision():
    model = small()
    with torch.no_grad():
        theirs = model(IMAGES)
        ours = accelerate(model, precision="bf16")(IMAGES)
    assert ours.dtype == torch.float32
    assert TOLERANCE < error(ours, theirs) <= 0.05  # bfloat16 has 8 bits


def test_cuda_graphs_change_nothing_without_a_gpu():
    model = small()
    with torch.no_grad():
        theirs = model(IMAGES)
        assert error(accelerate(model, cuda_graphs=True)(IMAGES), theirs) <= TOLERANCE
    assert "on cpu" in str(explain(model).graphs)


def test_errors_are_seen():
    model = small()
    with torch.no_grad():
        theirs = model(IMAGES)
        accelerate(model).encoder.pos_embedding.mul_(1.1)
        assert error(model(IMAGES), theirs) > 100 * TOLERANCE


@pytest.mark.parametrize("what", ["ln_1", "mlp", "self_attention", "conv_proj", "encoder"])
def test_hooks_are_called(what):
    model = small()
    accelerate(model)
    place = {"conv_proj": model.conv_proj, "encoder": model.encoder}
    seen = []
    module = place.get(what) or getattr(model.encoder.layers[0], what)
    with torch.no_grad():
        theirs = restore(copy.deepcopy(model))(IMAGES)
        module.register_forward_hook(lambda *_: seen.append(what))
        assert error(model(IMAGES), theirs) <= TOLERANCE
    assert seen == [what]


def test_a_replaced_layer_runs():
    model = small()
    accelerate(model)
    block = model.encoder.layers[1]
    block.mlp[3] = Doubled(block.mlp[3])
    with torch.no_grad():
        theirs = restore(copy.deepcopy(model))(IMAGES)
        assert error(model(IMAGES), theirs) <= TOLERANCE
    reasons = {row.module: row.reason for row in explain(model).rows if not row.fused}
    assert reasons == {"encoder.layers.encoder_layer_1": "mlp.3 is Doubled; fused is Linear"}


def test_a_stem_of_convolutions():
    conv = models.vision_transformer.ConvStemConfig
    model = small(conv_stem_configs=[conv(8, 3, 2), conv(16, 3, 2), conv(16, 3, 2)])
    model.patch_size = 8
    with torch.no_grad():
        theirs = model(IMAGES)
        assert error(accelerate(model)(IMAGES), theirs) <= TOLERANCE
    assert len(explain(model).fused_blocks) == 2


def test_a_wrong_image_size_is_torchvisions_error():
    with pytest.raises(AssertionError, match="Wrong image height"):
        accelerate(small())(torch.randn(1, 3, 40, 32))


def test_resized_weights():
    """What `interpolate_embeddings` gives for another size."""
    model, larger = small(), small(image_size=48)
    state = interpolate_embeddings(48, 8, model.state_dict())  # type: ignore[arg-type]
    larger.load_state_dict(state)
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        theirs = larger(x)
        assert error(accelerate(larger)(x), theirs) <= TOLERANCE


def test_pickles_compile_and_export():
    model = small()
    with torch.no_grad():
        theirs = model(IMAGES)
        accelerate(model)
        assert error(pickle.loads(pickle.dumps(model))(IMAGES), theirs) <= TOLERANCE
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert error(compiled(IMAGES), theirs) <= TOLERANCE
        exported = torch.export.export(model, (IMAGES,), strict=False).module()
        assert error(exported(IMAGES), theirs) <= TOLERANCE


def test_triton_path(triton_path):
    model = small(num_layers=1)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(IMAGES.double())
        plain = copy.deepcopy(model)(IMAGES)
        row = measure("logits", accelerate(model)(IMAGES), truth, plain)
    assert row.passed, row
