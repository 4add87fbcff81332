"""`accelerate` with folded norms and with fp8: what runs, when, and that weights are followed."""

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
from fastvit.accelerate import graphs, inference
from fastvit.accelerate.inference import INFERENCE

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
both_forms = pytest.mark.parametrize("form", ["fold", "fp8"])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def form_path(triton_path, form):
    """Triton for folded norms, which need it; e4m3 is emulated, which is quicker."""
    with ops.backend("torch" if form == "fp8" else "triton"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The names of inference's ops, in the order they were called."""
    seen = []
    for name in ("row_statistics", "folded_linear", "linear_statistics", "fp8_linear"):
        run = getattr(inference, name)

        def spy(*args, name=name, run=run, **kwargs):
            seen.append(name)
            return run(*args, **kwargs)

        monkeypatch.setattr(inference, name, spy)
    return seen


def given(model: Any, form: str, **options: Any) -> Any:
    if form == "fold":
        return fastvit.accelerate(model, fold_norm=True, **options)
    return fastvit.accelerate(model, precision="fp8", calibration=images(model), **options)


def like_new(model: Any, form: str, x: torch.Tensor) -> torch.Tensor:
    """What a model with these weights gives that has had no others."""
    fresh = fastvit.restore(copy.deepcopy(model))
    if form == "fold":
        return fastvit.accelerate(fresh, fold_norm=True)(x)
    fastvit.accelerate(fresh, precision="fp8", calibration=x)
    for block, old in zip(fresh.blocks, model.blocks, strict=True):
        setattr(block, INFERENCE, inference.Quantized(old.__dict__[INFERENCE].scales))
    return fresh(x)


# --------------------------------------------------------------------------- folded norms


@each_model
def test_folded_is_the_same_function(triton_path, build, calls):
    model = build()
    x = images(model)
    expected = model(x)
    assert error(given(model, "fold")(x), expected) < TOLERANCE
    # statistics are computed once, then handed on; the last block's are nobody's
    assert calls.count("row_statistics") == 1
    assert calls.count("folded_linear") == 2 * DEPTH
    assert calls.count("linear_statistics") == 2 * DEPTH - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_folded_in_half_dtypes_passes_the_policy(triton_path, dtype):
    eager = small().to(dtype)
    fast = given(copy.deepcopy(eager), "fold")
    report = fastvit.numerics.compare_models(fast, eager, images(eager, 4).to(dtype))
    assert report.rows[0].rms_error <= 2 * report.rows[0].eager_rms_error, report


def test_a_precision_folds_from_float32_masters(triton_path, calls):
    model = small()
    x = images(model)
    fast = given(copy.deepcopy(model), "fold", precision="bf16")
    ours = fast(x)
    assert ours.dtype == torch.float32
    assert calls.count("folded_linear") == 2 * DEPTH
    weight = fast.blocks[0].__dict__[INFERENCE].derived["qkv"].tensors[0]
    block = model.blocks[0]
    wanted = (block.attn.qkv.weight * block.norm1.weight).bfloat16()
    assert torch.equal(weight, wanted)
    assert error(ours, model(x)) < 0.1  # a few bfloat16 roundings of the logits


def test_inner_norms_and_odd_parts(triton_path):
    model = small(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=None)
    x = images(model)
    assert error(given(copy.deepcopy(model), "fold")(x), model(x)) < TOLERANCE
    n = model.forward_features(x).shape[1]
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    folded = given(copy.deepcopy(model), "fold")
    expected = model.forward_features(x, attn_mask=mask)
    assert error(folded.forward_features(x, attn_mask=mask), expected) < TOLERANCE


@both_forms
def test_a_block_by_itself_and_intermediates(form_path, form, calls):
    model = small()
    x = torch.randn(2, 7, 32)
    expected = model.blocks[0](x)
    fast = given(model, form)
    tolerance = TOLERANCE if form == "fold" else 0.1  # 3 significant bits, averaged over 32 terms
    assert error(fast.blocks[0](x), expected) < tolerance
    assert calls
    fast.forward_intermediates(images(fast))


def test_hooks_of_blocks_see_every_block(triton_path, calls):
    model = given(small(), "fold")
    x = images(model)
    expected = model(x)
    calls.clear()
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda *args: seen.append(1))
    assert error(model(x), expected) < TOLERANCE
    assert seen == [1]
    assert calls.count("row_statistics") == DEPTH  # each block found its own
    handle.remove()
    changed = model.blocks[0].register_forward_hook(lambda m, a, y: 2 * y)
    assert error(model(x), expected) > 0.01
    changed.remove()
    assert torch.equal(model(x), expected)


