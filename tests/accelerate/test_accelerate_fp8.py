"""`accelerate` with fp8: what runs, when, and that weights are followed. E4m3 is emulated, which is
quicker than the interpreter, unless a test asks for kernels."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from fake_cuda import Cuda
from timm_models import TOLERANCE, Doubled, error, images, randomise, reseed, small
from torch import nn

import fastvit
from fastvit import ops
from fastvit.accelerate import fp8, graphs
from fastvit.accelerate.fp8 import QUANTIZED

DEPTH = 2


def own(**options: Any) -> Any:
    """fastvit's model of the same size as `small`."""
    reseed()
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": DEPTH, "img_size": (32, 64)}
    model = fastvit.create_model("vit_tiny_patch16_224", **sizes, init_values=0.5, **options)
    randomise(model)
    return model.eval()


BUILD = {"timm": small, "own": own, "own, relative": lambda: own(pos_embed="relative")}
each_model = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
NEAR = 0.1  # 3 significant bits a value, averaged over 32 terms


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """How often `fp8_linear` was called, as a list that grows."""
    seen = []
    run = fp8.fp8_linear

    def spy(*args, **kwargs):
        seen.append("fp8_linear")
        return run(*args, **kwargs)

    monkeypatch.setattr(fp8, "fp8_linear", spy)
    return seen


def given(model: Any, **options: Any) -> Any:
    return fastvit.accelerate(model, precision="fp8", calibration=images(model), **options)


def like_new(model: Any, x: torch.Tensor) -> torch.Tensor:
    """What a model with these weights gives that has had no others."""
    fresh = fastvit.restore(copy.deepcopy(model))
    fastvit.accelerate(fresh, precision="fp8", calibration=x)
    for block, old in zip(fresh.blocks, model.blocks, strict=True):
        setattr(block, QUANTIZED, fp8.Quantized(old.__dict__[QUANTIZED].scales))
    return fresh(x)


# --------------------------------------------------------------------------- what runs


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_is_near_and_the_emulation_agrees(triton_path, build, dtype, calls):
    model = build().to(dtype)
    x = images(model, 4).to(dtype)
    expected = model(x).double()
    fast = fastvit.accelerate(model, precision="fp8", calibration=x)
    ours = fast(x)
    assert ours.dtype == dtype
    assert len(calls) == 4 * DEPTH
    # 4 significant bits a value: FACTS of real models are 1 - cosine of 1e-2 at most
    assert nn.functional.cosine_similarity(ours.double(), expected, dim=1).min() > 0.98
    with ops.backend("torch"):
        plain = fast(x)
    assert nn.functional.cosine_similarity(ours.double(), plain.double(), dim=1).min() > 0.995


def test_inner_norms_and_odd_parts(calls):
    model = small(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=None)
    x = images(model)
    fast = given(copy.deepcopy(model))
    assert error(fast(x), model(x)) < NEAR
    n = model.forward_features(x).shape[1]
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    expected = model.forward_features(x, attn_mask=mask)
    masked = fast.forward_features(x, attn_mask=mask)
    assert error(masked, expected) < NEAR < error(model.forward_features(x), expected)
    assert len(calls) == 2 * 4 * DEPTH


def test_a_block_by_itself_and_intermediates(calls):
    model = small()
    x = torch.randn(2, 7, 32)
    expected = model.blocks[0](x)
    fast = given(model)
    assert error(fast.blocks[0](x), expected) < NEAR
    assert calls
    fast.forward_intermediates(images(fast))


def test_hooks_of_blocks_see_every_block(calls):
    model = given(small())
    x = images(model)
    expected = model(x)
    calls.clear()
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(model(x), expected)
    assert seen == [1]
    assert len(calls) == 4 * DEPTH  # each block by itself
    handle.remove()
    changed = model.blocks[0].register_forward_hook(lambda m, a, y: 2 * y)
    assert error(model(x), expected) > 0.01
    changed.remove()
    assert torch.equal(model(x), expected)


def test_hooked_and_replaced_layers_are_called(calls):
    model = given(small())
    x = images(model)
    model(x)
    full = len(calls)
    calls.clear()
    seen = []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda *args: seen.append(1))
    model(x)
    assert seen == [1]
    assert 0 < len(calls) < full
    handle.remove()
    before = model(x)
    model.blocks[0].mlp.fc1 = Doubled(model.blocks[0].mlp.fc1)
    assert error(model(x), before) > 0.01


