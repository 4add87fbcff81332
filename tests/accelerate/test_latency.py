"""Blocks for few tokens in CUDA graphs, with `small_sim` in a GPU's place: the kernel's own source
computes every linear."""

import copy
import pickle
from typing import Any

import pytest
import torch
from fake_cuda import Cuda
from library_models import WIDE, Case
from small_sim import Launches
from timm_models import images, small
from torch import Tensor

from fastvit.accelerate import accelerate, explain, fp8, graphs, latency, plan, restore
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.graphs import GRAPHS, CaptureError
from fastvit.kernels import _backend
from fastvit.kernels.linear import hopper_small_launch
from fastvit.numerics import measure

BF16 = torch.bfloat16
LINEARS = 2 * 4  # of a model's two blocks


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("FASTVIT_LATENCY", "early")
    with torch.no_grad():
        yield


def in_form(model: Any) -> Any:
    """Accelerated, with the form that `cuda_graphs=True` gives its blocks."""
    accelerate(model)
    blocks = [part for part in find_parts(model) if part.quantized is not None]
    for part in blocks:
        part.module.__class__ = part.quantized  # pyright: ignore
    fp8.attach(model, latency.forms([part.module for part in blocks]))
    return model


def converted(case: Case, dtype: torch.dtype) -> Case:
    """A copy in another dtype."""
    inputs: Any = case.inputs
    if isinstance(inputs, Tensor):
        inputs = inputs.to(dtype)
    else:
        inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    return Case(copy.deepcopy(case.model).to(dtype), inputs)