@both_forms
def test_hooked_and_replaced_layers_are_called(form_path, form, calls):
    model = given(small(), form)
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


@pytest.mark.parametrize(("build", "form"), [(small, "fold"), (own, "fp8")], ids=["timm", "own"])
def test_training_gradients_and_tracing_run_without(triton_path, form, build, calls):
    model = build()
    x = images(model)
    expected = model(x)
    given(model, form)
    with torch.enable_grad():
        assert error(model(x).detach(), expected) < TOLERANCE
        model(x).sum().backward()
    assert model.blocks[0].norm1.weight.grad is not None
    model.train()
    assert error(model(x), expected) < TOLERANCE
    model.eval()
    torch.compiler.reset()
    with ops.backend("torch" if form == "fp8" else "triton"):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert error(compiled(x), expected) < TOLERANCE
    assert calls == []


def test_folding_stops_under_a_foreign_autocast_and_on_the_plain_path(triton_path, calls):
    model = given(small(), "fold")
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    with ops.backend("torch"):
        model(x)
    assert calls == []
    model(x)
    assert calls


def test_weights_made_in_inference_mode_are_left_alone(triton_path, calls):
    with torch.inference_mode():
        model = small()
        x = images(model)
        expected = model(x)
        assert error(given(model, "fold")(x), expected) < TOLERANCE
    assert calls == []


# --------------------------------------------------------------------------- following the weights


def _in_place(model: Any) -> None:
    model.blocks[0].norm1.weight.mul_(1.5)
    model.blocks[1].mlp.fc1.weight.add_(0.1)
    model.blocks[1].norm2.bias.add_(1)


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


@both_forms
@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_show_at_once(form_path, form, change):
    model = given(small(), form)
    x = images(model)
    before = model(x)
    change(model)
    ours = model(x)
    assert error(ours, before) > 1e-3
    assert torch.equal(ours, like_new(model, form, x))


@both_forms
def test_another_dtype_derives_anew(form_path, form):
    model = given(small(), form)
    x = images(model)
    model(x)
    model.bfloat16()
    ours = model(x.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, like_new(model, form, x.bfloat16()))


