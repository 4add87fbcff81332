"""`accelerate` on transformers in use: hooks, replaced layers, options, models in parts."""

import copy
from typing import Any

import pytest
import torch
from timm_models import TOLERANCE, Doubled, classes, error, reseed
from torch import nn
from transformers import AttentionInterface, CLIPConfig, CLIPModel, ViTModel
from transformers_models import (
    build,
    eager,
)

from fastvit import numerics
from fastvit.accelerate import accelerate, explain, restore
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.plan import make_plan


def test_hooks_of_the_user_are_called():
    model, inputs = build("ViT")
    accelerate(model)
    seen = []
    layer = model.vit.layers[1]
    handle = layer.mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    layer.register_forward_hook(lambda *_: seen.append("layer"))
    with torch.no_grad():
        theirs = eager(restore(copy.deepcopy(model)))(**inputs).logits
        seen.clear()
        assert error(model(**inputs).logits, theirs) <= TOLERANCE
        assert seen == ["mlp", "layer"]
        assert explain(model).left_blocks == ["vit.layers.1"]
        handle.remove()
        assert explain(model).left_blocks == []
        model(**inputs)
    assert seen[2:] == ["layer"]


def test_a_hook_on_the_attention_and_maps_at_once():
    """The user's hook sends the layer to transformers' forward, which has no maps with sdpa."""
    model, inputs = build("ViT")
    reference = eager(model)
    accelerate(model)
    seen = []
    model.vit.layers[0].attention.register_forward_hook(lambda *_: seen.append("attention"))
    with torch.no_grad():
        ours = model(**inputs, output_attentions=True).attentions
        theirs = reference(**inputs, output_attentions=True).attentions
    assert seen
    assert [error(a, b) <= TOLERANCE for a, b in zip(ours, theirs, strict=True)] == [True, True]


REPLACEMENTS = {
    "linear": lambda layer: setattr(layer.mlp, "fc1", Doubled(layer.mlp.fc1)),
    "norm": lambda layer: setattr(layer, "norm1", nn.RMSNorm(32)),
    "layer_scale": lambda layer: setattr(layer, "layer_scale1", Doubled(layer.layer_scale1)),
    "activation": lambda layer: setattr(layer.mlp, "activation_fn", nn.Tanh()),
    "function": lambda layer: (
        layer.mlp._modules.pop("activation_fn"),
        setattr(layer.mlp, "activation_fn", torch.tanh),
    ),
    "forward": lambda layer: setattr(layer.attention, "forward", lambda h, **_: (2 * h, None)),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_a_replaced_layer_runs(replace, after):
    model, inputs = build("Dinov2")
    reference = copy.deepcopy(model)
    replace(reference.dinov2.encoder.layer[1])
    if after:
        accelerate(model)
    replace(model.dinov2.encoder.layer[1])
    accelerate(model)
    with torch.no_grad():
        theirs = reference(**inputs).logits
        assert error(model(**inputs).logits, theirs) <= TOLERANCE
    assert explain(model).left_blocks == ["dinov2.encoder.layer.1"]


def test_an_attention_of_the_users_own_runs():
    def doubled(module, query, key, value, mask, **_):
        return 2 * value.transpose(1, 2), None

    AttentionInterface.register("doubled", doubled)
    model, inputs = build("ViT")
    accelerate(model)
    model.set_attn_implementation("doubled")
    with torch.no_grad():
        theirs = restore(copy.deepcopy(model))(**inputs).logits
        assert error(model(**inputs).logits, theirs) <= TOLERANCE
    assert "'doubled'" in str(explain(model).rows[1].reason)


def test_the_text_tower_is_left_alone():
    reseed()
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size["intermediate_size"] = 64
    config = CLIPConfig(
        text_config=size | {"vocab_size": 20, "max_position_embeddings": 8},
        vision_config=size | {"image_size": 32, "patch_size": 8},
    )
    model: Any = CLIPModel(config).eval()
    numerics.randomise(model, 0)
    inputs: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 32, 32)}
    inputs["input_ids"] = torch.randint(1, 19, (2, 6))
    inputs["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        theirs = model(**inputs)
        text = classes(model.text_model)
        accelerate(model, strict=True)
        assert classes(model.text_model) == text
        assert error(model(**inputs).logits_per_image, theirs.logits_per_image) <= TOLERANCE
    assert explain(model).fused_blocks == ["vision_model.encoder.layers.0"]


def test_options_that_need_another_library():
    model, _ = build("ViT")
    before = classes(model)
    with pytest.raises(ValueError, match="cuda_graphs"):
        accelerate(model, cuda_graphs=True)
    with pytest.raises(ValueError, match="precision"):
        accelerate(model, precision="bf16")
    assert classes(model) == before


def test_a_bare_model_and_a_head_dimension_that_is_too_wide():
    model: Any = ViTModel(build("ViT", hidden_size=544, num_attention_heads=2)[0].config)
    assert "272 is above 256" in str(make_plan(model, find_parts(model)).rows[1].reason)
