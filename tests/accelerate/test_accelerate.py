"""`accelerate` on timm's models, float32 on the CPU: same outputs, gradients and randomness, and
nothing that a user hooks or changes is ignored."""

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from timm_models import TOLERANCE, Doubled, build, classes, error, images, randomise, reseed, small
from torch import Tensor, nn
from torch.nn.utils.prune import random_unstructured

import fastvit
from fastvit.accelerate import accelerate, explain, restore
from fastvit.accelerate import timm as fast

# one of each combination of axes that occurs in vision_transformer.py and deit.py, as far as it is
# of LayerNorm and plain MLPs; for the rest see test_accelerate_families.py
ARCHITECTURES = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_384",
    "vit_small_patch8_224",
    "vit_base_patch32_224",
    "vit_base_patch16_224_miil",
    "vit_base_patch16_plus_240",
    "vit_base_patch16_gap_224",
    "vit_medium_patch16_gap_240",
    "vit_medium_patch16_reg4_gap_256",
    "vit_mediumd_patch16_reg4_gap_256",
    "vit_betwixt_patch16_reg1_gap_256",
    "vit_wee_patch16_reg1_gap_256",
    "vit_base_patch16_clip_224",
    "vit_large_patch14_clip_quickgelu_224",
    "vit_base_patch32_clip_quickgelu_224",
    "vit_gigantic_patch14_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_so400m_patch14_siglip_224",
    "vit_so150m_patch16_reg4_map_256",
    "vit_giantopt_patch16_siglip_256",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch14_reg1_tipsv2",
    "vit_base_patch16_radio_v3",
    "vit_huge_patch14_224",
    "vit_huge_patch14_gap_224",
    "vit_giant_patch14_224",
    "vit_intern300m_patch14_448",
    "beit3_base_patch16_224",
    "beit3_giant_patch14_224",
    "eva_large_patch14_196",
    "flexivit_small",
    "test_vit",
    "test_vit2",
    "test_vit3",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "deit3_huge_patch14_224",
]


# --------------------------------------------------------------------------- same numbers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_output_parameters_and_restore(name):
    model = build(name)
    x = images(model)
    before = classes(model)
    state = dict(model.state_dict(keep_vars=True))
    with torch.no_grad():
        theirs = model(x)
        assert accelerate(model) is model
        assert error(model(x), theirs) <= TOLERANCE
        after = model.state_dict(keep_vars=True)
        assert list(after) == list(state)
        assert all(after[key] is state[key] for key in state)
        assert all(isinstance(block, fast.FastBlock) for block in model.blocks)
        assert restore(model) is model
        assert classes(model) == before
        assert torch.equal(model(x), theirs)


OWN = [name for name in ARCHITECTURES if name in getattr(fastvit, "list_models", list)()]


@pytest.mark.parametrize("name", OWN)
def test_own_model_with_the_same_weights(name):
    theirs = build(name)
    ours = fastvit.create_model(name, depth=2, img_size=theirs.patch_embed.img_size).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(theirs)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= TOLERANCE


def test_own_models_are_compared():
    assert len(OWN) >= 15


@pytest.mark.parametrize(
    "break_it",
    [
        lambda block: block.mlp.fc2.bias.zero_(),
        lambda block: block.attn.qkv.bias[: block.attn.attn_dim].zero_(),
        lambda block: block.ls1.gamma.mul_(1.01),
    ],
)
def test_errors_are_seen(break_it):
    model = small()
    x = images(model)
    with torch.no_grad():
        theirs = model(x)
        break_it(accelerate(model).blocks[1])
        assert error(model(x), theirs) > 100 * TOLERANCE


def test_triton_path(triton_path):
    """Kernels in the interpreter; image and depth as small as they come."""
    model = small(qk_norm=True, depth=1)
    x = images(model, batch=1)
    with torch.no_grad():
        theirs = model(x)
        assert error(accelerate(model, strict=True)(x), theirs) <= TOLERANCE


