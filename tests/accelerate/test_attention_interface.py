"""``attn_implementation="fastvit"``: exact against transformers' eager and sdpa attention, with
masks (which transformers drops silently for a name without one), dropout, scaling and groups."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm_models import TOLERANCE, error, reseed
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers_models import build, eager, largest_error

import fastvit
from fastvit import numerics
from fastvit.accelerate.attention_interface import attention_forward
from fastvit.check.families import FAMILIES, tensors
from fastvit.numerics import randomise

fastvit.register_transformers()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    model, inputs = build(name)
    reference = eager(model)
    model.set_attn_implementation("fastvit")
    with torch.no_grad():
        assert largest_error(model(**inputs), reference(**inputs)) <= TOLERANCE


def test_chosen_when_the_model_is_made():
    model, _ = build("ViT")
    made = type(model)._from_config(model.config, attn_implementation="fastvit")
    assert made.config._attn_implementation == "fastvit"


def layer(**attributes: Any) -> Any:
    """What transformers' attention functions look at in the layer that calls them."""
    return SimpleNamespace(training=True, **{"is_causal": False, **attributes})


def qkv(heads: int = 4, kv_heads: int = 4, n: int = 7, m: int = 9) -> list[Tensor]:
    """As layers give them: [B, H, N, d], transposed views."""
    reseed()
    shapes = ((heads, n), (kv_heads, m), (kv_heads, m))
    return [torch.randn(2, count, h, 16).transpose(1, 2).requires_grad_() for h, count in shapes]


def both(module: Any, qkv: list[Tensor], mask: Tensor | None, **options: Any) -> list[Tensor]:
    """Ours and sdpa's outputs and gradients, from one seed."""
    results: list[Tensor] = []
    q, k, v = qkv
    for function in (attention_forward, sdpa_attention_forward):
        torch.manual_seed(5)
        out, weights = function(module, q, k, v, mask, **options)
        assert weights is None
        results += [out, *torch.autograd.grad(out.square().sum(), qkv)]
    return results


def check(results: list[Tensor]) -> None:
    half = len(results) // 2
    for ours, theirs in zip(results[:half], results[half:], strict=True):
        assert error(ours, theirs) <= TOLERANCE


MASKS = {
    "none": lambda: None,
    "bool": lambda: torch.rand(2, 1, 7, 9) > 0.3,
    "float": lambda: torch.randn(2, 4, 7, 9),
    "broadcast": lambda: torch.randn(1, 1, 1, 9),
}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_scaling_and_dropout(mask, scaling, dropout):
    inputs = qkv()
    check(both(layer(), inputs, mask(), scaling=scaling, dropout=dropout))


def test_grouped_queries():
    inputs = qkv(heads=4, kv_heads=2)
    check(both(layer(num_key_value_groups=2), inputs, None))


@pytest.mark.parametrize("options", [{"is_causal": True}, {}], ids=["argument", "layer"])
def test_causal_without_a_mask(options):
    inputs = qkv(n=9)
    results = both(layer(is_causal=True), inputs, None, **options)
    check(results)
    assert error(results[0], both(layer(), inputs, None)[0]) > 100 * TOLERANCE


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_position_bias(mask):
    inputs = qkv()
    check(both(layer(), inputs, mask(), position_bias=torch.randn(1, 4, 7, 9)))


@pytest.mark.parametrize("option", ["softcap", "s_aux", "cache"])
def test_what_would_change_the_scores_is_refused(option):
    q, k, v = qkv()
    options: dict[str, Any] = {option: 1.0}
    with pytest.raises(ValueError, match=option):
        attention_forward(nn.Identity(), q, k, v, None, **options)


def test_maps_on_request():
    q, k, v = qkv()
    mask = torch.rand(2, 1, 7, 9) > 0.3
    out, weights = attention_forward(layer(), q, k, v, mask, output_attentions=True)
    assert weights is not None
    assert error(weights.sum(-1), torch.ones(2, 4, 7)) <= TOLERANCE
    assert float(weights.detach()[(~mask).expand_as(weights)].max()) == 0
    assert error((weights @ v).transpose(1, 2), out) <= TOLERANCE
    model, inputs = build("SiglipVision")  # hands no options on to its attention
    reference = eager(model)
    model.set_attn_implementation("fastvit")
    with torch.no_grad():
        ours = model(**inputs, output_attentions=True).attentions
        theirs = reference(**inputs, output_attentions=True).attentions
    assert [error(a, b) <= TOLERANCE for a, b in zip(ours, theirs, strict=True)] == [True, True]


def text_models() -> list[Any]:
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"intermediate_size": 64, "vocab_size": 20, "max_position_embeddings": 16}
    return [
        CLIPTextModel(CLIPTextConfig(**size)),
        LlamaModel(LlamaConfig(**size, num_key_value_heads=2)),
    ]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("which", [0, 1], ids=["CLIPText", "Llama"])
def test_causal_models(which, padded):
    """Of text: with no padding their mask is left to the attention, as with sdpa."""
    reseed()
    model = text_models()[which].eval()
    randomise(model, 0)
    ids = torch.randint(1, 19, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.int64)
    if padded:
        mask[1, 6:] = 0
    with torch.no_grad():
        theirs = eager(model)(input_ids=ids, attention_mask=mask).last_hidden_state
        model.set_attn_implementation("fastvit")
        ours = model(input_ids=ids, attention_mask=mask).last_hidden_state
    seen = mask.bool()
    assert error(ours[seen], theirs[seen]) <= TOLERANCE


def test_compile_and_export():
    model, inputs = build("Dinov2WithRegisters")
    images = inputs["pixel_values"]
    reference = eager(model)
    model.set_attn_implementation("fastvit")
    with torch.no_grad():
        theirs = reference(images).last_hidden_state
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert error(compiled(images).last_hidden_state, theirs) <= TOLERANCE
        exported = torch.export.export(model, (images,), strict=False).module()
        assert error(exported(images).last_hidden_state, theirs) <= TOLERANCE


@pytest.mark.parametrize("masked", [False, True])
def test_triton_path(masked, triton_path):
    model, inputs = build("ViT", num_hidden_layers=1)
    if masked:
        inputs["attention_mask"] = torch.tensor([[1] * 17, [1] * 11 + [0] * 6])
    wide = inputs | {"pixel_values": inputs["pixel_values"].double()}
    with torch.no_grad():
        with fastvit.ops.backend("torch"):
            truth = tensors(eager(model).double()(**wide))[0]
            plain = tensors(eager(model)(**inputs))[0]
        model.set_attn_implementation("fastvit")
        row = numerics.measure("logits", tensors(model(**inputs))[0], truth, plain)
    assert row.passed, row


@pytest.mark.slow  # imports transformers again
@pytest.mark.parametrize("how", ["import fastvit.accelerate.transformers", "fastvit.register"])
def test_registered_by_either_way_and_not_before(how):
    if how == "fastvit.register":
        how = "import fastvit; fastvit.register_transformers()"
    code = (
        "import sys, fastvit\n"
        "assert 'transformers' not in sys.modules\n"
        f"{how}\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "print('fastvit' in AttentionInterface(), 'fastvit' in AttentionMaskInterface())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "True"], done.stderr
