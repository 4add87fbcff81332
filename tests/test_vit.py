"""What `VisionTransformer` does beyond timm's, in every setting it is used in; bad input."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from vit_models import TINY, assert_close, differ, images, same_weights, tiny

import fastvit

TABLE = "attn.rel_pos.relative_position_bias_table"


def test_bytes_are_normalised_with_the_models_mean_and_std():
    model = fastvit.create_model("deit_tiny_patch16_224", img_size=32, depth=1).eval()
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(model.default_cfg[key])[:, None, None] for key in ("mean", "std"))
    assert_close(model(raw), model((raw / 255 - mean) / std))
    with pytest.raises(ValueError, match="default_cfg"):
        tiny()(raw)


@pytest.mark.parametrize(
    ("pos_embed", "tables"),
    [
        ("none", set()),
        ("learned", {"pos_embed"}),
        ("2d", {"pos_embed_x", "pos_embed_y"}),
        ("relative", {f"blocks.0.{TABLE}", f"blocks.1.{TABLE}"}),
    ],
)
def test_position_embeddings_tell_patches_apart(pos_embed, tables):
    model = tiny(pos_embed=pos_embed, reg_tokens=1)
    x = images(model)
    moved = x.clone()  # two of its patches exchanged
    moved[:, :, :8, :8], moved[:, :, 8:16, 16:24] = x[:, :, 8:16, 16:24], x[:, :, :8, :8]
    assert differ(model(x), model(moved)) == (pos_embed != "none")
    model.train()(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert {key for key, _ in model.named_parameters() if "pos" in key} == tables
    assert tables <= model.no_weight_decay()
    model.eval().set_input_size((16, 48))
    assert model(torch.randn(1, 3, 16, 48)).shape == (1, 5)


def test_the_2d_embedding_is_the_learned_one_of_its_columns_and_rows():
    axes = tiny(pos_embed="2d", dynamic_img_size=True)
    flat = tiny(no_embed_class=True)
    state = axes.state_dict()
    x, y = state.pop("pos_embed_x"), state.pop("pos_embed_y")
    rows = [torch.cat([x[0, j], y[0, i]]) for i in range(4) for j in range(4)]
    flat.load_state_dict({**state, "pos_embed": torch.stack(rows)[None]})
    square, wide = images(flat), torch.randn(1, 3, 24, 56)
    assert_close(axes(square), flat(square))
    flat.set_input_size((24, 56))
    assert_close(axes(wide), flat(wide))


def test_the_relative_bias_is_added_to_any_mask():
    # averaged, so that the bias of every query counts
    relative: Any = tiny(pos_embed="relative", depth=1, global_pool="avg")
    plain = tiny(pos_embed="none", depth=1, global_pool="avg")
    state = relative.state_dict()
    del state[f"blocks.0.{TABLE}"]
    plain.load_state_dict(state)
    x, bias = images(plain), relative.blocks[0].attn.rel_pos()
    assert differ(relative(x), plain(x))
    assert_close(relative(x), plain(x, attn_mask=bias))
    added = torch.randn(2, 2, 17, 17)
    assert_close(relative(x, added), plain(x, bias + added))
    keep = torch.rand(2, 1, 17, 17) > 0.3
    keep[..., 0] = True
    assert_close(relative(x, keep), plain(x, bias.masked_fill(~keep, float("-inf"))))


def test_the_mlp_head_is_a_tanh_layer_until_fine_tuning():
    model = tiny(head="mlp")
    x, p = images(model), dict(model.named_parameters())
    pooled = model.forward_features(x)[:, 0]
    hidden = torch.tanh(pooled @ p["pre_logits.fc.weight"].T + p["pre_logits.fc.bias"])
    assert_close(model.forward_head(model.forward_features(x), pre_logits=True), hidden)
    assert_close(model(x), hidden @ p["head.weight"].T + p["head.bias"])
    model.reset_classifier(3, zero_init=True)
    assert not [key for key in model.state_dict() if key.startswith("pre_logits")]
    assert torch.equal(model(x), torch.zeros(2, 3))


def test_hooks_are_called_once_and_change_nothing():
    model = tiny(init_values=0.5, pos_embed="relative")
    x = images(model)
    wanted, calls = model(x), []
    for key, module in model.named_modules():
        if key.endswith("attn_drop"):  # its rate goes into the attention op, in timm as well
            continue
        handle = module.register_forward_hook(lambda *arguments: calls.append(1))
        assert_close(model(x), wanted)
        assert calls == [1], key
        handle.remove()
        calls.clear()
    with nn.modules.module.register_module_forward_hook(lambda *arguments: calls.append(1)):
        assert_close(model(x), wanted)
    assert len(calls) == len(list(model.modules())) - len(model.blocks)


@pytest.mark.parametrize("key", ["patch_embed.proj", "blocks.1.attn.qkv", "blocks.1.mlp.fc2"])
def test_replaced_layers_are_used(key):
    model = tiny()
    x, wanted = images(model), model(images(model))
    layer, (parent, _, name) = model.get_submodule(key), key.rpartition(".")

    class Replaced(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * layer(x)

    setattr(model.get_submodule(parent), name, Replaced())
    replaced = model(x)
    setattr(model.get_submodule(parent), name, layer)
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)
    assert_close(model(x), replaced)
    del layer.forward
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    assert_close(replaced, model(x))
    assert differ(replaced, wanted)


def test_grad_checkpointing_runs_blocks_again_in_the_backward_pass():
    model, calls = tiny(), []
    model.set_grad_checkpointing()
    model.blocks[0].register_forward_pre_hook(lambda *arguments: calls.append(1))
    with torch.no_grad():
        model(images(model))
    assert len(calls) == 1
    loss = model(images(model)).sum()
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 3


def test_copies_and_pickles():
    model = tiny(pos_embed="relative")
    x = images(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert same_weights(other, model)


def test_functional_call_uses_the_weights_it_is_given():
    model, other = tiny(), tiny()
    x = images(model)
    given = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
    assert torch.equal(given, other(x))


@pytest.mark.parametrize(
    "options",
    [{}, {"pos_embed": "2d", "dynamic_img_size": True}, {"pos_embed": "relative"}],
    ids=str,
)
def test_compile_in_one_graph(options):
    torch._dynamo.reset()
    model = tiny(**options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(model)
    assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model.patch_embed.proj.weight.grad is not None


@pytest.mark.parametrize("pos_embed", ["learned", "2d"])
def test_one_graph_for_every_resolution(pos_embed):
    torch._dynamo.reset()
    model = tiny(pos_embed=pos_embed, dynamic_img_size=True)
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=count)
    patch = model.patch_embed.patch_size[0]
    for rows, columns in ((4, 4), (5, 6), (8, 3), (9, 9)):
        x = torch.randn(2, 3, rows * patch, columns * patch)
        gradients = [
            torch.autograd.grad(run(x).sum(), list(model.parameters())) for run in (compiled, model)
        ]
        assert_close(*gradients)
    assert count.frame_count <= 2  # the first size, then any


def test_export_with_a_dynamic_batch():
    model = tiny(global_pool="map", reg_tokens=1)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(model, 3),), dynamic_shapes={"x": {0: batch}})
    for size in (1, 5):
        x = images(model, size)
        assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    model = tiny()
    x = images(model).to(dtype)
    with torch.inference_mode():
        out = model.to(dtype)(x)
        wanted = model.double()(x.double())
    assert out.dtype == dtype
    # rounded weights are part of both; two blocks of rounded activations cost some tens of units
    # in the last place of the largest output
    allowed = 50 * torch.finfo(dtype).eps * float(wanted.abs().max())
    assert float((out - wanted).abs().max()) <= allowed


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax", "map", ""])
def test_an_empty_batch_gives_an_empty_output(pool):
    model = tiny(global_pool=pool)
    assert model(images(model, 0)).shape == ((0, 5) if pool else (0, 17, 5))
    assert model.forward_intermediates(images(model, 0))[1][0].shape == (0, 32, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "embed_dim 32 is not divisible by num_heads 5"),
        ({"img_size": 30}, ValueError, "patch size 8x8 does not divide image size 30x30"),
        ({"img_size": (8, 0)}, ValueError, r"\(8, 0\) is not a size"),
        ({"global_pool": "mean"}, ValueError, "global_pool='mean' is not one of"),
        ({"pos_embed": "rotary"}, ValueError, "'none', 'learned', '2d', 'relative'"),
        ({"act_layer": "mish"}, ValueError, "act_layer='mish' is not one of 'gelu'"),
        ({"head": "deep"}, ValueError, "head='deep'"),
        ({"weight_init": "jax"}, ValueError, "weight_init='jax'"),
        ({"class_token": False}, ValueError, "needs class_token"),
        ({"embed_dim": 33, "num_heads": 3, "pos_embed": "2d"}, ValueError, "which is 33"),
        ({"pos_embed": "relative", "dynamic_img_size": True}, ValueError, "set_input_size"),
        ({"patch_drop_rate": 0.5}, TypeError, "patch_drop_rate"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        fastvit.VisionTransformer(**{**TINY, **options})


def test_an_unknown_name_gets_the_three_nearest():
    with pytest.raises(ValueError, match=r"nearest: vit_base_patch\S+, \S+, \S+$"):
        fastvit.create_model("vit_bass_patch16_224")
    with pytest.raises(ValueError, match=r"nearest: \S+, \S+, \S+$"):
        fastvit.create_model("")


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 3, 40, 32), ValueError, "image size 40x32 is not the model's 32x32"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"\[1, 1, 32, 32\] are not \[B, 3, H, W\]"),
        (torch.zeros(3, 32, 32), ValueError, r"\[3, 32, 32\] are not"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "meta"),
    ],
    ids=lambda value: f"{value.dtype}-{list(value.shape)}" if isinstance(value, Tensor) else "",
)
def test_images_that_do_not_fit(x, error, message):
    model = tiny()
    for run in (model, model.forward_intermediates):
        with pytest.raises(error, match=message):
            run(x)


def test_a_dynamic_model_takes_multiples_of_its_patch_only():
    with pytest.raises(ValueError, match="36x32 is not a multiple of the patch size 8x8"):
        tiny(dynamic_img_size=True)(torch.zeros(1, 3, 36, 32))


def test_set_input_size_refuses_what_does_not_fit_and_changes_nothing():
    model = tiny()
    before = copy.deepcopy(model)
    for size in ({"img_size": 33}, {"patch_size": 5}, {"img_size": (32, 32, 3)}):
        with pytest.raises(ValueError, match=r"does not divide|is not a size"):
            model.set_input_size(**size)
        assert same_weights(model, before)
        assert model.patch_embed.img_size == (32, 32)
        assert model.patch_embed.patch_size == (8, 8)


def test_methods_refuse_what_does_not_fit():
    model = tiny()
    for indices in (0, 3, [2], [-3], []):
        with pytest.raises(ValueError, match="of 2 blocks"):
            model.forward_intermediates(images(model), indices)
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(images(model), output_fmt="NHWC")
    with pytest.raises(ValueError, match="'map' cannot be added"):
        model.reset_classifier(3, "map")
    with pytest.raises(ValueError, match="needs a class token"):
        tiny(class_token=False, global_pool="avg").reset_classifier(3, "token")
