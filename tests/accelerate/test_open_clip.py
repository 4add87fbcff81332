"""`accelerate` on open_clip's vision towers, with every parameter random."""

import copy
import pickle
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import LayerNormFp32, QuickGELU, VisionTransformer
from timm_models import TOLERANCE, Doubled, classes, error, reseed

from fastvit.accelerate import accelerate, explain, restore
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.plan import make_plan
from fastvit.numerics import measure, randomise

IMAGES = torch.randn(2, 3, 32, 32)


def tower(**options: Any) -> Any:
    reseed()
    size: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2}
    size |= {"heads": 2, "mlp_ratio": 2.0, "output_dim": 16}
    model = VisionTransformer(**{**size, **options}).eval()
    randomise(model, int(torch.randint(2**31, ()).item()))
    return model


OPTIONS = {
    "plain": {},
    "layer_scale": {"ls_init_value": 0.3},
    "quick_gelu": {"act_layer": QuickGELU},
    "fp32_norm": {"norm_layer": LayerNormFp32},
    "no_ln_pre": {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "attentional_pool": {"attentional_pool": True, "attn_pooler_heads": 2},
    "tokens": {"output_tokens": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_output_gradients_and_restore(options):
    model = tower(**options)
    twin, before = copy.deepcopy(model), classes(model)
    state = dict(model.state_dict(keep_vars=True))
    accelerate(model, strict=True)
    assert len(make_plan(model, find_parts(model)).fused_blocks) == 2
    theirs, ours = twin(IMAGES), model(IMAGES)
    if options.get("output_tokens"):
        assert error(ours[1], theirs[1]) <= TOLERANCE
        theirs, ours = theirs[0], ours[0]
    assert error(ours, theirs) <= TOLERANCE
    theirs.square().mean().backward()
    ours.square().mean().backward()
    grads = {key: p.grad for key, p in twin.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for key, grad in grads.items():
        assert float((model.get_parameter(key).grad - grad).abs().max()) <= TOLERANCE * largest
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is state[key] for key in state)
    assert classes(restore(model)) == before


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-B-16-quickgelu"])
def test_vision_towers_of_named_models_are_fused(name):
    """The text tower, of the same blocks, is left alone."""
    config: Any = open_clip.get_model_config(name)
    with torch.device("meta"):
        model: Any = open_clip.CLIP(**{k: v for k, v in config.items() if k in CLIP_OPTIONS})
    plan = make_plan(model, find_parts(model))
    assert plan.fully_fused
    assert len(plan.fused_blocks) == config["vision_cfg"]["layers"]
    assert all(row.module.startswith("visual.") for row in plan.rows)


CLIP_OPTIONS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")


def test_a_whole_clip():
    reseed()
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2}
    model: Any = open_clip.CLIP(16, vision, text).eval()  # type: ignore[arg-type]
    randomise(model, 0)
    words = torch.randint(1, 20, (2, 8))
    before = classes(model.transformer)
    with torch.no_grad():
        theirs = model(IMAGES, words)
        accelerate(model, strict=True)
        assert classes(model.transformer) == before
        ours = model(IMAGES, words)
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            assert error(a, b) <= TOLERANCE


def test_intermediates_and_gradient_checkpointing():
    model = tower()
    with torch.no_grad():
        theirs = model.forward_intermediates(IMAGES)
        ours = accelerate(model).forward_intermediates(IMAGES)
    for a, b in zip(ours["image_intermediates"], theirs["image_intermediates"], strict=True):
        assert error(a, b) <= TOLERANCE
    twin = restore(copy.deepcopy(model)).train()
    twin(IMAGES).square().mean().backward()
    model.train().set_grad_checkpointing()
    model(IMAGES).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert error(a.grad, b.grad) <= 10 * TOLERANCE  # relative to its own largest


def test_masks_are_open_clips():
    block = tower().transformer.resblocks[0]
    x, mask = torch.randn(2, 5, 32), torch.randn(5, 5)
    # a block by itself is not known to be of a vision tower: take it from an accelerated one
    model = tower()
    model.transformer.resblocks[0].load_state_dict(block.state_dict())
    fast = accelerate(model).transformer.resblocks[0]
    with torch.no_grad():
        theirs = block(x, attn_mask=mask)
        assert error(theirs, block(x)) > 100 * TOLERANCE
        assert error(fast(x, attn_mask=mask), theirs) <= TOLERANCE


def test_blocks_of_other_kinds_are_left():
    model = tower(qk_norm=True)
    before = classes(model.transformer)
    with torch.no_grad():
        theirs = model(IMAGES)
        accelerate(model)
        assert classes(model.transformer) == before
        assert error(model(IMAGES), theirs) <= TOLERANCE
    assert len(explain(model).left_blocks) == 2


def test_hooks_and_replaced_layers():
    model = tower()
    accelerate(model)
    seen = []
    blocks = model.transformer.resblocks
    blocks[0].mlp.c_fc.register_forward_hook(lambda *_: seen.append(1))
    blocks[1].mlp.c_proj = Doubled(blocks[1].mlp.c_proj)
    with torch.no_grad():
        theirs = restore(copy.deepcopy(model))(IMAGES)
        seen.clear()
        assert error(model(IMAGES), theirs) <= TOLERANCE
    assert seen == [1]
    assert len(explain(model).left_blocks) == 2


def test_autocast():
    model, wide = tower(norm_layer=LayerNormFp32), tower()  # the first cannot run in float64
    wide.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    accelerate(model)
    with torch.no_grad():
        truth = wide.double()(IMAGES.double())
        with torch.autocast("cpu", torch.bfloat16):
            row = measure("features", model(IMAGES).float(), truth, twin(IMAGES).float())
    assert row.passed, row


def test_pickles_compile_and_errors():
    model = tower(ls_init_value=0.5)
    with torch.no_grad():
        theirs = model(IMAGES)
        accelerate(model)
        assert error(pickle.loads(pickle.dumps(model))(IMAGES), theirs) <= TOLERANCE
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert error(compiled(IMAGES), theirs) <= TOLERANCE
        model.transformer.resblocks[0].ls_1.gamma.mul_(1.1)
        assert error(model(IMAGES), theirs) > 100 * TOLERANCE


def test_triton_path(triton_path):
    model = tower(layers=1, act_layer=QuickGELU)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(IMAGES.double())
        plain = copy.deepcopy(model)(IMAGES)
        row = measure("features", accelerate(model)(IMAGES), truth, plain)
    assert row.passed, row
