"""`accelerate`, `restore`, `explain` in use: copies, compilers, precision, bad input, the plan."""

import copy
import io
import json
import pickle
import warnings
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from timm_models import TOLERANCE, Doubled, build, classes, error, images, small
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastvit
from fastvit.accelerate import Plan, accelerate, explain, restore
from fastvit.accelerate import plan as plans
from fastvit.kernels import _backend, _device, _hopper

# --------------------------------------------------------------------------- copies and compilers


def through(save, load):
    buffer = io.BytesIO()
    save(buffer)
    buffer.seek(0)
    return load(buffer)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: through(
        lambda file: torch.save(model, file), lambda file: torch.load(file, weights_only=False)
    ),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(copied):
    model = small()
    x = images(model)
    with torch.no_grad():
        theirs = model(x)
        twin = copied(accelerate(model, precision="bf16"))
        assert classes(twin) == classes(model)
        assert torch.equal(twin(x), model(x))
        assert torch.equal(restore(twin)(x), theirs)
        assert twin.__dict__.keys() == restore(model).__dict__.keys()


@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph(training):
    torch._dynamo.reset()
    model = small(dynamic_img_size=True).train(training)
    x = images(model)
    theirs = model(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(accelerate(model), fullgraph=True, backend="aot_eager")
        ours = compiled(x)
    ours.sum().backward()
    assert error(ours.detach(), theirs) <= TOLERANCE
    assert all(p.grad is not None for p in model.parameters())


def test_one_graph_trains_at_every_resolution():
    torch._dynamo.reset()
    model = small(dynamic_img_size=True)
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(accelerate(model), fullgraph=True, backend=count)
    grid, patch = model.patch_embed.grid_size, model.patch_embed.patch_size
    for more in (0, 1, 2, 5):
        x = torch.randn(2, 3, (grid[0] + more) * patch[0], (grid[1] + 2 * more) * patch[1])
        ours = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
        theirs = torch.autograd.grad(restore(model)(x).sum(), list(model.parameters()))
        accelerate(model)
        for a, b in zip(ours, theirs, strict=True):
            assert error(a, b) <= TOLERANCE
    assert count.frame_count <= 2  # the first size, then any


def test_compile_with_precision_and_a_replaced_layer():
    torch._dynamo.reset()
    model = accelerate(small(), precision="bf16")
    model.blocks[0].attn.qkv = Doubled(model.blocks[0].attn.qkv)
    x = images(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert error(compiled(x), model(x)) <= TOLERANCE


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch(strict):
    model = small()
    x = images(model, batch=5)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        theirs = model(x)
        exported = torch.export.export(
            accelerate(model), (x[:2],), dynamic_shapes=shapes, strict=strict
        )
        assert error(exported.module()(x), theirs) <= TOLERANCE


def test_fx_traces_timms_forward():
    model = small()
    x = images(model)
    graph = torch.fx.symbolic_trace(accelerate(model))
    with torch.no_grad():
        assert error(graph(x), restore(model)(x)) <= TOLERANCE


# --------------------------------------------------------------------------- precision


def test_under_autocast():
    model = small()
    x = images(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs = model(x)
        ours = accelerate(model)(x)
    assert error(ours.float(), theirs.float()) <= TOLERANCE
    assert ours.dtype == theirs.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_is_autocast(precision, dtype):
    model = small()
    x = images(model)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype):
            logits = model(x)
        accelerate(model, precision=precision)
        assert error(model(x), logits.float()) <= TOLERANCE
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        final, layers = model.forward_intermediates(x)
        assert {t.dtype for t in (final, *layers, model.forward_features(x))} == {torch.float32}
        accelerate(model)
        assert error(model(x), exact) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_another_dtype(dtype):
    model = small().to(dtype)
    x = images(model).to(dtype)
    with torch.no_grad():
        theirs = model(x)
        ours = accelerate(model, precision="bf16" if dtype == torch.bfloat16 else "keep")(x)
    assert error(ours, theirs) <= TOLERANCE


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "expected", "words"),
    [
        ({"precision": "int3"}, ValueError, "int3.*keep, bf16, fp16, fp8"),
        ({"precision": "fp8"}, ValueError, "needs calibration"),
    ],
)
def test_bad_options(options, expected, words):
    model = small(depth=1)
    before = classes(model)
    with pytest.raises(expected, match=words):
        accelerate(model, **options)
    assert classes(model) == before


