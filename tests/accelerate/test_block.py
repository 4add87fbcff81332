"""Every library's pre-norm blocks are run by one function, and so have the same powers."""

import copy
from typing import Any

import pytest
import torch
from library_models import DEPTH, GATED, LIBRARIES, Case
from timm_models import TOLERANCE, classes, error
from torch import Tensor

import fastvit
from fastvit import parts
from fastvit.accelerate import fp8
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.plan import make_plan
from fastvit.check.launches import recorded

SAVED = 0.7  # bytes kept for the backward, of those that the library's own forward keeps
each_library = pytest.mark.parametrize("make", LIBRARIES.values(), ids=LIBRARIES)
each_model = pytest.mark.parametrize(
    "make", [*LIBRARIES.values(), *GATED.values()], ids=[*LIBRARIES, *GATED]
)


def blocks_of(model: Any) -> list[str]:
    return make_plan(model, find_parts(model)).fused_blocks


def calls_of(case: Case, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block of that name is called with."""
    seen: list[Any] = []
    handle = case.model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        case.run()
    handle.remove()
    return seen[0]


def saved_bytes(block: Any, args: Any, kwargs: Any) -> int:
    """Of all that autograd keeps, each memory counted once and parameters not at all."""
    kept: dict[int, Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    x, *rest = args
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x.detach().requires_grad_(), *rest, **kwargs)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


@each_library
def test_a_block_keeps_less_for_the_backward_than_the_librarys(triton_path, make):
    case = make()
    name = blocks_of(case.model)[0]
    args, kwargs = calls_of(case, name)
    block = case.model.train().get_submodule(name)
    theirs = saved_bytes(block, args, kwargs)
    fastvit.accelerate(case.model)
    assert 0 < saved_bytes(block, args, kwargs) <= SAVED * theirs


@pytest.mark.parametrize("make", DEPTH.values(), ids=DEPTH)
def test_stochastic_depth_rides_in_the_last_linear(triton_path, make, monkeypatch):
    """With the samples that the library drops, which its own module draws."""
    case, scales = make(), []
    draw = parts.drop_path_scale
    monkeypatch.setattr(
        parts, "drop_path_scale", lambda *args: (scales.append(draw(*args)), scales[-1])[1]
    )
    outputs = []
    for model in (copy.deepcopy(case.model), fastvit.accelerate(case.model)):
        torch.manual_seed(0)
        outputs.append(case.run(model.train()))
    assert error(outputs[1], outputs[0]) <= 10 * TOLERANCE
    assert sum(scale is not None for scale in scales) >= 2


@each_model
def test_fp8_is_near(make):
    """4 significant bits a value, in every block."""
    case = make()
    model, calls = case.model, []
    before = classes(model)
    with torch.no_grad():
        expected = case.run()
        run = fp8.Quantized.run
        calibration = fastvit.calibrate(model, case.images)
        assert classes(model) == before
        fastvit.accelerate(model, precision="fp8", calibration=calibration)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fp8.Quantized, "run", lambda *a: (calls.append(a), run(*a))[1])
            ours = case.run()
        assert len(calls) == len(blocks_of(model)) == 2
        assert ours.dtype == expected.dtype
        cosine = torch.cosine_similarity(ours.flatten(1), expected.flatten(1))
        assert 0.95 < float(cosine.min()) < 1 - 1e-7
        assert classes(fastvit.restore(model)) == before
        assert torch.equal(case.run(), expected)


BLOCK = ["layer_norm", "linear", "attention", "linear", "layer_norm", "linear", "linear"]


@each_model
def test_an_fp8_block_quantises_in_its_own_kernels(make):
    """Norm, attention and activation write e4m3; only what a gate multiplied is quantised after."""
    case = make()
    fastvit.accelerate(case.model, precision="fp8", calibration=case.images)
    names: list[list[str]] = []
    run = fp8.Quantized.run

    def watched(*args: Any) -> Tensor:
        before = len(launches)
        out = run(*args)
        kernels = [launch.kernel.fn.__name__ for launch, _ in launches[before:]]
        names.append([name.removesuffix("_kernel") for name in kernels])
        return out

    with torch.no_grad(), recorded() as launches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8.Quantized, "run", watched)
        case.run()
    assert len(names) == 2
    for kernels in names:
        first = kernels.index("attention")
        assert kernels[first - 1 : first + 2] == BLOCK[1:4]
        if make in GATED.values():
            assert kernels.count("quantize") == 1
        else:  # of one linear for queries, keys and values, or of three
            assert kernels[:first] in (BLOCK[:2], [*BLOCK[:2], "linear", "linear"])
            assert kernels[first:] == BLOCK[2:]


@each_model
def test_calibration_is_of_what_the_linears_take(make):
    """Against the library's own forward."""
    case = make()
    seen = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: seen.__setitem__(name, float(args[0].abs().max()))
        )
        for name, module in case.model.named_modules()
        if type(module) is torch.nn.Linear
    ]
    with torch.no_grad():
        case.run()
    for handle in handles:
        handle.remove()
    largest = fastvit.calibrate(case.model, case.images).largest
    assert len(largest) == 2 * len(fp8.LINEARS)
    near = [v for v in seen.values() for w in largest.values() if v == pytest.approx(w, rel=1e-4)]
    assert len(near) >= 2 * 2  # of a packed attention the layers are none by themselves
