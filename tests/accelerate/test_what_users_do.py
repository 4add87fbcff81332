# pyright: reportPrivateImportUsage=false
"""What users do to an accelerated model, or to one that they accelerate then: it has the effect
that it has in the library, `explain` says what no longer runs on our kernels, `strict` raises."""

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from library_models import GATED, LIBRARIES, OTHERS, Case
from open_clip import transformer as open_clip
from timm_models import TOLERANCE, Doubled, error, small
from torch import Tensor, nn
from torch.jit._trace import TracingCheckError
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip import modeling_clip
from transformers.models.dinov2 import modeling_dinov2
from transformers.models.vit import modeling_vit
from transformers_models import build as transformers_model
from transformers_models import eager

from fastvit import ops
from fastvit.accelerate import accelerate, explain, restore
from fastvit.accelerate.block import FastBlock
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.plan import make_plan

ALL = {**LIBRARIES, **GATED, **OTHERS}
NEAR = 10 * TOLERANCE  # the interpreter sums in another order


@pytest.fixture(params=["torch", "interpret"])
def path(request):
    """Each way to run ops."""
    with ops.backend("torch" if request.param == "torch" else "auto"):
        yield


def reasons(model: Any) -> str:
    """All that `explain` gives."""
    return "; ".join(str(r.reason) for r in make_plan(model, find_parts(model)).rows if r.reason)


def assert_library(case: Case, words: str) -> None:
    """The accelerated model has the library's numbers, and says why it runs its forward."""
    with torch.no_grad():
        ours = case.run()
        assert words in reasons(case.model)
        with pytest.raises(RuntimeError, match="strict"):
            accelerate(copy.deepcopy(case.model), strict=True)
        theirs = case.run(restore(copy.deepcopy(case.model)))
    assert error(ours, theirs) <= NEAR


# --------------------------------------------------------------------------- replaced methods