@both_forms
def test_derived_weights_travel_nowhere(form_path, form):
    model = small()
    names = list(model.state_dict())
    x = images(model)
    given(model, form)
    expected = model(x)
    assert model.blocks[0].__dict__[INFERENCE].derived
    assert list(model.state_dict()) == names
    assert {name for name, _ in model.named_buffers()} == set()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied = copy.deepcopy(model)
    for other in (copied, pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        form_of_it = other.blocks[0].__dict__[INFERENCE]
        assert type(form_of_it) is type(model.blocks[0].__dict__[INFERENCE])
        assert not form_of_it.derived
    _in_place(copied)
    assert torch.equal(copied(x), like_new(copied, form, x))
    assert torch.equal(model(x), expected)


@both_forms
@each_model
def test_restore_takes_all_back(form_path, form, build):
    model = build()
    before = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    fastvit.restore(given(model, form))
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == before


def test_accelerate_again_changes_the_form(triton_path, calls):
    model = given(small(), "fold")
    x = images(model)
    fastvit.accelerate(model)
    model(x)
    assert calls == []
    given(model, "fp8")
    model(x)
    assert set(calls) == {"fp8_linear"}


# --------------------------------------------------------------------------- CUDA graphs


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


@both_forms
def test_graphs_read_fresh_derived_weights(form_path, cuda, form, calls):
    model = given(small(depth=1), form, cuda_graphs=True)
    x = images(model)
    model(x)
    assert calls
    assert cuda.captures == 1
    for _ in range(2):
        _ = model.blocks[0].norm1.weight.mul_(1.5), model.blocks[0].mlp.fc1.weight.add_(0.1)
        ours = model(x)
        assert torch.equal(ours, like_new(model, form, x))
    assert cuda.captures == 1  # the same memory has the new values


@both_forms
def test_graphs_are_captured_again_for_other_weights(form_path, cuda, form):
    model = given(small(depth=1), form, cuda_graphs=True)
    x = images(model)
    before = model(x)
    _replaced(model)
    ours = model(x)
    assert cuda.captures == 2
    assert error(ours, before) > 1e-3
    assert torch.equal(ours, like_new(model, form, x))


def test_a_foreign_capture_has_no_derived_weights(triton_path, monkeypatch, calls):
    """Nobody would refresh them before its replays."""
    model = given(small(), "fold")
    x = images(model)
    monkeypatch.setattr(inference, "_capturing", lambda x: True)
    model(x)
    assert calls == []
    with inference.own_capture():
        model(x)
    assert calls


def test_graphs_without_forms_have_nothing_to_refresh():
    assert not graphs.Snapshot(small()).refresh()


# --------------------------------------------------------------------------- fp8


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_is_near_and_the_emulation_agrees(triton_path, build, dtype, calls):
    model = build().to(dtype)
    x = images(model, 4).to(dtype)
    expected = model(x).double()
    fast = fastvit.accelerate(model, precision="fp8", calibration=x)
    ours = fast(x)
    assert ours.dtype == dtype
    assert calls.count("fp8_linear") == 4 * DEPTH
    # 4 significant bits a value: FACTS of real models are 1 - cosine of 1e-2 at most
    assert nn.functional.cosine_similarity(ours.double(), expected, dim=1).min() > 0.98
    with ops.backend("torch"):
        plain = fast(x)
    assert nn.functional.cosine_similarity(ours.double(), plain.double(), dim=1).min() > 0.995


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
    assert set(whole.largest) == {f"blocks.{i}.{n}" for i in range(2) for n in inference.LINEARS}
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
    with pytest.raises(ValueError, match="exclude one another"):
        fastvit.accelerate(model, precision="fp8", fold_norm=True, calibration=x)
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
        fastvit.accelerate(nn.Sequential(nn.Linear(2, 2)), fold_norm=True)
    for content in ("", "[]", '{"format": "other"}', "{}"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="holds no calibration"):
            fastvit.accelerate(model, precision="fp8", calibration=tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError):
        fastvit.accelerate(model, precision="fp8", calibration=tmp_path / "none.json")
    assert INFERENCE not in model.blocks[0].__dict__


def test_fp8_is_refused_on_a_gpu_without(triton_path):
    from fastvit.kernels import _device

    model = small()
    with _device.emulate("sm80"), pytest.raises(RuntimeError, match="sm_89"):
        given(model, "fp8")
    assert INFERENCE not in model.blocks[0].__dict__


@both_forms
def test_explain_says_so(form_path, form, capsys):
    plan = fastvit.explain(given(small(), form))
    assert plan.inference is not None
    assert "eval mode without gradients" in plan.inference
    runs = {row.runs for row in plan.rows if row.block}
    assert runs == {inference.Folded.runs if form == "fold" else inference.Quantized.runs}
    assert plan.accelerated
    assert "inference:" in capsys.readouterr().out
    assert fastvit.explain(small()).inference is None
