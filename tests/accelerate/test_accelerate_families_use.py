"""Accelerated models of timm's families in use: masks, hooks, compilers, copies, intermediates,
other sizes, precision."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import timm
import torch
from fake_cuda import Cuda
from timm_models import TOLERANCE, Doubled, classes, error, reseed
from torch import Tensor, nn

from fastvit.accelerate import accelerate, explain, restore
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.plan import make_plan
from fastvit.check.models import build_small

ROPE, SPLIT, MIXED = (
    "vit_small_patch16_dinov3",
    "eva02_base_patch14_224",
    "vit_base_patch16_rope_mixed_224",
)
BEIT, RELPOS, SHARED = (
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "vit_srelpos_small_patch16_224",
)
POST, EVA_POST = "vit_base_patch16_rpn_224", "eva02_enormous_patch14_clip_224"
PARALLEL, DIFF, THINGS = (
    "vit_huge_patch14_xp_224",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_base_patch16_18x2_224",
)
NAFLEX, GLU = "naflexvit_so400m_patch16_siglip", "vit_giant_patch14_dinov2"
FAMILIES = [
    ROPE,
    SPLIT,
    MIXED,
    BEIT,
    RELPOS,
    SHARED,
    POST,
    EVA_POST,
    PARALLEL,
    DIFF,
    THINGS,
    NAFLEX,
    GLU,
]


def small(name: str, **options: Any) -> tuple[Any, Any]:
    return build_small(name, seed=reseed(), **options)


def same(ours: Any, theirs: Any) -> None:
    """Equal within the tolerance, wherever tensors are in two results of one structure."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype
        if theirs.is_floating_point():
            assert error(ours, theirs) <= TOLERANCE
        else:
            assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            same(ours[key], value)
    elif isinstance(theirs, (list, tuple)):
        for mine, own in zip(ours, theirs, strict=True):
            same(mine, own)
    else:
        assert ours == theirs


# --------------------------------------------------------------------------- arguments


def masks(tokens: int, heads: int) -> dict[str, dict[str, Any]]:
    mask = torch.rand(2, 1, tokens, tokens) > 0.5
    mask |= torch.eye(tokens, dtype=torch.bool)  # a query without keys is undefined
    return {
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": torch.randn(1, heads, tokens, tokens)},
        "causal": {"is_causal": True},
    }


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
@pytest.mark.parametrize("name", [ROPE, SPLIT, MIXED, POST, EVA_POST, PARALLEL, DIFF, THINGS])
def test_masks(name, kind):
    model, x = small(name)
    with torch.no_grad():
        features, unmasked = model.forward_features(x), model(x)
        options = masks(features.shape[1], heads=2)[kind]
        theirs = model(x, **options)
        assert error(theirs, unmasked) > 100 * TOLERANCE
        accelerate(model)
        same(model(x, **options), theirs)
        same(model(x, *options.values()) if kind != "causal" else model(x, None, True), theirs)


