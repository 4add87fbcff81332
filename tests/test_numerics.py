"""The policy itself: what passes and what must not, on numbers chosen by hand."""

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fastvit
from fastvit import numerics, ops
from fastvit.check.launches import recorded
from fastvit.kernels import _device
from fastvit.kernels._hopper_cases import certified
from fastvit.kernels.linear.reference import linear_reference
from fastvit.kernels.specs import all_specs

TRUTH = torch.linspace(-1.75, 1.75, 64, dtype=torch.float64)
ULP = torch.finfo(torch.float32).eps  # of 1.75, the largest value of TRUTH


def row(ours_error: float, eager_error: float) -> numerics.Row:
    """A row whose every element is off by the given amounts."""
    # in float64, so that the errors are exactly those given
    found = numerics.measure("output", TRUTH + ours_error, TRUTH, TRUTH + eager_error)
    return numerics.Row(**{**vars(found), "ulp": ULP})


def test_cases_for_a_gpu_take_hoppers_kernels():
    """All that they are for; without a GPU, or in float32, the certificate leaves them out."""
    names, gradients = set(), set()
    for spec in all_specs().values():
        for case in spec.gpu_cases:
            inputs = spec.inputs(case, torch.bfloat16, seed=None)
            with _device.emulate("sm90"), recorded() as found, torch.no_grad():
                spec.op(**inputs)
            names.add(found[-1][0].tile.backend)  # before it q and k may be turned
            if spec.name.startswith("attention"):
                leaves = [inputs[x].requires_grad_() for x in ("q", "k", "v", "qkv") if x in inputs]
                with _device.emulate("sm90"), recorded() as found:
                    y = spec.op(**inputs)
                    torch.autograd.grad(y, leaves, torch.empty_like(y))
                gradients.add(found[-1][0].tile.backend)
        assert certified(spec, torch.float32, "cuda") == spec.cases
        assert certified(spec, torch.float16, "cpu") == spec.cases
        assert certified(spec, torch.float16, "cuda") == spec.cases + spec.gpu_cases
    assert names == {"pingpong", "coop", "roles", "head", "stream", "stay"}
    assert gradients == {"whole", ""}


def test_errors_are_maximum_and_rms():
    truth = torch.zeros(4, dtype=torch.float64)
    found = numerics.measure("output", torch.tensor([3.0, 0, 0, 4]), truth, torch.ones(4))
    assert found.max_error == 4
    assert found.rms_error == 2.5
    assert found.eager_max_error == found.eager_rms_error == 1


@pytest.mark.parametrize(
    ("largest", "dtype", "ulp"),
    [
        (1.0, torch.float32, 2**-23),
        (1.9, torch.float32, 2**-23),
        (2.0, torch.float32, 2**-22),
        (0.3, torch.bfloat16, 2**-9),
        (1000.0, torch.float16, 2**-1),
    ],
)
def test_ulp_is_of_the_largest_true_value(largest: float, dtype: torch.dtype, ulp: float):
    truth = torch.tensor([largest, -largest / 7], dtype=torch.float64)
    assert numerics.measure("output", truth.to(dtype), truth, truth.to(dtype)).ulp == ulp


def test_twice_eagers_error_passes_and_three_times_fails():
    assert row(2e-3, 1e-3).passed
    assert row(2e-3, 1e-3).ratio == pytest.approx(2, rel=1e-3)
    assert not row(3e-3, 1e-3).passed
    assert row(3e-3, 1e-3).ratio > numerics.ALLOWED_RATIO


def test_one_ulp_is_allowed_beside_an_exact_eager():
    assert row(0.99 * ULP, 0.0).passed
    assert not row(1.01 * ULP, 0.0).passed


def test_rms_fails_where_the_maximum_passes():
    eager = TRUTH.clone()
    eager[0] += 1e-3  # one bad element
    assert not numerics.measure("output", TRUTH + 1e-3, TRUTH, eager).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_never_pass(bad: float):
    ours = TRUTH.clone()
    ours[5] = bad
    assert not numerics.measure("output", ours, TRUTH, TRUTH).passed
    assert not numerics.measure("output", ours, TRUTH, ours).passed  # nor beside eager's own


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"ours \[1, 64\], truth \[64\]"):
        numerics.measure("output", TRUTH[None], TRUTH, TRUTH)


def linear_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (33, 48), "weight": (24, 48), "bias": (24,)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_reference_itself_has_ratio_one_at_most(dtype: torch.dtype):
    report = numerics.compare(
        linear_reference, linear_reference, linear_inputs(dtype), backward=True
    )
    assert report.passed
    names = ["output", "grad of x", "grad of weight", "grad of bias"]
    assert [row.name for row in report.rows] == names
    assert all(row.ratio <= 1 for row in report.rows)
    assert all(row.max_error == row.eager_max_error > 0 for row in report.rows[:3])


def test_a_wrong_gradient_behind_a_right_output_fails():
    def fast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = linear_reference(x, weight, bias)
        return y + (weight.sum() - weight.sum().detach())  # adds 0, and 1 to weight's gradient

    inputs = linear_inputs()
    assert numerics.compare(fast, linear_reference, inputs).passed
    report = numerics.compare(fast, linear_reference, inputs, backward=True)
    assert [row.name for row in report.rows if not row.passed] == ["grad of weight"]


def test_an_error_three_times_eagers_fails():
    inputs = linear_inputs()
    truth = linear_reference(**{name: value.double() for name, value in inputs.items()})

    def fast(**inputs: Any) -> Tensor:
        return (truth + 4 * (linear_reference(**inputs) - truth)).float()

    report = numerics.compare(fast, linear_reference, inputs)
    assert not report.passed
    # one ULP is taken off our error, and one more rounding is in it
    assert 2 < report.rows[0].ratio < 5