OPTIONS = {
    "qk_norm": {"qk_norm": True},
    "inner_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "torch_norm": {"norm_layer": nn.LayerNorm},
    "no_bias": {"qkv_bias": False, "proj_bias": False},
    "no_positions": {"pos_embed": "none"},
    "no_prefix": {"class_token": False, "reg_tokens": 0, "global_pool": "avg"},
    "no_embed_class": {"no_embed_class": True},
    "embed_norm": {"embed_norm_layer": "layernorm"},
    "dynamic": {"dynamic_img_size": True},
    "padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "no_depth": {"depth": 0},
    "head_dim_16": {"num_heads": 1, "embed_dim": 16},
    "silu": {"act_layer": "silu"},
    "unfused_attention": {"attn_drop_rate": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    model = small(**options)
    x = images(model)
    with torch.no_grad():
        theirs, features = model(x), model.forward_features(x)
        accelerate(model)
        assert error(model(x), theirs) <= TOLERANCE
        assert error(model.forward_features(x), features) <= TOLERANCE
    assert not explain(model).left_blocks


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("size", [(32, 64), (48, 32), (40, 72)])
def test_dynamic_image_size(size, distilled):
    name = "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224"
    model = build(name, patches=(2, 4), dynamic_img_size=True, dynamic_img_pad=True)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        theirs = model(x)
        assert error(accelerate(model)(x), theirs) <= TOLERANCE


def test_forward_intermediates_and_patch_embed():
    model = small()
    x = images(model)
    with torch.no_grad():
        tokens, (final, layers) = model.patch_embed(x), model.forward_intermediates(x)
        accelerate(model)
        assert error(model.patch_embed(x), tokens) <= TOLERANCE
        ours, our_layers = model.forward_intermediates(x)
    assert error(ours, final) <= TOLERANCE
    assert len(our_layers) == len(layers)
    assert all(error(a, b) <= TOLERANCE for a, b in zip(our_layers, layers, strict=True))


def test_features_only():
    model: Any = timm.create_model("test_vit", features_only=True, img_size=32).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        theirs = model(x)
        ours = accelerate(model, strict=True)(x)
    assert all(error(a, b) <= TOLERANCE for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_mask(kind):
    model = small(reg_tokens=0)
    tokens = 9
    mask = torch.rand(2, 1, tokens, tokens) > 0.5
    mask |= torch.eye(tokens, dtype=torch.bool)  # a query without keys is undefined
    options = {
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": torch.randn(1, 2, tokens, tokens)},
        "causal": {"is_causal": True},
    }[kind]
    x = images(model)
    with torch.no_grad():
        unmasked, theirs = model(x), model(x, **options)
        assert error(theirs, unmasked) > 100 * TOLERANCE
        assert error(accelerate(model)(x, **options), theirs) <= TOLERANCE


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], dim=3)[..., ::2],
        lambda x: x[:0],
    ],
    ids=["channels_last", "transposed", "strided", "empty"],
)
def test_input_layouts(layout):
    model = small()
    x = layout(images(model))
    with torch.inference_mode():
        theirs = model(x)
        ours = accelerate(model)(x)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE * max(1, len(x)))


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 64, dtype=torch.uint8)]
)
def test_bad_images_get_timms_own_error(x):
    model = small()
    with pytest.raises((AssertionError, RuntimeError)) as theirs:
        model(x)
    with pytest.raises(theirs.type) as ours:
        accelerate(model)(x)
    assert str(ours.value) == str(theirs.value)


# --------------------------------------------------------------------------- training


def gradients(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(x) * target).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing):
    model = small(qk_norm=True, drop_path_rate=0.2).train()
    x, target = images(model), torch.randn(2, model.num_classes)
    torch.manual_seed(0)
    theirs = gradients(model, x, target)
    accelerate(model).set_grad_checkpointing(checkpointing)
    torch.manual_seed(0)
    ours = gradients(model, x, target)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    # relative to each one's largest, save for those that are zero but for rounding (k_norm.bias)
    floor = 1e-3 * max(grad.abs().max().item() for grad in theirs.values())
    for name, grad in theirs.items():
        limit = TOLERANCE * max(grad.abs().max().item(), floor)
        assert (ours[name] - grad).abs().max().item() <= limit, name


@pytest.mark.parametrize(
    "rate", ["drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate",
             "patch_drop_rate", "drop_rate"],
)  # fmt: skip
def test_same_randomness_in_training(rate):
    model = small(**{rate: 0.5}).train()
    x = images(model)
    outputs = []
    for prepare in (restore, accelerate):
        prepare(model)
        torch.manual_seed(0)
        outputs.append(model(x).detach())
    assert error(outputs[1], outputs[0]) <= TOLERANCE
    assert error(outputs[0], model.eval()(x).detach()) > 100 * TOLERANCE


def test_optimizer_made_before_goes_on():
    model, twin = small(), small()
    twin.load_state_dict(model.state_dict())
    x, target = images(model), torch.randn(2, model.num_classes)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin)]
    accelerate(model)
    for _ in range(2):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            gradients(m, x, target)
            optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert error(ours.detach(), theirs.detach()) <= TOLERANCE


# --------------------------------------------------------------------------- what users add


INNER = ["patch_embed", "patch_embed.proj", "blocks.0", "blocks.0.norm1", "blocks.0.attn",
         "blocks.0.attn.qkv", "blocks.0.attn.attn_drop", "blocks.0.mlp.act", "norm"]  # fmt: skip