def test_naflex_takes_images_tensors_and_dicts():
    model, batch = small(NAFLEX)
    images = torch.randn(2, 3, 32, 64)
    calls = [
        lambda: model(images),
        lambda: model(batch),
        lambda: model(**{"x" if k == "patches" else k: v for k, v in batch.items()}),
        lambda: model.forward_features(**batch),
        lambda: model.forward_intermediates(batch, output_fmt="NLC"),
    ]
    with torch.no_grad():
        theirs = [call() for call in calls]
        accelerate(model)
        for call, expected in zip(calls, theirs, strict=True):
            same(call(), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", [ROPE, BEIT, RELPOS, DIFF, NAFLEX])
def test_precision_is_autocast(name, precision):
    model, x = small(name)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            theirs = model(x).float()
        ours = accelerate(model, precision=precision)(x)
    # one rounding more or less in each of two blocks
    assert error(ours, theirs) <= 16 * torch.finfo(dtype).eps
    assert error(ours, accelerate(model)(x).detach()) > 10 * TOLERANCE


# --------------------------------------------------------------------------- what users add


INNER = {
    ROPE: ["attn", "attn.qkv", "attn.proj", "mlp.act", "norm2"],
    SPLIT: ["attn.q_proj", "attn.norm", "mlp.fc1_g", "mlp.norm"],
    BEIT: ["attn", "attn.proj_drop", "mlp"],
    RELPOS: ["attn.rel_pos.mlp", "attn.qkv", "ls1"],
    POST: ["norm1", "attn.attn_drop"],
    PARALLEL: ["in_proj", "mlp_act", "attn_out_proj"],
    DIFF: ["sub_norm", "out_proj"],
    THINGS: ["attns.1", "attns.0.attn.qkv", "ffns.1.mlp.fc2"],
}
HOOKED = [(name, module) for name, modules in INNER.items() for module in modules]


@pytest.mark.parametrize(("name", "module"), HOOKED)
def test_hooks_fire_with_the_right_values(name, module):
    model, x = small(name)
    for block in model.blocks:
        for part in block.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False  # timm's way to see the attention map
    seen: list[Any] = []
    with torch.no_grad():
        for prepare in (restore, accelerate):  # registered before and after
            hooked = prepare(model).blocks[0].get_submodule(module)
            hook = hooked.register_forward_hook(lambda _, args, output: seen.append(output))
            model(x)
            hook.remove()
            model(x)
    theirs, ours = seen
    same(ours, theirs)


class Mine(nn.Linear):
    pass


CHANGES = [
    (ROPE, lambda block: setattr(block.attn, "qkv", Doubled(block.attn.qkv)), "attn.qkv is"),
    (SPLIT, lambda block: setattr(block.mlp, "act", nn.Tanh()), "mlp.act is Tanh"),
    (BEIT, lambda block: setattr(block.attn, "scale", 1.0), None),  # which attention takes
    (BEIT, lambda block: setattr(block.attn, "gate", nn.Linear(2, 2)), "gate is Linear"),
    (BEIT, lambda block: setattr(block.attn, "q_norm", nn.LayerNorm(2)), "q_norm is LayerNorm"),
    (ROPE, lambda block: setattr(block.attn, "sub_norm", nn.LayerNorm(2)), "sub_norm is LayerNorm"),
    (RELPOS, lambda block: setattr(block, "norm1", nn.Identity()), "norm1 is Identity"),
    (THINGS, lambda block: setattr(block.attns[1], "ls", nn.Tanh()), "attns.1.ls is Tanh"),
    (DIFF, lambda block: setattr(block.in_proj, "__class__", Mine), "in_proj is Mine"),
]


@pytest.mark.parametrize(("name", "change", "reason"), CHANGES)
def test_changes_after_accelerate_count(name, change, reason):
    model, x = small(name)
    accelerate(model)
    for module in model.blocks[0].modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # so that scale counts
    change(model.blocks[0])
    with torch.no_grad():
        ours = model(x)
        rows = [row for row in make_plan(model, find_parts(model)).rows if row.block]
        same(ours, restore(model)(x))
    assert [row.fused for row in rows] == [reason is None, True]
    assert reason is None or reason in str(rows[0].reason)


# --------------------------------------------------------------------------- copies and compilers


@pytest.mark.parametrize("name", [ROPE, MIXED, BEIT, RELPOS, DIFF, NAFLEX])
def test_copies(name):
    model, x = small(name)
    accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    with torch.no_grad():
        expected = model(x)
        for twin in twins:
            assert classes(twin) == classes(model)
            assert torch.equal(twin(x), expected)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in (SPLIT, SHARED, DIFF, THINGS, GLU)]