def twice(original: Any) -> Any:
    """What a user puts in the place of a forward."""

    def mine(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return (
            tuple(2 * r for r in result[:1]) + result[1:] if type(result) is tuple else 2 * result
        )

    return mine


timm_layers: Any = timm.layers
VIT, ENCODER = timm.models.vision_transformer, torchvision.models.vision_transformer
PATCHES = [
    ("timm", VIT.Attention, "forward"),
    ("timm", VIT.Block, "forward"),
    ("timm", timm_layers.Mlp, "forward"),
    ("timm", timm_layers.LayerNorm, "forward"),
    ("timm", timm_layers.PatchEmbed, "forward"),
    ("timm", VIT.VisionTransformer, "forward_features"),
    ("timm", VIT.VisionTransformer, "_pos_embed"),
    ("timm", nn.Linear, "forward"),
    ("timm, beit", timm.models.beit.Attention, "forward"),
    ("timm, eva", timm.models.eva.EvaBlock, "forward"),
    ("timm, eva", timm.models.eva.Eva, "_pos_embed"),
    ("timm, parallel", VIT.ParallelScalingBlock, "forward"),
    ("timm, things", VIT.LayerScale, "forward"),
    ("transformers", modeling_dinov2.Dinov2Attention, "forward"),
    ("transformers", modeling_dinov2.Dinov2Layer, "forward"),
    ("transformers, clip", modeling_clip.CLIPMLP, "forward"),
    ("torchvision", ENCODER.EncoderBlock, "forward"),
    ("torchvision", ENCODER.Encoder, "forward"),
    ("torchvision", ENCODER.VisionTransformer, "_process_input"),
    ("torchvision", nn.MultiheadAttention, "forward"),
    ("torchvision", nn.LayerNorm, "forward"),
    ("open_clip", open_clip.ResidualAttentionBlock, "attention"),
    ("open_clip", open_clip.LayerNorm, "forward"),
    ("open_clip", open_clip.LayerScale, "forward"),
]


@pytest.mark.parametrize(
    "path", ["torch", pytest.param("interpret", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "kind", "method"), PATCHES)
def test_a_librarys_method_is_replaced(path, monkeypatch, name, kind, method, when):
    if method not in kind.__dict__:
        pytest.skip("inherited")
    case = ALL[name]()
    with torch.no_grad():
        plain = case.run(copy.deepcopy(case.model))
    if when == "after":
        with torch.no_grad():
            assert error(accelerate(case.model) and case.run(), plain) <= NEAR
    monkeypatch.setattr(kind, method, twice(getattr(kind, method)))
    accelerate(case.model)
    with torch.no_grad():
        assert error(case.run(), plain) > 100 * NEAR
    assert_library(case, f"{kind.__name__}.{method} was replaced")
    monkeypatch.undo()
    with torch.no_grad():
        assert error(case.run(), plain) <= NEAR


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_transformers_attention_function_is_replaced(path, monkeypatch, when, implementation):
    case = LIBRARIES["transformers, vit"]()
    case.model.set_attn_implementation(implementation)
    with torch.no_grad():
        plain = case.run()
        if when == "after":
            accelerate(case.model)
            case.run()
        eager_name, functions = "eager_attention_forward", ALL_ATTENTION_FUNCTIONS._local_mapping
        if implementation == "eager":
            mine = twice(modeling_vit.eager_attention_forward)
            monkeypatch.setattr(modeling_vit, eager_name, mine)
        else:
            monkeypatch.setitem(functions, "sdpa", twice(ALL_ATTENTION_FUNCTIONS["sdpa"]))
        assert error(accelerate(case.model) and case.run(), plain) > 100 * NEAR
    assert_library(case, f"attention '{implementation}' was replaced")


# --------------------------------------------------------------------------- methods of an instance

OWN_METHODS = [  # all that a library's forward calls on itself and that ours might not call
    ("timm", "", "_pos_embed"),
    ("timm", "", "forward_features"),
    ("timm, eva", "", "_pos_embed"),
    ("timm, beit", "blocks.1.attn", "_get_rel_pos_bias"),
    ("timm, relpos", "blocks.1.attn.rel_pos", "get_bias"),
    ("torchvision", "", "_process_input"),
    ("open_clip", "transformer.resblocks.1", "attention"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "module", "method"), OWN_METHODS)
def test_a_method_of_an_instance_is_replaced(path, name, module, method, when):
    case = ALL[name]()
    twin = copy.deepcopy(case.model)
    with torch.no_grad():
        plain = case.run()
        if when == "after":
            accelerate(case.model)
            case.run()  # what was found of each block is kept
        for model in (twin, case.model):
            owner = model.get_submodule(module)
            original = getattr(owner, method)
            doubled = twice(lambda _, *args, f=original, **kwargs: f(*args, **kwargs))
            setattr(owner, method, functools.partial(doubled, None))
        theirs, ours = case.run(twin), accelerate(case.model) and case.run()
    assert error(theirs, plain) > 100 * NEAR
    assert error(ours, theirs) <= NEAR


# --------------------------------------------------------------------------- torchvision


class Wrapped(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def own_forward(module: Any) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def own_process_input(model: Any) -> None:
    process = model._process_input
    model._process_input = lambda x: 2 * process(x)


TORCHVISION = {
    "encoder wrapped": lambda m: setattr(m, "encoder", Wrapped(m.encoder)),
    "encoder's forward": lambda m: own_forward(m.encoder),
    "encoder's hook": lambda m: m.encoder.register_forward_hook(lambda *a: 2 * a[2]),
    "encoder's pre-hook": lambda m: m.encoder.register_forward_pre_hook(lambda _, a: 2 * a[0]),
    "conv_proj wrapped": lambda m: setattr(m, "conv_proj", Wrapped(m.conv_proj)),
    "conv_proj's forward": lambda m: own_forward(m.conv_proj),
    "_process_input": own_process_input,
    "encoder.ln wrapped": lambda m: setattr(m.encoder, "ln", Wrapped(m.encoder.ln)),
    "encoder.dropout wrapped": lambda m: setattr(m.encoder, "dropout", Wrapped(m.encoder.dropout)),
    "encoder.layers' forward": lambda m: own_forward(m.encoder.layers),
    "heads wrapped": lambda m: setattr(m, "heads", Wrapped(m.heads)),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", TORCHVISION.values(), ids=TORCHVISION)
def test_torchvisions_encoder_and_projection_are_changed(path, change, when):
    case = LIBRARIES["torchvision"]()
    if when == "before":
        change(case.model)
    twin = copy.deepcopy(case.model)  # of a bound method it has the original's
    accelerate(case.model)
    if when == "after":
        change(case.model)
        change(twin)
    else:
        twin = restore(case.model)
    with torch.no_grad():
        theirs = case.run(twin)
        assert error(accelerate(case.model) and case.run(), theirs) <= NEAR


@pytest.mark.parametrize("name", ["encoder", "conv_proj", "encoder.layers.encoder_layer_0.mlp"])
def test_torchvisions_parts_have_backward_hooks(path, name):
    case, seen = LIBRARIES["torchvision"](), []
    module = accelerate(case.model).get_submodule(name)
    module.register_full_backward_pre_hook(lambda *args: seen.append("before"))
    module.register_full_backward_hook(lambda *args: seen.append("after"))
    case.run().sum().backward()
    assert seen == ["before", "after"]


# --------------------------------------------------------------------------- maps, strict, names


def _lora(layer: Any) -> None:
    layer.attention.q_proj = Doubled(layer.attention.q_proj)


LAYERS = {
    "lora": _lora,
    "hook": lambda layer: layer.mlp.register_forward_hook(lambda *args: None),
    "pre-hook": lambda layer: layer.attention.register_forward_pre_hook(lambda *args: None),
    "mlp": lambda layer: setattr(layer.mlp, "fc1", Doubled(layer.mlp.fc1)),
    "norm": lambda layer: setattr(layer, "norm1", nn.Identity()),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("change", LAYERS.values(), ids=LAYERS)
def test_attention_maps_are_asked_for_where_a_layer_is_changed(path, change, which, when):
    model, inputs = transformers_model("Dinov2", num_hidden_layers=3)
    if when == "after":
        accelerate(model)
    change(model.dinov2.encoder.layer[which])
    twin = eager(restore(copy.deepcopy(model)))
    accelerate(model)
    with torch.no_grad():
        ours = model(**inputs, output_attentions=True).attentions
        theirs = twin(**inputs, output_attentions=True).attentions
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) <= NEAR


@pytest.mark.parametrize("name", ALL)
def test_a_block_has_a_forward_of_its_own(path, name):
    case = ALL[name]()
    block = make_plan(case.model, find_parts(case.model)).fused_blocks[0]
    own_forward_of_any(case.model.get_submodule(block))
    assert "has a forward of its own" in reasons(case.model)
    with pytest.raises(RuntimeError, match=f"{block}: has a forward of its own"):
        accelerate(case.model, strict=True)
    accelerate(case.model)
    assert block in explain(case.model).left_blocks


def own_forward_of_any(module: Any) -> None:
    module.forward = module.forward


def test_a_model_and_a_norm_have_forwards_of_their_own():
    model = small()
    own_forward_of_any(model)
    own_forward_of_any(model.norm)
    found = {r.module: r.reason for r in make_plan(model, find_parts(model)).rows if r.reason}
    assert found == {"": "has a forward of its own", "norm": "has a forward of its own"}
    with pytest.raises(RuntimeError, match=r"\(model\): has a forward of its own"):
        accelerate(model, strict=True)


def test_restore_leaves_a_users_class_with_an_original():
    class Mine(nn.Module):
        original = nn.Identity

    model = nn.Sequential(small(), Mine())
    assert type(restore(accelerate(model))[1]) is Mine


def test_another_linear_of_the_same_name():
    class Linear(nn.Linear):
        pass

    model = small()
    model.blocks[0].attn.qkv.__class__ = Linear
    assert f"attn.qkv is {__name__}." in reasons(model)
    assert "Linear; fused is Linear" in reasons(model)


# --------------------------------------------------------------------------- class names, FSDP


@pytest.mark.parametrize("name", ALL)
def test_layers_are_found_by_the_librarys_class_names(name):
    """As transformers' and accelerate's `no_split_module_classes` and FSDP's wrapping do."""
    case = ALL[name]()
    names = [type(module).__name__ for module in case.model.modules()]
    accelerate(case.model)
    assert [type(module).__name__ for module in case.model.modules()] == names
    buffer = io.BytesIO()
    torch.save(case.model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        ours = case.run()
        for twin in (
            pickle.loads(pickle.dumps(case.model)),
            torch.load(buffer, weights_only=False),
            copy.deepcopy(case.model),
        ):
            assert [type(m) for m in twin.modules()] == [type(m) for m in case.model.modules()]
            assert torch.equal(case.run(twin), ours)


@pytest.mark.filterwarnings("ignore")  # FSDP2's own, on a CPU
@pytest.mark.parametrize("name", LIBRARIES)
def test_fsdp2_shards_blocks_and_they_stay_fused(one_process, name):
    from torch.distributed.fsdp import fully_shard

    case = LIBRARIES[name]()
    twin = copy.deepcopy(case.model)
    blocks = make_plan(case.model, find_parts(case.model)).fused_blocks
    accelerate(case.model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for block in blocks:
        fully_shard(case.model.get_submodule(block), mesh=mesh)
    calls = []
    run = FastBlock.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastBlock, "run", lambda *a: (calls.append(a), run(*a))[1])
        with torch.no_grad():
            case.run()
    ours = case.run()
    ours.square().mean().backward()
    theirs = case.run(twin)
    theirs.square().mean().backward()
    assert len(calls) == 2
    assert error(ours.detach(), theirs.detach()) <= NEAR
    for a, b in zip(case.model.parameters(), twin.parameters(), strict=True):
        assert b.grad is None or error(getattr(a.grad, "_local_tensor", a.grad), b.grad) <= NEAR


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store"
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("name", ["torchvision", "timm", "timm, beit", "transformers", "dinov2"])
@pytest.mark.filterwarnings("ignore")  # FSDP1's own, on a CPU
def test_fsdp_wraps_blocks_and_trains(one_process, name, original):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    case = LIBRARIES[name]()
    twin = copy.deepcopy(case.model)
    blocks = make_plan(case.model, find_parts(case.model)).fused_blocks
    accelerate(case.model)
    options: Any = {"device_id": torch.device("cpu"), "use_orig_params": original}
    for block in [*blocks, *(["encoder"] if name == "torchvision" else [])]:
        parent, _, child = block.rpartition(".")
        owner = case.model.get_submodule(parent)
        owner.register_module(child, FSDP(owner.get_submodule(child), **options))
    wrapped = FSDP(case.model, **options)
    for _ in range(2):
        outputs = []
        for model in (twin, wrapped):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            optimizer.zero_grad()
            outputs.append(case.run(model))
            outputs[-1].square().mean().backward()
            optimizer.step()
        assert error(outputs[1].detach(), outputs[0].detach()) <= NEAR


# --------------------------------------------------------------------------- tracing and export


@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["timm", "timm, eva", "torchvision", "open_clip", "dinov2"])
def test_jit_trace(path, name, grad):
    case = ALL[name]()
    with torch.no_grad():
        theirs = case.run()
    accelerate(case.model)
    with torch.set_grad_enabled(grad):
        try:
            torch.jit.trace(restore(copy.deepcopy(case.model)), case.images)
        except TracingCheckError:  # with gradients MultiheadAttention's way differs
            checks = False
        else:
            checks = True
        traced: Any = torch.jit.trace(case.model, case.images, check_trace=checks)
    assert "fastvit::" not in str(traced.inlined_graph)
    with torch.no_grad():
        assert error(traced(case.images), theirs) <= NEAR


EXPORTED = ["timm", "timm, eva", "torchvision", "open_clip", "dinov2", "transformers, clip"]
QUICK = ("timm", "open_clip")  # with the exporter by Dynamo, which takes seconds a model


@pytest.mark.parametrize(
    ("name", "dynamo"),
    # timm's Eva is not for the older exporter
    [
        pytest.param(name, dynamo, marks=[pytest.mark.slow] * (dynamo and name not in QUICK))
        for name in EXPORTED
        for dynamo in (True, False)
        if dynamo or "eva" not in name
    ],
)
@pytest.mark.filterwarnings("ignore")  # the exporters' own
def test_onnx_export(path, name, dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    case = ALL[name]()
    with torch.no_grad():
        theirs = case.run()
    accelerate(case.model)
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(
        case.model, (case.images,), file, dynamo=dynamo, opset_version=18, verbose=False
    )
    session = onnxruntime.InferenceSession(file)
    ours = session.run(None, {session.get_inputs()[0].name: case.images.numpy()})[0]
    assert error(torch.from_numpy(ours), theirs) <= NEAR
    with torch.no_grad():
        assert error(case.run(), theirs) <= NEAR


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith("timm")])
def test_fx_and_then_jit_script(name):
    """As timm's own tests do it."""
    case = ALL[name]()
    with torch.no_grad():
        theirs = case.run()
    accelerate(case.model)
    try:
        torch.jit.script(torch.fx.symbolic_trace(restore(copy.deepcopy(case.model))))
    except Exception as error_of_timm:
        pytest.skip(f"timm's own is not scriptable: {str(error_of_timm)[:100]}")
    scripted = torch.jit.script(torch.fx.symbolic_trace(case.model))
    with torch.no_grad():
        assert error(scripted(case.images), theirs) <= NEAR