@pytest.mark.parametrize("name", INNER)
def test_hooks_fire_with_the_right_values(name):
    model = small()
    model.blocks[0].attn.fused_attn = False  # timm's way to see the attention map
    x = images(model)
    seen: list[tuple[Any, ...]] = []
    with torch.no_grad():
        for prepare in (restore, accelerate):  # registered before and after
            module = prepare(model).get_submodule(name)
            hook = module.register_forward_hook(
                lambda _, args, output: seen.append((*args, output))
            )
            model(x)
            hook.remove()
            model(x)
    (their_input, theirs), (our_input, ours) = seen
    assert error(our_input, their_input) <= TOLERANCE
    assert error(ours, theirs) <= TOLERANCE


def test_backward_and_global_hooks_fire():
    model = accelerate(small())
    x, seen = images(model), []
    model.blocks[0].attn.register_full_backward_hook(lambda *args: seen.append("backward"))
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(type(module).__name__)
    )
    model(x).sum().backward()
    handle.remove()
    assert {"backward", "Attention", "Conv2d", "GELU"} <= set(seen)


def test_a_hook_is_explained_and_strict_raises():
    model = small()
    handle = model.blocks[1].attn.register_forward_hook(lambda *args: None)
    plan = explain(accelerate(model))
    assert plan.left_blocks == ["blocks.1"]
    assert "attn has a hook" in str(plan.rows[2].reason)
    with pytest.raises(RuntimeError, match=r"blocks\.1: attn has a hook"):
        accelerate(model, strict=True)
    handle.remove()
    assert explain(model).fully_fused


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def patch_forward(linear: Any) -> None:
    forward = linear.forward
    linear.forward = lambda x: forward(x) + 1


CHANGES = {
    "replaced": lambda block: setattr(block.attn, "qkv", Doubled(block.attn.qkv)),
    "activation": lambda block: setattr(block.mlp, "act", nn.Tanh()),
    "other activation": lambda block: setattr(block.mlp, "act", nn.SiLU()),
    "norm": lambda block: setattr(block, "norm1", nn.RMSNorm(32)),
    "identity": lambda block: setattr(block, "ls1", nn.Identity()),
    "gate": lambda block: setattr(block.attn, "gate", nn.Linear(32, 32)),
    "parametrized": lambda block: nn.utils.parametrize.register_parametrization(
        block.mlp.fc1, "weight", Halved()
    ),
    "pruned": lambda block: random_unstructured(block.mlp.fc2, "weight", 0.5),
    "forward": lambda block: patch_forward(block.attn.proj),
    "scale": lambda block: (
        setattr(block.attn, "scale", 1.0),
        setattr(block.attn, "fused_attn", 0),
    ),
    "weight": lambda block: setattr(
        block.attn.qkv, "weight", nn.Parameter(2 * block.attn.qkv.weight.detach())
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_after_accelerate_count(change):
    model = small()
    x = images(model)
    with torch.no_grad():
        unchanged = model(x)
        change(accelerate(model).blocks[0])
        ours = model(x)
        theirs = restore(model)(x)
    assert error(ours, theirs) <= TOLERANCE
    assert error(theirs, unchanged) > 100 * TOLERANCE


class Quantised(Tensor):
    """A tensor whose memory is not what it stands for."""


def test_weights_that_are_no_plain_tensors_stay_with_timm():
    model = accelerate(small())
    weight = model.blocks[1].mlp.fc2.weight.detach().as_subclass(Quantised)
    model.blocks[1].mlp.fc2.weight = nn.Parameter(weight)
    assert [
        row.reason for row in explain(model).rows if row.module in explain(model).left_blocks
    ] == ["mlp.fc2 has a weight of class Quantised"]


def test_position_and_embedding_changes_count():
    model = accelerate(small())
    with torch.no_grad():
        model.set_input_size(img_size=(64, 32), patch_size=(8, 16))
        x = torch.randn(2, 3, 64, 32)
        ours = model(x)
        model._pos_embed = lambda tokens: tokens.flatten(1, -2)
        ours_patched = model(x)
        theirs_patched = restore(model)(x)
        del model._pos_embed
        theirs = model(x)
    assert error(ours, theirs) <= TOLERANCE
    assert error(ours_patched, theirs_patched) <= TOLERANCE


class Wrapper(nn.Module):
    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = nn.Sequential(encoder, nn.Linear(encoder.num_classes, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def test_inside_a_users_module():
    model: Any = Wrapper(small()).eval()
    x = images(model.encoder[0])
    with torch.no_grad():
        theirs = model(x)
        assert error(accelerate(model, strict=True)(x), theirs) <= TOLERANCE
    assert explain(model).rows[0].module == "encoder.0.patch_embed"
    assert type(model) is Wrapper


def test_bare_block():
    reseed()
    block, x = Block(32, 2, init_values=0.5), torch.randn(2, 5, 32)
    randomise(block)
    with torch.no_grad():
        theirs = block(x)
        assert error(accelerate(block)(x), theirs) <= TOLERANCE
    assert explain(block).fully_fused