@pytest.mark.parametrize("name", [ROPE, BEIT, PARALLEL, *SLOW])  # several seconds each
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    model, x = small(name)
    theirs = model(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(accelerate(model), fullgraph=True, backend="aot_eager")
        ours = compiled(x)
    ours.sum().backward()
    same(ours.detach(), theirs)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", [ROPE, MIXED, BEIT, RELPOS, DIFF])
def test_export_with_dynamic_batch(name):
    model, x = small(name, batch=5)
    with torch.no_grad():
        theirs = model(x)
        shapes = {"x": {0: torch.export.Dim("batch")}}
        exported = torch.export.export(accelerate(model), (x[:2],), dynamic_shapes=shapes)
        same(exported.module()(x), theirs)


@pytest.mark.parametrize("name", [ROPE, MIXED, BEIT, RELPOS, NAFLEX])
def test_cuda_graphs(name, monkeypatch):
    cuda = Cuda(monkeypatch)
    model, x = small(name)
    images = torch.randn(2, 3, 32, 64) if name == NAFLEX else x
    with torch.no_grad():
        theirs = [model(images), model(x)]
        accelerate(model, cuda_graphs=True)
        same([model(images), model(images)], [theirs[0]] * 2)
        assert cuda.captures == 1
        same(model(x), theirs[1])  # of NaFlex a dict, which goes without
        assert cuda.captures == 1


# --------------------------------------------------------------------------- timm's interfaces


@pytest.mark.parametrize("name", FAMILIES)
def test_intermediates_and_heads(name):
    model, x = small(name)
    x = torch.randn(2, 3, 32, 64) if name == NAFLEX else x
    calls = [
        lambda: model.forward_intermediates(x),
        lambda: model.forward_intermediates(x, indices=[1], norm=True, output_fmt="NLC"),
        lambda: model.forward_features(x),
        lambda: model.forward_head(model.forward_features(x), pre_logits=True),
    ]
    with torch.no_grad():
        theirs = [call() for call in calls]
        accelerate(model)
        for call, expected in zip(calls, theirs, strict=True):
            same(call(), expected)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        logits = model(x)
        same(logits, restore(model)(x))
        accelerate(model).prune_intermediate_layers([0])
        same(model.forward_features(x), restore(model).forward_features(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_classifiers_and_default_configs(name):
    model, x = small(name)
    twin = accelerate(copy.deepcopy(model))
    assert twin.default_cfg == model.default_cfg
    assert twin.no_weight_decay() == model.no_weight_decay()
    assert twin.group_matcher() == model.group_matcher()
    with torch.no_grad():
        for arguments in [(5, "avg"), (0,), (0, "")]:
            for each in (model, twin):
                torch.manual_seed(0)  # of the new classifier
                each.reset_classifier(*arguments)
            assert type(twin.get_classifier()) is type(model.get_classifier())
            ours = twin(x)
            same(ours, model(x))
            assert ours.shape[-1] == (arguments[0] or model.num_features)
    assert ours.dim() == 3  # without a pool, all tokens


@pytest.mark.parametrize("name", [ROPE, BEIT, RELPOS, "vit_base_patch16_rope_224"])
def test_features_only(name):
    size = {"img_size": (32, 48), "depth": 2, "embed_dim": 128, "num_heads": 2, "out_indices": 1}
    model: Any = timm.create_model(name, features_only=True, **size).eval()
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        theirs = model(x)
        assert not explain(accelerate(model)).left_blocks
        same(model(x), theirs)


@pytest.mark.parametrize("name", [ROPE, MIXED, SPLIT, BEIT, RELPOS])
def test_another_input_size(name):
    model, _ = small(name)
    patch = model.patch_embed.patch_size[0]
    size = (3 * patch, 2 * patch)
    other = torch.randn(2, 3, *size)
    with torch.no_grad():
        accelerate(model)
        model.set_input_size(img_size=size)
        ours = model(other)
        same(ours, restore(model)(other))


@pytest.mark.parametrize("name", [MIXED, SPLIT, BEIT, RELPOS])
def test_a_wrong_input_size_gets_timms_own_error(name):
    model, _ = small(name)
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises((AssertionError, RuntimeError)) as theirs:
        model(x)
    with pytest.raises(theirs.type) as ours:
        accelerate(model)(x)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "name", [ROPE, "vit_base_patch16_rope_mixed_224", "eva02_tiny_patch14_224"]
)
def test_dynamic_size_and_patch_dropout(name):
    model, _ = small(name, dynamic_img_size=True, patch_drop_rate=0.5)
    patch = model.patch_embed.patch_size[0]
    x = torch.randn(2, 3, 4 * patch, 3 * patch)
    twin = accelerate(copy.deepcopy(model))
    with torch.no_grad():
        same(twin(x), model(x))
        torch.manual_seed(0)
        theirs = model.train()(x)
        torch.manual_seed(0)
        same(twin.train()(x), theirs)


@pytest.mark.parametrize("name", [ROPE, MIXED, BEIT, SHARED, NAFLEX])
def test_checkpointing(name):
    model, x = small(name)
    model.train()
    outputs, grads = [], []
    for prepare in (restore, accelerate):
        prepare(model).set_grad_checkpointing(prepare is not restore)
        model.zero_grad()
        torch.manual_seed(0)
        y = model(x)
        y.square().sum().backward()
        outputs.append(y.detach())
        grads.append(next(model.blocks[0].parameters()).grad.clone())
    same(outputs[1], outputs[0])
    assert error(grads[1], grads[0]) <= 10 * TOLERANCE


@pytest.mark.slow
def test_without_timms_newest_classes():
    """timm before 1.0.23 has neither of these."""
    code = (
        "from fastvit._compat import import_timm\n"
        "timm = import_timm()\n"
        "from timm.models import vision_transformer\n"
        "del timm.layers.DiffAttention, vision_transformer.DiffParallelScalingBlock\n"
        "import torch, fastvit\n"
        "model = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2)\n"
        "fastvit.accelerate(model, strict=True)\n"
        "print(tuple(model(torch.randn(1, 3, 32, 32)).shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 1000)", done.stderr[-2000:]
