"""The policy itself: what passes and what must not, on numbers chosen by hand."""

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn

import fastvit
from fastvit import numerics, ops
from fastvit.kernels.linear.reference import linear_reference

TRUTH = torch.linspace(-1.75, 1.75, 64, dtype=torch.float64)
ULP = torch.finfo(torch.float32).eps  # of 1.75, the largest value of TRUTH


def row(ours_error: float, eager_error: float) -> numerics.Row:
    """A row whose every element is off by the given amounts."""
    # in float64, so that the errors are exactly those given
    found = numerics.measure("output", TRUTH + ours_error, TRUTH, TRUTH + eager_error)
    return numerics.Row(**{**vars(found), "ulp": ULP})


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


def linear_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
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

    def fast(**inputs: Tensor) -> Tensor:
        return (truth + 4 * (linear_reference(**inputs) - truth)).float()

    report = numerics.compare(fast, linear_reference, inputs)
    assert not report.passed
    # one ULP is taken off our error, and one more rounding is in it
    assert 2 < report.rows[0].ratio < 5


# --------------------------------------------------------------------------- models


def tiny_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", depth=2, num_classes=10).eval()
    numerics.randomise_vectors(model, seed)
    return model


IMAGES = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def test_randomise_vectors_reaches_every_vector_and_no_matrix():
    before = timm.create_model("test_vit", depth=1, init_values=1e-5)
    after = copy.deepcopy(before)
    numerics.randomise_vectors(after, 0)
    changed = {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    vectors = {name for name, p in before.named_parameters() if max(p.shape) == p.numel()}
    assert changed == vectors
    assert {"cls_token", "blocks.0.ls1.gamma", "blocks.0.attn.qkv.bias", "norm.weight"} < vectors


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
    logits, pooled = numerics._run_model(model, IMAGES, gradients=(), seed=0)
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


def test_a_planted_softmax_scale_is_caught_in_a_model(monkeypatch: pytest.MonkeyPatch):
    right = ops.attention_qkv
    monkeypatch.setattr(
        ops, "attention_qkv", lambda qkv, heads, mask, p: right(qkv, heads, mask, p, scale=0.2)
    )
    assert not numerics.certify_model("test_vit", torch.float32, depth=1, backward=False).passed