def test_a_case_is_compared_once_on_the_draw_of_its_seed(monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []

    def compare(fast: Any, reference: Any, inputs: Any, **options: Any) -> numerics.Report:
        seen.append(inputs["x"])
        return numerics.Report((row(2.5, 1.0),))

    monkeypatch.setattr(numerics, "compare", compare)
    spec = all_specs()["layer_norm"]
    for seed in (1, 1, 2):
        assert not numerics.compare_case(spec, spec.cases[1], torch.float32, seed=seed).passed
    first, again, other = seen
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --------------------------------------------------------------------------- models


def tiny_model(seed: int = 0) -> nn.Module:
    model = timm.create_model("test_vit", depth=2, num_classes=10).eval()
    numerics.randomise(model, seed)
    return model


IMAGES = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def test_randomise_leaves_nothing_at_its_initial_value():
    model = timm.create_model("test_vit", depth=1, init_values=1e-5)
    before = copy.deepcopy(model.state_dict())
    numerics.randomise(model, 0)
    sizes = {}
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        sizes[name] = float(parameter.detach().square().mean().sqrt())
    # within 20 %: 64 values or more are drawn
    assert sizes["blocks.0.attn.qkv.weight"] == pytest.approx(64**-0.5, rel=0.2)
    assert sizes["patch_embed.proj.weight"] == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.2)
    assert sizes["blocks.0.ls1.gamma"] == pytest.approx(1.09**0.5, rel=0.2)
    assert sizes["blocks.0.attn.qkv.bias"] == pytest.approx(0.3, rel=0.2)
    assert sizes["cls_token"] == pytest.approx(0.3, rel=0.2)


def test_an_accelerated_model_passes_with_gradients():
    model = tiny_model()
    fast = fastvit.accelerate(copy.deepcopy(model))
    watched = ["patch_embed.proj.weight", "blocks.1.attn.qkv.bias"]
    report = numerics.compare_models(fast, model, IMAGES, gradients=watched)
    assert report.passed, report
    names = ["logits", "pooled", *(f"grad of {name}" for name in watched)]
    assert [row.name for row in report.rows] == names
    assert (report.images, report.top1, report.lost) == (3, 3, 0)


def test_pooled_features_are_what_the_head_is_given():
    model = tiny_model()
    logits, pooled = numerics._run_model(model, IMAGES, gradients=(), seed=0, dtype=torch.float32)
    assert torch.equal(logits, model(IMAGES))
    assert torch.equal(pooled, model.forward_head(model.forward_features(IMAGES), pre_logits=True))  # type: ignore


@pytest.mark.parametrize("name", ["blocks.1.attn.proj.bias", "blocks.0.norm1.weight", "cls_token"])
def test_a_model_without_one_of_its_vectors_fails(name: str):
    model = tiny_model()
    broken = copy.deepcopy(model)
    broken.get_parameter(name).data.zero_()
    assert not numerics.compare_models(broken, model, IMAGES).passed


def test_a_lost_image_fails_and_an_undecided_one_does_not():
    model = tiny_model()
    other = copy.deepcopy(model)
    head = other.get_parameter("head.bias")
    head.data += 100 * torch.nn.functional.one_hot(model(IMAGES)[0].argsort()[0], 10)
    report = numerics.compare_models(other, model, IMAGES)
    assert report.top1 < report.eager_top1 == 3
    assert report.lost == 3 - report.top1
    tied = copy.deepcopy(model)
    for parameter in (tied.get_parameter("head.weight"), tied.get_parameter("head.bias")):
        parameter.data[:] = parameter.data[:1]  # all classes alike: no class is the right one
    assert numerics.compare_models(tied, tied, IMAGES).lost == 0


def test_autocast_is_judged_beside_eagers_autocast():
    model = tiny_model()
    fast = fastvit.accelerate(copy.deepcopy(model))
    watched = ["blocks.0.norm1.weight", "head.weight"]
    options: dict[str, Any] = {"gradients": watched, "autocast": torch.bfloat16}
    report = numerics.compare_models(fast, model, IMAGES, **options)
    assert report.passed, report
    # bfloat16's errors, not float32's
    assert all(row.eager_rms_error > 1e-4 for row in report.rows)
    head = fast.get_parameter("head.bias")
    head.data += 1
    assert not numerics.compare_models(fast, model, IMAGES, **options).passed


def test_certify_model_is_deterministic_and_counts_what_is_not_fused():
    arguments = {"dtype": torch.float32, "depth": 1, "seed": 4}
    report = numerics.certify_model("test_vit", **arguments)  # type: ignore
    assert report.passed, report
    assert len(report.rows) == 2 + 6
    assert report.unfused == ()
    assert report == numerics.certify_model("test_vit", **arguments)  # type: ignore


def test_certify_model_refuses_a_model_of_which_nothing_is_fused():
    with pytest.raises(ValueError, match="nothing of resnet18"):
        numerics.certify_model("resnet18", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_softmax_scale_wrong_by_a_tenth_is_caught_in_a_model(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    right = ops.attention_qkv

    def wrong(qkv: Tensor, num_heads: int, *rest: Any, **options: Any) -> Tensor:
        return right(qkv, num_heads, *rest[:2], **options | {"scale": 0.9 * 32**-0.5})

    monkeypatch.setattr(ops, "attention_qkv", wrong)
    assert not numerics.certify_model("test_vit", dtype, depth=1, backward=False).passed
