"""`accelerate` on every family of transformers, float32 on the CPU: the library's outputs, hidden
states, attention maps, gradients and randomness; nothing that a user hooks or changes is ignored.
"""

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from timm_models import TOLERANCE, classes, error
from torch import nn
from transformers_models import (
    UNFUSED_PROJECTION,
    build,
    eager,
    largest_error,
    with_dropout,
)

import fastvit
from fastvit import numerics
from fastvit.accelerate import accelerate, restore
from fastvit.accelerate import transformers as fast
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.plan import make_plan
from fastvit.check.families import FAMILIES, tensors

# --------------------------------------------------------------------------- same numbers


@pytest.mark.parametrize("name", FAMILIES)
def test_same_output_parameters_and_restore(name):
    model, inputs = build(name)
    reference, before = eager(model), classes(model)
    state = dict(model.state_dict(keep_vars=True))
    with torch.no_grad():
        theirs, as_was = reference(**inputs), model(**inputs)
        assert accelerate(model) is model
        assert largest_error(model(**inputs), theirs) <= TOLERANCE
        plan = make_plan(model, find_parts(model))
        assert plan.accelerated
        assert len(plan.fused_blocks) >= 2
        assert not plan.left_blocks
        after = model.state_dict(keep_vars=True)
        assert list(after) == list(state)
        assert all(after[key] is state[key] for key in state)
        assert restore(model) is model
        assert classes(model) == before
        assert largest_error(model(**inputs), as_was) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_is_fused(name):
    model, _ = build(name)
    plan = make_plan(model, find_parts(model))
    left = [(row.type, row.reason) for row in plan.rows if not row.fused]
    if name in UNFUSED_PROJECTION:
        assert len(left) == 1
        assert UNFUSED_PROJECTION[name] in str(left[0][1])
        with pytest.raises(RuntimeError, match="side by side"):
            accelerate(model, strict=True)
    else:
        assert plan.fully_fused, left
        accelerate(model, strict=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_attentions(name):
    """Present and eager's, also before and after a forward that was not asked for them."""
    model, inputs = build(name)
    reference = eager(model)
    asked = inputs | {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        theirs = reference(**asked)
        accelerate(model)  # its implementation stays sdpa
        ours = model(**asked)
        plain = model(**inputs)
        again = model(**asked)
    assert theirs.attentions
    assert theirs.hidden_states
    assert getattr(plain, "attentions", None) is None
    for outputs in (ours, again):
        for key in ("hidden_states", "attentions"):
            pairs = list(zip(outputs[key], theirs[key], strict=True))
            assert max(error(a, b) for a, b in pairs) <= TOLERANCE
    assert largest_error(plain.to_tuple()[:1], theirs.to_tuple()[:1]) <= TOLERANCE
    assert not make_plan(model, find_parts(model)).left_blocks  # the hooks for them do no harm


def takes_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and parameter.numel() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(name):
    model, inputs = build(name)
    reference = eager(model)
    accelerate(model)
    for each in (reference, model):
        first = tensors(each(**inputs))[0]
        first.square().mean().backward()
    theirs = {key: p.grad for key, p in reference.named_parameters() if takes_gradient(p)}
    ours = {key: p.grad for key, p in model.named_parameters() if takes_gradient(p)}
    assert ours.keys() == theirs.keys()
    # a key's bias has no gradient but rounding errors: softmax does not see it
    largest = max(float(g.abs().max()) for g in theirs.values())
    for key, grad in theirs.items():
        assert float((ours[key] - grad).abs().max()) <= TOLERANCE * largest, key


@pytest.mark.parametrize("name", FAMILIES)
def test_training_draws_the_same_random_numbers(name):
    """Against sdpa, whose attention draws as ours does."""
    model, inputs = with_dropout(name)
    twin: Any = copy.deepcopy(model)
    accelerate(model)
    outputs = []
    for each in (twin, model):
        torch.manual_seed(3)
        outputs.append(each(**inputs))
    assert largest_error(outputs[1], outputs[0]) <= TOLERANCE
    torch.manual_seed(4)
    assert largest_error(model(**inputs), outputs[0]) > 100 * TOLERANCE or name in NOT_RANDOM


NOT_RANDOM = ("SamVision",)  # its sdpa drops nothing, and it has no other rate


# --------------------------------------------------------------------------- masks, dtypes, sizes

MASKED = ["ViT", "DeiT", "BEiT", "Dinov2", "ViTMSN", "IJepa", "ViViT"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "fastvit"])
@pytest.mark.parametrize("name", MASKED)
def test_padding_masks(name, implementation):
    model, inputs = build(name)
    reference = eager(model)
    model.set_attn_implementation(implementation)
    tokens = reference(**inputs, output_hidden_states=True).hidden_states[0].shape[1]
    mask = torch.ones(2, tokens, dtype=torch.int64)
    mask[1, -3:] = 0
    with torch.no_grad():
        unmasked = tensors(model(**inputs))[0]
        theirs = tensors(model(**inputs, attention_mask=mask))[0]
        by_eager = tensors(reference(**inputs, attention_mask=mask))[0]
        accelerate(model)
        ours = tensors(model(**inputs, attention_mask=mask))[0]
    assert error(by_eager, unmasked) > 100 * TOLERANCE
    assert error(ours, theirs) <= TOLERANCE
    if not (name == "BEiT" and implementation == "sdpa"):  # transformers adds its bool mask there
        assert error(ours, by_eager) <= TOLERANCE


def test_siglip2_takes_images_of_different_sizes():
    model, inputs = build("Siglip2Vision")
    reference = eager(model)
    with torch.no_grad():
        theirs = reference(**inputs).last_hidden_state
        inputs["pixel_attention_mask"][:] = 1
        assert error(reference(**inputs).last_hidden_state, theirs) > 100 * TOLERANCE
        inputs["pixel_attention_mask"][1, 9:] = 0
        assert error(accelerate(model)(**inputs).last_hidden_state, theirs) <= TOLERANCE


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("way", ["accelerate", "attn_implementation"])
def test_eager_matches_ours_in_inference(way, batch, dtype, masked):
    """transformers' test of sdpa, for ours: outputs' dtype, batch sizes and masks; by the numerics
    policy, against eager."""
    model, _ = build("ViT")
    images = torch.randn(batch, 3, 32, 32)
    mask = torch.ones(batch, 17, dtype=torch.int64)
    if masked:
        mask[-1, 10:] = 0
    reference = eager(model)

    def tokens(model: Any, images: torch.Tensor) -> torch.Tensor:
        return model.vit(images, attention_mask=mask).last_hidden_state

    with torch.no_grad():
        truth = tokens(reference.double(), images.to(dtype).double())
        plain = tokens(eager(model).to(dtype), images.to(dtype))
        if way == "accelerate":
            accelerate(model)
        else:
            model.set_attn_implementation("fastvit")
        ours = tokens(model.to(dtype), images.to(dtype))
    assert ours.dtype == dtype
    row = numerics.measure("tokens", ours, truth, plain)
    assert row.passed, row


def test_a_four_dimensional_mask():
    model, inputs = build("ViT")
    reference = eager(model)
    mask = torch.randn(2, 2, 17, 17)
    allowed = torch.rand(2, 1, 17, 17) > 0.5
    allowed |= torch.eye(17, dtype=torch.bool)
    lowest = torch.zeros(2, 1, 17, 17).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        by_values = reference(**inputs, attention_mask=mask).logits
        by_bool = reference(**inputs, attention_mask=lowest).logits
        accelerate(model)
        assert error(model(**inputs, attention_mask=mask).logits, by_values) <= TOLERANCE
        assert error(model(**inputs, attention_mask=allowed).logits, by_bool) <= TOLERANCE
        model.set_attn_implementation("eager")  # which adds a bool mask as 0 and 1
        theirs = reference(**inputs, attention_mask=allowed).logits
        assert error(model(**inputs, attention_mask=allowed).logits, theirs) <= TOLERANCE


@pytest.mark.parametrize("name", ["ViT", "DeiT", "BEiT", "Dinov2", "DINOv3ViT", "CLIPVision"])
def test_another_image_size(name):
    model, _ = build(name)
    images = torch.randn(1, 3, 40, 56)
    options: dict[str, Any] = {"interpolate_pos_encoding": True}
    if name in ("Dinov2", "DINOv3ViT"):
        options = {}
    reference = eager(model)
    accelerate(model)
    with torch.no_grad():
        theirs = reference(images, **options)
        assert largest_error(model(images, **options), theirs) <= TOLERANCE
        if name in ("Dinov2", "DINOv3ViT"):  # their convolution drops what a patch does not fill
            images = torch.randn(1, 3, 37, 44)
            assert largest_error(model(images), reference(images)) <= TOLERANCE


def test_autocast():
    model, inputs = build("DINOv3ViT")
    reference = copy.deepcopy(model)
    accelerate(model)
    with torch.no_grad():
        truth = reference(**inputs).last_hidden_state.double()
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = reference(**inputs), model(**inputs)
    assert ours.last_hidden_state.dtype == theirs.last_hidden_state.dtype
    row = numerics.measure("tokens", ours.last_hidden_state, truth, theirs.last_hidden_state)
    assert row.passed, row


# --------------------------------------------------------------------------- kernels


@pytest.mark.parametrize(
    "name",
    ["BEiT", "Dinov2 SwiGLU", "DINOv3ViT", "VideoMAE", "Aimv2", "SamVision", "VitDet", "Hiera"],
)
def test_triton_path(name, triton_path):
    """In the interpreter, one for each way that layers differ: bias and LayerScale, gated MLP,
    rotary positions, tubelets, RMSNorm, windows, maps of channels first, pooled queries."""
    model, inputs = build(name, **({} if name == "Hiera" else {"num_hidden_layers": 1}))
    with torch.no_grad(), fastvit.ops.backend("torch"):
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        truth = tensors(eager(model).double()(**wide))[0]
        plain = tensors(eager(model)(**inputs))[0]
    with torch.no_grad():
        row = numerics.measure("output", tensors(accelerate(model)(**inputs))[0], truth, plain)
    assert row.passed, row


@pytest.mark.parametrize("fault", ["bias", "scale", "layer_scale", "norm"])
def test_errors_are_seen(fault):
    model, inputs = build("Dinov2")
    with torch.no_grad():
        theirs = model(**inputs).logits
        layer = accelerate(model).dinov2.encoder.layer[1]
        if fault == "bias":
            layer.mlp.fc2.bias.zero_()
        elif fault == "scale":
            layer.attention.scaling *= 1.1
        elif fault == "norm":
            layer.norm2.eps = 1.0
        else:
            layer.layer_scale1.lambda1.mul_(1.1)
        assert error(model(**inputs).logits, theirs) > 100 * TOLERANCE


# --------------------------------------------------------------------------- use


def test_compile_and_export():
    model, inputs = build("BEiT")
    images = inputs["pixel_values"]
    accelerate(model)
    with torch.no_grad():
        theirs = model(images).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert error(compiled(images).logits, theirs) <= TOLERANCE
        exported = torch.export.export(model, (images,), strict=False).module()
        assert error(exported(images).logits, theirs) <= TOLERANCE
        # transformers installs its hooks, which dynamo cannot, and then compiles through them
        asked = {"output_hidden_states": True, "output_attentions": True}
        plain = model(images, **asked)
        traced = compiled(images, **asked)
    for key in ("hidden_states", "attentions"):
        for a, b in zip(traced[key], plain[key], strict=True):
            assert error(a, b) <= TOLERANCE


def test_a_layer_compiled_by_itself():
    model, inputs = build("ViT")
    with torch.no_grad():
        theirs = model(**inputs).logits
        for layer in accelerate(model).vit.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
        assert error(model(**inputs).logits, theirs) <= TOLERANCE


def test_copies_pickles_and_saved_models(tmp_path):
    model, inputs = build("Dinov2")
    with torch.no_grad():
        theirs = model(**inputs).logits
        accelerate(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ):
            assert type(twin.dinov2.encoder.layer[0]) is type(model.dinov2.encoder.layer[0])
            assert error(twin(**inputs).logits, theirs) <= TOLERANCE
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
    assert (
        type(loaded.dinov2.encoder.layer[0]) is type(model.dinov2.encoder.layer[0]).fastvit_original
    )
    assert error(loaded(**inputs).logits, theirs) <= TOLERANCE


@pytest.mark.slow  # imports transformers again
def test_a_pickle_loads_in_a_new_process(tmp_path):
    model, inputs = build("ViT")
    torch.save((accelerate(model), inputs), tmp_path / "model.pt")
    code = (
        "import torch\n"
        "from fastvit._compat import import_transformers\n"
        "import_transformers()\n"  # for the torchvision beside it
        f"model, inputs = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "print(type(model.vit.layers[0]).__name__, model(**inputs).logits.isfinite().all())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["ViTLayer", "tensor(True)"], done.stderr


def test_gradient_checkpointing():
    model, inputs = build("ViT")
    model.train()
    twin = copy.deepcopy(model)
    twin(**inputs).logits.square().mean().backward()
    accelerate(model).gradient_checkpointing_enable({"use_reentrant": False})
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    original = fast.FastLayer.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast.FastLayer, "run", lambda *args: (count(), original(*args))[1])
        model(**inputs).logits.square().mean().backward()
    assert calls == 4  # two layers, each run again in the backward
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is None or error(ours.grad, theirs.grad) <= TOLERANCE
