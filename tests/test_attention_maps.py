"""Attention maps are those of eager attention, for every library's models, accelerated or not."""

import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm_models import build, images, reseed, small
from torch import Tensor, nn
from typer.testing import CliRunner

import fastvit
from fastvit import samples
from fastvit.attention_maps import (
    TokenLayout,
    attention_maps,
    attention_rollout,
    attention_weights,
    patch_attention,
    token_layout,
    watch_attention,
)
from fastvit.cli.main import app

# of weights that sum to 1: behind a block whose attention was fused, float32 rounds otherwise
ROUNDING = 1e-5


@torch.no_grad()
def eager(model: Any, x: Any) -> list[Tensor]:
    """Every softmax that timm's own eager attention computes."""
    found: list[Tensor] = []
    switched = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    softmax = Tensor.softmax

    def spy(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(softmax(self, *args, **kwargs))
        return found[-1]

    for module in switched:
        module.fused_attn = False
    Tensor.softmax = spy  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model(x)
    finally:
        Tensor.softmax = softmax
        for module in switched:
            module.fused_attn = True
    return found


# one of each way to attend: plain, with rotary positions, qk-norm, additive bias, an attention
# pool, two kinds of tokens in front
TIMM = {
    "vit_tiny_patch16_224": {},
    "vit_tiny_patch16_224 qk_norm": {"qk_norm": True},
    "eva02_tiny_patch14_224": {},
    "beit_base_patch16_224": {"embed_dim": 64, "num_heads": 2},
    "vit_relpos_small_patch16_224": {"embed_dim": 64, "num_heads": 2},
    "vit_base_patch16_siglip_224": {"embed_dim": 64, "num_heads": 2},
    "deit_tiny_distilled_patch16_224": {},
}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, accelerated):
    options = {"img_size": (32, 48) if "patch16" in name else (28, 42), "depth": 2, **TIMM[name]}
    reseed()
    model: Any = timm.create_model(name.split()[0], **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(2, 3, *options["img_size"])
    expected = eager(model, x)
    if accelerated:
        fastvit.accelerate(model)
    with torch.no_grad():
        before = model(x)
        maps = attention_maps(model, x)
        assert torch.equal(model(x), before)
    assert [m.module for m in maps][:2] == ["blocks.0.attn", "blocks.1.attn"]
    assert len(maps) == len(expected) == (3 if "siglip" in name else 2)
    for (_, weights), other in zip(maps, expected, strict=True):
        assert weights.shape == other.shape
        assert (weights - other).abs().max() <= ROUNDING
    assert torch.equal(maps[0].weights, expected[0])


@pytest.mark.parametrize("name", ["ViTModel", "CLIPVisionModel"])
def test_transformers(name):
    import transformers

    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, name.replace("Model", "Config"))(**sizes)
    model = getattr(transformers, name)(config).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = attention_maps(model, pixel_values=x)
        model.set_attn_implementation("eager")
        expected = model(pixel_values=x, output_attentions=True).attentions
        again = attention_maps(model, pixel_values=x)
    assert len(maps) == len(expected) == 2
    for mine, twice, theirs in zip(maps, again, expected, strict=True):
        assert (mine.weights - theirs).abs().max() <= ROUNDING
        assert torch.equal(twice.weights, theirs)  # eager code's own tensor


def test_torchvision_and_multihead_attention():
    from torchvision.models import VisionTransformer

    reseed()
    model = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        maps = attention_maps(model, x)
        assert torch.equal(model(x), plain)
        layer: Any = model.encoder.layers[0]
        tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(x)], dim=1)
        h = layer.ln_1(tokens + model.encoder.pos_embedding)
        expected = layer.self_attention(h, h, h, average_attn_weights=False)[1]
    names = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in (0, 1)]
    assert [m.module for m in maps] == names
    assert (maps[0].weights - expected).abs().max() <= ROUNDING
    assert token_layout(model, (32, 32), 17) == TokenLayout(1, (4, 4), True)


def test_own_model_on_both_paths(triton_path):
    model = fastvit.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, qk_norm=True
    ).eval()
    twin: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, qk_norm=True
    ).eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        maps = attention_maps(model, x)
    for mine, theirs in zip(maps, eager(twin, x), strict=True):
        assert (mine.weights - theirs).abs().max() <= ROUNDING