@pytest.mark.parametrize(
    "dtype", [BF16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("make", WIDE.values(), ids=WIDE)
def test_numerics_of_a_model(launches, make, dtype):
    """Within twice the error of the library's own forward, against float64."""
    half = converted(make(), dtype)
    truth, eager = converted(half, torch.float64).run(), half.run()
    in_form(half.model)
    with fp8.own_capture():
        ours = half.run()
    assert len(launches.linears) == LINEARS
    statistics = len(launches.made) - LINEARS - len(launches.attentions)
    assert statistics == 1  # of what no block made
    row = measure("y", ours, truth, eager)
    assert row.passed, row


def graphed(**options: Any) -> Any:
    options = {"embed_dim": 128, "mlp_ratio": 1.0, **options}
    return accelerate(small(**options).to(BF16), cuda_graphs=True)


def plain(model: Any, x: Tensor) -> Tensor:
    """Without graphs, and so without the form."""
    kept = model.__dict__.pop(GRAPHS)
    try:
        return model(x)
    finally:
        setattr(model, GRAPHS, kept)


def near(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 0.05 * theirs.abs().max())


def test_a_graph_replays_the_form_and_follows_the_weights(launches, cuda):
    model = graphed()
    inputs = [images(model, 1).to(BF16) for _ in range(2)]
    first = [model(x) for x in inputs]
    assert len(launches.linears) == 2 * LINEARS  # to compile, and into the graph
    assert all(near(y, plain(model, x)) for y, x in zip(first, inputs, strict=True))
    for name in ("norm2.weight", "attn.qkv.bias", "attn.proj.weight"):
        model.blocks[1].get_parameter(name).mul_(2).add_(0.2)
        ours, theirs = model(inputs[0]), plain(model, inputs[0])
        assert near(ours, theirs)
        assert not near(ours, first[0])
        first[0] = ours
    assert len(launches.linears) == 2 * LINEARS
    assert cuda.captures == 1


def test_other_weights_make_another_graph(launches, cuda):
    model = graphed(depth=1)
    x = images(model, 1).to(BF16)
    model(x)
    model.blocks[0].norm1.weight = torch.nn.Parameter(model.blocks[0].norm1.weight * 3)
    assert near(model(x), plain(model, x))
    assert cuda.captures == 2


def test_each_linear_asks_for_weights_that_are_read_later(launches, cuda):
    model = graphed()
    model(images(model, 1).to(BF16))
    weights, coming = zip(*launches.weights[LINEARS:], strict=True)
    qkv, proj, fc1, fc2 = weights[:4]
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in coming]
    assert addresses[:4] == [fc1.data_ptr(), fc2.data_ptr(), weights[4].data_ptr(), None]
    assert addresses[6:] == [None, None]  # nobody comes after the last block
    assert proj.data_ptr() == model.blocks[0].attn.proj.weight.data_ptr()
    assert qkv.data_ptr() != model.blocks[0].attn.qkv.weight.data_ptr()


def test_statistics_are_of_the_values_that_are_read(launches):
    model = in_form(small(embed_dim=128).to(BF16))
    x = torch.randn(1, 9, 128).to(BF16)

    def statistics() -> int:
        return sum(not launch.boxes for launch, _ in launches.made)

    with fp8.own_capture():
        y = model.blocks[0](x)
        kept = model.blocks[1](y)
        assert statistics() == 1
        changed = model.blocks[1](y.mul_(3).add_(1))
        again = model.blocks[1](y.clone())
    assert statistics() == 3
    assert torch.equal(changed, again)
    assert not near(changed, kept)


@pytest.mark.parametrize(
    "case", ["many tokens", "float32", "autocast", "off", "no own capture", "training"]
)
def test_else_the_block_runs_as_without(launches, monkeypatch, case):
    dtype = torch.float32 if case == "float32" else BF16
    model = in_form(small(embed_dim=128).to(dtype))
    block = model.blocks[0].train(case == "training")
    x = torch.randn(1, hopper_small_launch.MOST_ROWS + (case == "many tokens"), 128).to(dtype)
    if case == "off":
        monkeypatch.delenv("FASTVIT_LATENCY")  # the default
    with (
        fp8.own_capture() if case != "no own capture" else latency.left_out(),
        torch.autocast("cpu", BF16, enabled=case == "autocast"),
    ):
        block(x)
    assert launches.made == []


def test_the_switch(launches, cuda, monkeypatch):
    for name, early in (("early", True), ("in-order", False)):
        monkeypatch.setenv("FASTVIT_LATENCY", name)
        launches.made.clear()
        model = graphed()
        model(images(model, 1).to(BF16))
        assert {launch.early for launch in launches.linears} == {early}
        assert [launch.early for launch in launches.attentions] == [True] * 4 * early
    monkeypatch.setenv("FASTVIT_LATENCY", "on")
    with pytest.raises(ValueError, match="must be one of off, in-order, early; got 'on'"):
        graphed()


def test_what_cannot_be_launched_is_captured_as_without(launches, cuda, monkeypatch):
    _backend.warn_once.cache_clear()
    launches.error = RuntimeError("no\nPDL")
    model = graphed()
    x = images(model, 1).to(BF16)
    with pytest.warns(
        RuntimeWarning, match="without the kernels for few tokens: .* no PDL"
    ) as told:
        ours = model(x)
    assert len([w for w in told if "few tokens" in str(w.message)]) == 1
    assert torch.equal(ours, plain(model, x))
    assert cuda.captures == 1
    assert latency.problem(x.device) == "RuntimeError: no PDL"
    monkeypatch.setattr(_backend, "_path", "triton")
    monkeypatch.setattr(latency, "_refused", None)
    with pytest.raises(RuntimeError, match="no"), fp8.own_capture():
        model.blocks[0](torch.randn(1, 9, 128).to(BF16))


def test_what_cannot_be_captured_is_captured_as_without(launches, cuda, monkeypatch):
    """And a forward that no graph holds is not laid to the kernels' charge."""
    _backend.warn_once.cache_clear()
    capture = graphs.Recorder.capture

    def fails(self: Any, forward: Any, x: Tensor) -> Any:
        replay = capture(self, forward, x)
        if everything or not latency._left_out.get():
            raise CaptureError("driver")
        return replay

    monkeypatch.setattr(graphs.Recorder, "capture", fails)
    everything, model = True, graphed()
    x = images(model, 1).to(BF16)
    with pytest.warns(RuntimeWarning, match="no CUDA graph for an input of"):
        assert near(model(x), plain(model, x))
    assert latency.problem(x.device) is None
    everything, model = False, graphed()
    with pytest.warns(RuntimeWarning, match="without the kernels for few tokens: .*driver"):
        ours = model(x)
    assert torch.equal(ours, plain(model, x))
    assert latency.problem(x.device) == "CaptureError: driver"


def test_explain_names_it(launches, monkeypatch, capsys):
    model = graphed()
    monkeypatch.setattr(plan, "graphs_obstacle", lambda model: None)
    words = "up to 800 tokens a batch on kernels for few"
    assert str(explain(model).graphs).endswith(f"{words} (untimed)")
    monkeypatch.setenv("FASTVIT_LATENCY", "in-order")
    assert f"{words} without programmatic dependent launch (untimed)" in str(explain(model).graphs)
    monkeypatch.setenv("FASTVIT_LATENCY", "off")
    assert "no kernels for few tokens: FASTVIT_LATENCY=early asks for" in str(explain(model).graphs)
    assert "few tokens" in capsys.readouterr().out


def test_copies_and_restored_models_keep_nothing(launches, cuda):
    model = graphed(depth=1)
    x = images(model, 1).to(BF16)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.blocks[0].__dict__[fp8.QUANTIZED].derived == {}
        assert torch.equal(twin(x), expected)
    restore(model)
    assert all(fp8.QUANTIZED not in module.__dict__ for module in model.modules())
