"""Training through the kernels, in the interpreter: gradients of whole models, what a block keeps
for the backward, checkpointing, stochastic depth, DDP, and the losses of a few steps."""

import copy
import functools
import gc
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from seeds import SEED
from timm.models.vision_transformer import Block
from timm_models import randomise
from torch import nn

import fastvit
from fastvit import numerics, ops, parts
from fastvit.check.launches import recorded
from fastvit.kernels import _device


def small_vit(seed=SEED, **options):
    """Two blocks 32 wide on 8 patches; every vector random."""
    torch.manual_seed(seed)
    options = {"init_values": 0.5, "depth": 2, "embed_dim": 32, "num_heads": 2, **options}
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), num_classes=5, **options)
    randomise(model)
    return model


def pixels(batch=2, seed=SEED):
    return torch.randn(batch, 3, 32, 64, generator=torch.Generator().manual_seed(seed))


def gradients(model, images, target):
    model.zero_grad()
    loss = F.cross_entropy(model(images), target)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


# --------------------------------------------------------------------------- whole models


@pytest.mark.parametrize(
    ("autocast", "draws"), [(None, 3), pytest.param(torch.bfloat16, 6, marks=pytest.mark.slow)]
)
def test_every_parameter_of_a_timm_model_passes_the_policy(triton_path, autocast, draws):
    """Over several draws, as a vector here has 32 values, whose errors come from the roundings of
    all layers before: the largest of so few is luck. Fixed ones, so that what passes goes on
    passing."""
    reports = []
    for seed in range(draws):
        model = small_vit(seed)
        names = [name for name, _ in model.named_parameters()]
        fast = fastvit.accelerate(copy.deepcopy(model), strict=True)
        reports.append(
            numerics.compare_models(
                fast, model, pixels(seed=seed), gradients=names, seed=seed, autocast=autocast
            )
        )
        assert len(reports[-1].rows) == 2 + len(names)
    for rows in zip(*(report.rows for report in reports), strict=True):
        ours, eager = (
            (max(getattr(row, f"{who}max_error") for row in rows),
             math.hypot(*(getattr(row, f"{who}rms_error") for row in rows)))
            for who in ("", "eager_")
        )  # fmt: skip
        for our_error, eager_error in zip(ours, eager, strict=True):
            assert our_error <= numerics.ALLOWED_RATIO * eager_error + rows[0].ulp, rows


@pytest.mark.slow
def test_a_few_steps_have_the_losses_of_the_torch_path(triton_path):
    """Digits-like data: a class is a bright quarter; both paths from the same weights."""
    torch.manual_seed(SEED)
    start = fastvit.VisionTransformer(
        img_size=16, patch_size=8, in_chans=1, embed_dim=32, depth=1, num_heads=2, num_classes=4
    )
    target = torch.arange(8) % 4
    quarters = F.one_hot(target, 4).view(8, 1, 2, 2).float()
    images = F.interpolate(quarters, (16, 16)) + 0.3 * torch.randn(8, 1, 16, 16)

    def train(path):
        model = copy.deepcopy(start).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        with ops.backend(path):
            for _ in range(4):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), target)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses

    ours, plain = train("triton"), train("torch")
    assert plain[-1] < 0.9 * plain[0]  # it does learn
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) < 1e-4


def test_ddp_wraps_an_accelerated_model(triton_path, tmp_path):
    model = fastvit.accelerate(small_vit(depth=1), strict=True)
    images, target = pixels(), torch.tensor([1, 4])
    loss, expected = gradients(copy.deepcopy(model), images, target)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        ours, grads = gradients(nn.parallel.DistributedDataParallel(model), images, target)
        gc.collect()  # a wrapper that outlives its group may wait for the group's threads for ever
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(ours, loss)
    assert {name.removeprefix("module."): g for name, g in grads.items()}.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(grads[f"module.{name}"], grad), name


# --------------------------------------------------------------------------- memory


def kept_bytes(block, x, *, autocast):
    """Bytes that a forward keeps for the backward: each storage once, without parameters and the
    copies of them that autocast makes."""
    shapes = {p.shape for p in block.parameters()} | {p.t().shape for p in block.parameters()}
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.shape not in shapes:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = block(x)
    assert y.requires_grad  # which also keeps the storages alive, so that no address comes twice
    return sum(storages.values())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}, {"drop_path": 0.2}], ids=str)