def test_compiled_model():
    torch._dynamo.reset()
    model = small()
    x = images(model)
    with torch.no_grad():
        expected = attention_maps(model, x)
        compiled: Any = torch.compile(model, backend="eager")
        compiled(x)
        maps = attention_maps(compiled, x)
    for mine, theirs in zip(maps, expected, strict=True):
        assert torch.equal(mine.weights, theirs.weights)


def test_hooks_and_paths_are_gone_afterwards():
    model = fastvit.accelerate(small())
    x = images(model)
    with pytest.raises(TypeError, match="unexpected keyword"):
        attention_maps(model, x, planted=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert fastvit.explain(model).fully_fused


def test_weights_carry_gradients_and_masks_apply():
    model = small()
    mask = torch.ones(11, 11, dtype=torch.bool)  # 8 patches, a class token, 2 registers
    mask[:, 4] = False
    (last,) = attention_maps(model, images(model), blocks=1, attn_mask=mask)
    assert last.weights[..., 4].eq(0).all()
    last.weights[:, :, 0].square().sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(None, [0, 1, 2, 3]), (1, [3]), ([0, -2], [0, 2]), ([-1, 1], [3, 1]), (3, [1, 2, 3])],
)
def test_choosing_blocks(blocks, expected):
    model = build("vit_tiny_patch16_224", depth=4, embed_dim=32, num_heads=2)
    maps = attention_maps(model, images(model), blocks=blocks)
    assert [m.module for m in maps] == [f"blocks.{i}.attn" for i in expected]


def test_unwanted_maps_are_freed():
    model = build("vit_tiny_patch16_224", depth=4, embed_dim=32, num_heads=2)
    alive: list[int] = []
    with watch_attention(model, blocks=[0, -2]):
        watcher = torch.overrides._get_current_function_mode()
        hook = model.norm.register_forward_pre_hook(
            lambda *_: alive.append(sum(m is not None for m in watcher.seen))  # pyright: ignore
        )
        model(images(model))
    hook.remove()
    assert alive == [3]  # block 0, and the two that -2 may still mean


@pytest.mark.parametrize("blocks", [[4], [-3], 3])
def test_blocks_that_are_not_there(blocks):
    model = small()
    with pytest.raises(ValueError, match="do not name some of 2 blocks"):
        attention_maps(model, images(model), blocks=blocks)


def test_no_attention_is_an_error():
    with pytest.raises(ValueError, match="no attention was seen in this Linear"):
        attention_maps(nn.Linear(3, 3), torch.randn(2, 3))


def test_differential_attention_has_both_maps():
    reseed()
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1,
        attn_layer=timm.layers.DiffAttention,  # pyright: ignore[reportPrivateImportUsage]
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 32, 32)
    (pair,) = attention_maps(model, x)
    heads = model.blocks[0].attn.num_heads
    assert pair.weights.shape == (1, 2 * heads, 5, 5)
    with pytest.raises(ValueError, match="no rollout"):
        attention_rollout(model, x)


@pytest.mark.parametrize("case", ["plain", "bool", "float", "causal", "gqa", "scale"])
def test_weights_times_values_are_the_attention(case):
    reseed()
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64).unbind(0)
    options: dict[str, Any] = {
        "plain": {},
        "bool": {"attn_mask": torch.tensor([[True] * 4 + [False]] * 4 + [[False] * 5])},
        "float": {"attn_mask": torch.randn(5, 5, dtype=torch.float64)},
        "causal": {"is_causal": True},
        "gqa": {"enable_gqa": True},
        "scale": {"scale": 0.7},
    }[case]
    k, v = (k[:, :2], v[:, :2]) if case == "gqa" else (k, v)
    weights = attention_weights(q, k, v, **options)
    out = F.scaled_dot_product_attention(q, k, v, **options)
    values = v.repeat_interleave(2, dim=1) if case == "gqa" else v
    torch.testing.assert_close(weights @ values, out)


# --------------------------------------------------------------------------- rollout, patches


def test_rollout():
    model = small()
    x = images(model)
    with torch.no_grad():
        maps = [m.weights.mean(1).double() for m in attention_maps(model, x)]
        rollout = attention_rollout(model, x)
    eye = torch.eye(11, dtype=torch.float64)
    expected = (0.5 * maps[1] + 0.5 * eye) @ (0.5 * maps[0] + 0.5 * eye)
    assert (rollout - expected).abs().max() <= ROUNDING
    assert (rollout.sum(-1) - 1).abs().max() <= ROUNDING