@pytest.mark.parametrize("build", [small, own], ids=["timm", "own"])
def test_training_gradients_and_tracing_run_without(build, calls):
    model = build()
    x = images(model)
    expected = model(x)
    given(model)
    with torch.enable_grad():
        assert error(model(x).detach(), expected) < TOLERANCE
        model(x).sum().backward()
    assert model.blocks[0].norm1.weight.grad is not None
    model.train()
    assert error(model(x), expected) < TOLERANCE
    model.eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert error(compiled(x), expected) < TOLERANCE
    assert calls == []


def test_weights_made_in_inference_mode_are_left_alone(calls):
    with torch.inference_mode():
        model = small()
        x = images(model)
        expected = model(x)
        assert error(given(model)(x), expected) < TOLERANCE
    assert calls == []


# --------------------------------------------------------------------------- following the weights


def _in_place(model: Any) -> None:
    model.blocks[0].norm1.weight.mul_(1.5)
    model.blocks[1].mlp.fc1.weight.add_(0.1)
    model.blocks[1].norm2.bias.add_(1)
    model.blocks[0].ls1.gamma.mul_(3)
    model.blocks[1].mlp.fc2.bias.add_(0.1)


def _in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        _in_place(model)


def _loaded(model: Any) -> None:
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def _replaced(model: Any) -> None:
    qkv = model.blocks[0].attn.qkv
    qkv.weight = nn.Parameter(2 * qkv.weight)


def _other_memory(model: Any) -> None:
    fc1 = model.blocks[0].mlp.fc1
    fc1.weight.data = 2 * fc1.weight.data