def test_a_block_keeps_at_most_0_7_of_timms(triton_path, options, autocast):
    """10 D a token (x, qkv, attention's output, x again, what goes into the activation), where
    timm's eager block keeps 16 D, with LayerScale 18 D; under autocast 24 D bytes against 36 D."""
    torch.manual_seed(SEED)
    width, batch, tokens = 64, 3, 17
    block = Block(width, 2, qkv_bias=True, **options).train()
    x = torch.randn(batch, tokens, width, requires_grad=True)
    with ops.backend("torch"):
        theirs = kept_bytes(copy.deepcopy(block), x, autocast=autocast)
    ours = kept_bytes(fastvit.accelerate(nn.Sequential(block), strict=True), x, autocast=autocast)
    unit = batch * tokens * width
    # and a little for attention's log-sum-exps and stochastic depth
    assert ours <= (25 if autocast else 41) * unit
    assert ours <= 0.7 * theirs


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "bfloat16 autocast"])
def test_vit_b_16s_training_step_keeps_at_most_0_7_of_timms(autocast):
    """Three of its blocks at their own size, by the kernels that sm_90 takes, of which only the
    launches are made."""
    blocks = nn.Sequential(*(Block(768, 12, qkv_bias=True) for _ in range(3))).train()
    blocks.to(torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(1, 197, 768, dtype=torch.bfloat16, requires_grad=True)
    theirs = kept_bytes(copy.deepcopy(blocks), x, autocast=autocast)
    fast = fastvit.accelerate(blocks, strict=True)
    with _device.emulate("sm90"), recorded() as launches:
        ours = kept_bytes(fast, x, autocast=autocast)
    assert "attention_head_kernel" in {launch.kernel.fn.__name__ for launch, _ in launches}
    print(f"kept: {ours / 591:,.0f} bytes a token and block; timm {theirs / 591:,.0f}")
    assert ours <= 0.7 * theirs


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing(triton_path, compiled, launched):
    """Blocks that run again in the backward give the same losses and the same gradients."""
    torch._dynamo.reset()
    model: Any = fastvit.accelerate(small_vit(depth=1), strict=True).train()
    images, target = pixels(), torch.tensor([1, 4])
    loss, expected = gradients(model, images, target)
    model.set_grad_checkpointing()
    launched.clear()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    ours, grads = gradients(run, images, target)
    names = [prepared.kernel.fn.__name__ for prepared in launched]
    assert names.count("layer_norm_kernel") == 5  # the block's two, twice, and the model's
    torch.testing.assert_close(ours, loss)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[compiled * "_orig_mod." + name], grad)


# --------------------------------------------------------------------------- stochastic depth


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("init_values", [pytest.param(None, marks=pytest.mark.slow), 0.5])
def test_stochastic_depth_drops_what_timm_drops(triton_path, path, init_values):
    """From the same seed, with the same gradients."""
    model = small_vit(drop_path_rate=0.6, init_values=init_values).train()
    images, target = pixels(batch=6), torch.arange(6) % 5
    runs = []
    for m in (copy.deepcopy(model), fastvit.accelerate(copy.deepcopy(model), strict=True)):
        torch.manual_seed(SEED)
        with ops.backend("torch" if not runs else path):
            runs.append(gradients(m, images, target))
    (loss, theirs), (ours_loss, ours) = runs
    torch.testing.assert_close(ours_loss, loss, rtol=1e-5, atol=1e-5)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_stochastic_depth_rides_in_the_linears(triton_path, monkeypatch):
    """Both halves of a block, and a factor a sample: 0 or 1 / keep."""
    factors = []

    def spy(real, *args, **kwargs):
        if kwargs.get("row_scale") is not None:
            factors.append(kwargs["row_scale"])
        return real(*args, **kwargs)

    for name in ("linear", "mlp"):
        monkeypatch.setattr(ops, name, functools.partial(spy, getattr(ops, name)))
    torch.manual_seed(SEED)
    block = fastvit.accelerate(nn.Sequential(Block(32, 2, drop_path=0.5)), strict=True).train()
    block(torch.randn(16, 3, 32))
    assert len(factors) == 2
    for factor in factors:
        assert factor.shape == (16, 3)
        assert (factor == factor[:, :1]).all()
        assert set(factor[:, 0].tolist()) == {0.0, 2.0}
    block.eval()(torch.randn(16, 3, 32))
    assert len(factors) == 2


def test_dropout_takes_the_unfused_way(triton_path):
    """From the same seed, with the same masks: those of the torch path."""
    torch.manual_seed(SEED)
    block = Block(32, 2, proj_drop=0.4, init_values=0.5).train()
    randomise(block)
    block = fastvit.accelerate(nn.Sequential(block), strict=True)
    x = torch.randn(3, 5, 32)
    outputs = []
    for path in ("torch", "triton"):
        torch.manual_seed(SEED)
        with ops.backend(path):
            outputs.append(block(x))
    torch.testing.assert_close(*outputs)


def test_a_norm_without_weights_runs_apart():
    """`ops.mlp` takes a norm by its weight, so one without runs before it."""
    norm = nn.LayerNorm(8, elementwise_affine=False)
    x = torch.randn(2, 3, 8)
    h, options = parts.norm_in_front(norm, x)
    assert options == {}
    torch.testing.assert_close(h, norm(x))
    norm_layer: Any = functools.partial(nn.LayerNorm, elementwise_affine=False)
    block = Block(8, 2, norm_layer=norm_layer).eval()
    theirs = block(x)
    torch.testing.assert_close(fastvit.accelerate(block)(x), theirs)