def test_rollout_leaves_an_attention_pool_out():
    model = build("vit_base_patch16_siglip_224", embed_dim=32, num_heads=2)
    assert attention_rollout(model, images(model)).shape == (2, 6, 6)


def test_patches_of_every_kind_of_model():
    weights = torch.rand(2, 3, 8, 8)
    with_class = patch_attention(weights, TokenLayout(2, (2, 3), True))
    assert torch.equal(with_class, weights[:, :, 0, 2:].unflatten(-1, (2, 3)))
    without = patch_attention(weights, TokenLayout(2, (2, 3), False))
    assert torch.equal(without, weights[:, :, 2:, 2:].mean(-2).unflatten(-1, (2, 3)))
    pool = torch.rand(2, 3, 1, 6)
    of_pool = patch_attention(pool, TokenLayout(0, (2, 3), False))
    assert torch.equal(of_pool.flatten(-2), pool[:, :, 0])


def test_layouts():
    model = small()
    assert token_layout(model, (32, 64), 11) == TokenLayout(3, (2, 4), True)
    registers_only = small(class_token=False, global_pool="avg")
    assert token_layout(registers_only, (32, 64), 10) == TokenLayout(2, (2, 4), False)
    with pytest.raises(ValueError, match="12 tokens are not a grid of 2x4 patches after 3 prefix"):
        token_layout(model, (32, 64), 12)
    with pytest.raises(ValueError, match="17 prefix"):
        token_layout(nn.Sequential(nn.Conv2d(3, 8, 16, 16)), (32, 32), 21)
    with pytest.raises(ValueError, match="no convolution in this Linear cuts patches"):
        token_layout(nn.Linear(2, 2), (32, 32), 4)


# --------------------------------------------------------------------------- the command


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["attention-map", *arguments])


def test_command(tmp_path):
    done = command("chelsea", "--img-size", "112", "--out", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "attention.json").read_text())
    assert json.loads(done.stdout) == record
    assert record["shown"] == "attention of the class token in blocks.11.attn"
    assert (record["grid"], record["prefix_tokens"]) == ([8, 8], 1)
    assert [m["name"] for m in record["maps"]] == ["mean of heads"] + [
        f"head {i}" for i in range(6)
    ]

    vit: Any = timm.create_model(samples.DINOV2_SMALL, img_size=112, num_classes=0)
    vit.load_state_dict(samples.dinov2_small(112))
    last = eager(vit.eval(), samples.preprocess(samples.photo("chelsea"), 112))[-1][0]  # (H, N, N)
    for entry, head in zip(record["maps"][1:], last, strict=True):
        ours = torch.tensor(entry["weights"]).flatten()
        assert (ours - head[0, 1:]).abs().max() <= 1e-5  # 12 blocks lie before
        assert entry["prefix_share"] == pytest.approx(float(head[0, 0]), abs=1e-5)
        assert divmod(int(head[0, 1:].argmax()), 8) == tuple(entry["strongest_patch"])

    picture = np.asarray(Image.open(tmp_path / "attention.png").convert("RGB")).astype(float)
    height, width, _ = picture.shape
    for i in range(7):  # every panel shows something, each another thing
        row, column = divmod(i, 4)
        top, left = round(height * (0.07 + 0.45 * row)), round(width * (0.03 + 0.247 * column))
        inside = picture[top : top + height // 4, left : left + width // 6]
        assert inside.std(axis=(0, 1)).max() > 5


def test_command_for_one_head_and_rollout(tmp_path):
    done = command("--img-size", "56", "--block", "2", "--head", "3", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "head 3" in done.output
    assert "blocks.2.attn" in done.output
    done = command("--img-size", "56", "--rollout", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "rollout to the class token through all blocks" in " ".join(done.output.split())
    assert (tmp_path / "attention.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jpg"], "cannot read 'absent.jpg' as an image"),
        (["--img-size", "100"], "14x14 does not divide image size 100x100"),
        (["--img-size", "56", "--block", "12"], "do not name some of 12 blocks"),
        (["--img-size", "56", "--head", "6"], "has heads 0 to 5"),
        (["--rollout", "--head", "1"], "leave --head out"),
        (["--model", "vit_bse_patch16_224"], "nearest: vit_base_patch16_224"),
    ],
)
def test_command_names_bad_input(tmp_path, arguments, message):
    done = command(*arguments, "--out", str(tmp_path))
    assert done.exit_code == 1
    assert message in " ".join(done.stderr.split())