def _stepped(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with torch.enable_grad():
        model(images(model)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


CHANGES = [_in_place, _in_inference_mode, _loaded, _replaced, _other_memory, _stepped]


@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_show_at_once(change):
    model = given(small())
    x = images(model)
    before = model(x)
    change(model)
    ours = model(x)
    assert error(ours, before) > 1e-3
    assert torch.equal(ours, like_new(model, x))


def test_another_dtype_derives_anew():
    model = given(small())
    x = images(model)
    model(x)
    model.bfloat16()
    ours = model(x.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, like_new(model, x.bfloat16()))


def test_derived_weights_travel_nowhere():
    model = small()
    names = list(model.state_dict())
    x = images(model)
    given(model)
    expected = model(x)
    assert model.blocks[0].__dict__[QUANTIZED].derived
    assert list(model.state_dict()) == names
    assert {name for name, _ in model.named_buffers()} == set()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied = copy.deepcopy(model)
    for other in (copied, pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(other.blocks[0].__dict__[QUANTIZED]) is fp8.Quantized
        assert not other.blocks[0].__dict__[QUANTIZED].derived
    _in_place(copied)
    assert torch.equal(copied(x), like_new(copied, x))
    assert torch.equal(model(x), expected)


@each_model
def test_restore_takes_all_back(build):
    model = build()
    before = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    fastvit.restore(given(model))
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == before


def test_accelerate_again_without_fp8_takes_it_back(calls):
    model = given(small())
    x = images(model)
    fastvit.accelerate(model)
    model(x)
    assert calls == []
    given(model)
    model(x)
    assert calls


# --------------------------------------------------------------------------- CUDA graphs


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_graphs_read_fresh_derived_weights(cuda, calls):
    model = given(small(depth=1), cuda_graphs=True)
    x = images(model)
    model(x)
    assert calls
    assert cuda.captures == 1
    for _ in range(2):
        _ = model.blocks[0].norm1.weight.mul_(1.5), model.blocks[0].mlp.fc1.weight.add_(0.1)
        ours = model(x)
        assert torch.equal(ours, like_new(model, x))
    assert cuda.captures == 1  # the same memory has the new values


def test_graphs_are_captured_again_for_other_weights(cuda):
    model = given(small(depth=1), cuda_graphs=True)
    x = images(model)
    before = model(x)
    _replaced(model)
    ours = model(x)
    assert cuda.captures == 2
    assert error(ours, before) > 1e-3
    assert torch.equal(ours, like_new(model, x))


def test_a_foreign_capture_has_no_derived_weights(monkeypatch, calls):
    """Nobody would refresh them before its replays."""
    model = given(small())
    x = images(model)
    monkeypatch.setattr(fp8, "_capturing", lambda x: True)
    model(x)
    assert calls == []
    with fp8.own_capture():
        model(x)
    assert calls


def test_calibrating_a_model_with_graphs_sees_every_batch(cuda):
    model = small()
    batches = images(model, 3).split(1)
    expected = fastvit.calibrate(model, batches)
    fastvit.accelerate(model, cuda_graphs=True)
    ours = model(batches[0])
    captures = cuda.captures
    assert fastvit.calibrate(model, batches).largest == pytest.approx(expected.largest, rel=1e-5)
    assert torch.equal(model(batches[0]), ours)
    assert cuda.captures == captures  # the graph is still there


def test_graphs_without_fp8_have_nothing_to_refresh():
    assert not graphs.Snapshot(small()).refresh()


# --------------------------------------------------------------------------- calibration


def test_calibration_is_of_the_inputs_of_the_linears(tmp_path):
    model = small()
    x = images(model, 3)
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: seen.__setitem__(name, float(args[0].abs().max()))
        )
        for name in ("blocks.1.attn.proj", "blocks.0.mlp.fc2")
    ]
    model(x)
    for handle in handles:
        handle.remove()
    whole = fastvit.calibrate(model, x)
    batches = fastvit.calibrate(fastvit.accelerate(copy.deepcopy(model)).train(), x.split(1))
    assert whole.images == batches.images == 3
    assert set(whole.largest) == {f"blocks.{i}.{n}" for i in range(2) for n in fp8.LINEARS}
    for name, value in seen.items():
        assert whole.largest[name] == value
        assert batches.largest[name] == pytest.approx(value, rel=1e-4)
    scale = whole.largest["blocks.1.attn.proj"] * whole.margin / 448
    assert whole.scales("blocks.1")["attn.proj"] == scale

    whole.save(tmp_path / "model.fp8.json")
    assert fastvit.Calibration.load(tmp_path / "model.fp8.json") == whole
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    fastvit.accelerate(one, precision="fp8", calibration=whole)
    fastvit.accelerate(two, precision="fp8", calibration=tmp_path / "model.fp8.json")
    assert torch.equal(one(x), two(x))


def test_calibrate_leaves_the_model_as_it_was():
    model = small().train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    fastvit.calibrate(model, images(model))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bad_calibrations_are_named(tmp_path):
    model = small()
    x = images(model)
    with pytest.raises(ValueError, match="needs calibration"):
        fastvit.accelerate(model, precision="fp8")
    with pytest.raises(ValueError, match="for precision='fp8'"):
        fastvit.accelerate(model, calibration=x)
    shallow = fastvit.calibrate(small(depth=1), x)
    with pytest.raises(ValueError, match=r"another model: it lacks blocks\.1\.attn\.qkv"):
        fastvit.accelerate(model, precision="fp8", calibration=shallow)
    with pytest.raises(ValueError, match="no images"):
        fastvit.calibrate(model, [])
    with pytest.raises(ValueError, match="margin"):
        fastvit.calibrate(model, x, margin=0.5)
    with pytest.raises(ValueError, match="not finite"):
        fastvit.calibrate(model, x * float("nan"))
    with pytest.raises(TypeError, match="int"):
        fastvit.calibrate(3, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no block in this Linear"):
        fastvit.calibrate(nn.Linear(2, 2), x)
    with pytest.raises(ValueError, match="no block in this Sequential"):
        fastvit.accelerate(nn.Sequential(nn.Linear(2, 2)), precision="fp8", calibration=x)
    for content in ("", "[]", '{"format": "other"}', "{}"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="holds no calibration"):
            fastvit.accelerate(model, precision="fp8", calibration=tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError):
        fastvit.accelerate(model, precision="fp8", calibration=tmp_path / "none.json")
    assert QUANTIZED not in model.blocks[0].__dict__


def test_fp8_is_refused_on_a_gpu_without(triton_path):
    from fastvit.kernels import _device

    model = small()
    with _device.emulate("sm80"), pytest.raises(RuntimeError, match="sm_89"):
        given(model)
    assert QUANTIZED not in model.blocks[0].__dict__


def test_explain_says_so(capsys):
    plan = fastvit.explain(given(small()))
    assert plan.inference is not None
    assert "eval mode without gradients" in plan.inference
    runs = {row.runs for row in plan.rows if row.block}
    assert runs == {"layer_norm, linear and attention, e4m3 operands in linear"}
    assert plan.accelerated
    assert "inference:" in capsys.readouterr().out
    assert fastvit.explain(small()).inference is None