def test_precision_needs_a_vit():
    with pytest.raises(ValueError, match=r"bf16.*needs a ViT of timm or torchvision"):
        accelerate(Block(32, 2), precision="bf16")


@pytest.mark.parametrize("function", [accelerate, restore, explain])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"str, not a torch.nn.Module"):
        function("vit_base_patch16_224")


def test_nothing_known(capsys):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(
        RuntimeWarning, match=r"changed nothing: no block of a known library"
    ) as seen:
        assert accelerate(model) is model
    assert len(seen) == 1
    plan = explain(model)
    assert plan.rows == ()
    assert not plan.fully_fused
    assert "no block of a known library (timm, transformers, torchvision" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no block of a known library"):
        accelerate(model, strict=True)


def test_strict_names_every_module_and_changes_nothing():
    model = build("vit_so150m_patch16_reg4_map_256")
    model.blocks[1].mlp.act = nn.Tanh()
    model.attn_pool = nn.Flatten()
    before = classes(model)
    with pytest.raises(RuntimeError) as raised:
        accelerate(model, strict=True)
    assert "blocks.1: mlp.act is Tanh; fused is GELU or" in str(raised.value)
    assert "attn_pool: Flatten has no fused form yet" in str(raised.value)
    assert "blocks.0" not in str(raised.value)
    assert classes(model) == before


def test_strict_on_a_gpu_without_triton(monkeypatch):
    model = small(depth=1)
    monkeypatch.setattr(plans, "_device_type", lambda model: "cuda")
    monkeypatch.setattr(_backend, "gpu_problem", lambda: "triton is not installed")
    with _backend.backend("torch"), pytest.raises(RuntimeError, match="triton is not installed"):
        accelerate(model, strict=True)
    assert type(model) is VisionTransformer


def test_accelerate_twice():
    model = small(depth=1)
    once = classes(accelerate(model))
    assert classes(accelerate(model)) == once
    assert type(restore(model)) is VisionTransformer


def test_subclasses_keep_their_forward():
    model = small()

    class Mine(type(model.blocks[1].ls2)):
        pass

    class Louder(Block):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(x, *args, **kwargs)

    model.blocks[0].__class__ = Louder
    model.blocks[1].ls2.__class__ = Mine
    x = images(model)
    with torch.no_grad():
        theirs = model(x)
        assert error(accelerate(model)(x), theirs) <= TOLERANCE
    reasons = [row.reason for row in explain(model).rows if row.reason]
    assert reasons == [
        "Louder has no fused form yet",
        "ls2 is Mine; fused is Identity or LayerScale",
    ]


# --------------------------------------------------------------------------- explain


def test_explain_groups_and_counts(capsys):
    model = small(depth=5)
    model.blocks[3].norm1 = nn.BatchNorm1d(32)
    plan = explain(model)
    out = capsys.readouterr().out
    assert isinstance(plan, Plan)
    assert "blocks.0-2" in out
    assert "blocks.4" in out
    assert "not called yet" in out
    assert plan.left_blocks == ["blocks.3"]
    assert not plan.accelerated
    accelerated = explain(accelerate(model))
    assert accelerated.accelerated
    assert accelerated.rows == plan.rows
    described = json.loads(accelerated.to_json())
    assert described["fused_blocks"] == ["blocks.0", "blocks.1", "blocks.2", "blocks.4"]
    assert described["rows"][4]["reason"] == (
        "norm1 is BatchNorm1d; fused is LayerNorm or RMSNorm or RmsNorm"
    )
    assert "not called yet" not in capsys.readouterr().out


def test_explain_says_whether_hoppers_kernels_are_used(monkeypatch, capsys):
    assert explain(small()).hopper is None
    monkeypatch.setattr(plans, "_device_type", lambda model: "cuda")
    monkeypatch.setattr(_backend, "gpu_problem", lambda: None)
    monkeypatch.setattr(_backend, "_path", "auto")
    with _device.emulate("sm80"):
        assert explain(small()).hopper == "not used: sm80 is not sm90"
    assert "Hopper's kernels: not used: sm80" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(_hopper, "_triton_version", lambda: "3.6.0")
    assert explain(small()).hopper == "used where a tuning table names them"


def test_own_models_need_no_accelerate():
    model: Any = fastvit.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    before = classes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model, strict=True)
    assert classes(model) == before
    assert explain(model).fully_fused
    model.blocks[1].attn.register_forward_hook(lambda *args: None)
    assert explain(model).left_blocks == ["blocks.1"]
