"""Gradients of the ops through their kernels, in the interpreter: half dtypes, every form that a
tuning table may choose, mixed dtypes, and what the contract of all ops leaves open."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from seeds import SEED

from fastvit import ops
from fastvit.kernels import _tuning
from fastvit.kernels._tuning import TileConfig
from fastvit.kernels.layer_norm.reference import rms_norm_reference
from fastvit.kernels.linear.launch_backward import MAX_SPLIT, choose_split
from fastvit.kernels.linear.reference import ACTIVATIONS, linear_reference
from fastvit.kernels.mlp.reference import mlp_reference
from fastvit.kernels.norm_linear.reference import norm_linear_reference
from fastvit.kernels.specs import all_specs
from fastvit.numerics import compare, compare_case

SPECS = {name: spec for name, spec in all_specs().items() if not spec.inference}
NAMES = ("linear", "mlp", "norm_mlp", "layer_norm", "rms_norm", "patch_embed", "norm_linear")


def check(op, reference, inputs):
    report = compare(op, reference, inputs, backward=True)
    assert len(report.rows) > 1
    assert report.passed, f"seed {SEED}\n{report}"


def draw(*shape, std=1.0, dtype=torch.float32, seed=SEED):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * std).to(dtype)


def linear_inputs(m=50, k=48, n=40, dtype=torch.float32, **more):
    return {
        "x": draw(m, k, dtype=dtype),
        "weight": draw(n, k, std=k**-0.5, dtype=dtype),
        "bias": draw(n, dtype=dtype),
        "scale": draw(n + 1, dtype=dtype)[1:],
        "residual": draw(m, n, dtype=dtype),
        **more,
    }


def gradients(op, inputs, wanted=None):
    """Gradients by name, of all floating inputs unless told."""
    wanted = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()
              and (wanted is None or k in wanted)]  # fmt: skip
    leaves = {k: v.detach().requires_grad_() if k in wanted else v for k, v in inputs.items()}
    y = op(**leaves)
    cotangent = draw(*y.shape).to(y.dtype)
    return dict(zip(wanted, torch.autograd.grad(y, [leaves[k] for k in wanted], cotangent)))  # noqa: B905


# --------------------------------------------------------------------------- every op

QUICK = 400_000  # bytes of a case in float32; the interpreter takes several seconds for more
CASES = [
    pytest.param(
        spec, case, id=f"{name}: {case.name}",
        marks=[pytest.mark.slow] if spec.bytes(case.sizes, 4) > QUICK else [],
    )
    for name, spec in SPECS.items()
    for case in spec.cases
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_half_dtypes_pass_the_policy(triton_path, spec, case, dtype):
    report = compare_case(spec, case, dtype, seed=SEED, backward=True)
    assert len(report.rows) > 1
    assert report.passed, f"seed {SEED}\n{report}"


@pytest.mark.parametrize("name", SPECS)
def test_same_input_same_bits(triton_path, name):
    spec = SPECS[name]
    case = min(spec.cases[1:], key=lambda case: spec.bytes(case.sizes, 4))
    inputs = spec.inputs(case, torch.bfloat16, seed=SEED)
    first, second = (gradients(spec.op, inputs) for _ in range(2))
    assert first.keys() == second.keys()
    for key, grad in first.items():
        assert grad.isfinite().all()  # new memory is NaN: all of it was written
        assert torch.equal(grad, second[key]), key


KERNELS = {
    "linear": {"weight_product_kernel", "weight_gradient_kernel", "pre_gradient_kernel"},
    "mlp": {"weight_product_kernel", "weight_gradient_kernel"},
    "norm_mlp": {"weight_product_kernel", "weight_gradient_kernel", "norm_backward_kernel"},
    "layer_norm": {"norm_backward_kernel"},
    "rms_norm": {"norm_backward_kernel"},
    "patch_embed": {"weight_product_kernel", "weight_gradient_kernel"},
    "norm_linear": {"weight_product_kernel", "weight_gradient_kernel", "norm_backward_kernel"},
}


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_run_on_kernels(triton_path, launched, name):
    spec = SPECS[name]
    case = min(spec.cases[1:], key=lambda case: spec.bytes(case.sizes, 4))
    gradients(spec.op, spec.inputs(case, torch.float32, seed=SEED))
    ran = {prepared.kernel.fn for prepared in launched}
    backward = {fn.__name__ for fn in ran if fn.__module__.endswith("kernel_backward")}
    assert backward == KERNELS[name]


@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone_is_the_same(triton_path, name):
    """Whatever else is frozen."""
    spec = SPECS[name]
    case = min(spec.cases[1:], key=lambda case: spec.bytes(case.sizes, 4))
    inputs = spec.inputs(case, torch.float32, seed=SEED)
    for key, grad in gradients(spec.op, inputs).items():
        alone = gradients(spec.op, inputs, wanted=[key])
        assert alone.keys() == {key}
        # sums may be taken in another place, in another order
        torch.testing.assert_close(alone[key], grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_has_zero_gradients(triton_path, name):
    spec = SPECS[name]
    inputs = spec.inputs(spec.cases[1], torch.float32, seed=SEED)
    batched = {"x", "residual", "images"} & {k for k, v in inputs.items() if v is not None}
    empty = inputs | {k: inputs[k][:0] for k in batched}
    for key, grad in gradients(spec.op, empty).items():
        assert grad.shape == empty[key].shape
        assert not grad.any()


# --------------------------------------------------------------------------- linear

WEIGHT_PRODUCTS = {
    "pointers": TileConfig(32, 32, 16),
    "tma": TileConfig(32, 32, 16, backend="tma"),
    "cublas": TileConfig(128, 128, backend="cublas"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", WEIGHT_PRODUCTS.values(), ids=WEIGHT_PRODUCTS)
@pytest.mark.parametrize(("m", "split"), [(64, 1), (64, 3), (50, 1), (50, 3), (50, 5)])
def test_forms_of_the_weight_gradient(triton_path, monkeypatch, tile, dtype, m, split):
    """Rows that fill the last block and rows that do not, more parts than blocks of rows."""
    monkeypatch.setattr("fastvit.kernels.linear.launch_backward.choose_split", lambda *_: split)
    if tile.backend == "tma" and dtype == torch.float32:
        pytest.skip("half dtypes only")
    with _tuning.forced("linear_backward", tile):
        check(ops.linear, linear_reference, linear_inputs(m, dtype=dtype))


HIDDEN_GRADIENTS = {
    "pointers": TileConfig(32, 32, 16),
    "pointers, bands": TileConfig(32, 64, 16, subtiles=2),
    "tma": TileConfig(32, 32, 16, backend="tma"),
    "tma, bands": TileConfig(32, 64, 16, backend="tma", subtiles=2),
    "cublas": TileConfig(128, 128, backend="cublas"),
}


@pytest.mark.parametrize("tile", HIDDEN_GRADIENTS.values(), ids=HIDDEN_GRADIENTS)
def test_forms_of_the_hidden_gradient(triton_path, tile):
    """`mlp` with the tile for all its products."""
    spec = SPECS["mlp"]
    with _tuning.forced("linear", tile):
        check(spec.op, spec.reference, spec.inputs(spec.cases[2], torch.bfloat16, seed=SEED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_every_activation(triton_path, op, activation, dtype):
    k, f = 32, 48
    inputs = {"activation": None if activation == "none" else activation}
    if op == "linear":
        check(ops.linear, linear_reference, linear_inputs(40, k, f, dtype, **inputs))
        return
    weights = {
        "w1": draw(f, k, std=k**-0.5, dtype=dtype), "b1": draw(f, dtype=dtype),
        "w2": draw(k, f, std=f**-0.5, dtype=dtype), "b2": draw(k, dtype=dtype),
    }  # fmt: skip
    check(ops.mlp, mlp_reference, {"x": draw(40, k, dtype=dtype), **weights, **inputs})


@pytest.mark.parametrize("tile", [TileConfig(32, 32, 16), TileConfig(32, 32, backend="cublas")])
def test_a_small_layer_scale_keeps_its_digits_in_float16(triton_path, tile):
    """scale * W is below float16's least number here, and the gradient of x is not."""
    x, weight = draw(50, 48).half(), draw(40, 48, std=0.15).half()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    cotangent = draw(50, 40, std=1e4)
    with _tuning.forced("linear", tile), _tuning.forced("linear_backward", tile):
        y = ops.linear(*leaves, scale=torch.full((40,), 1e-7))
        dx, dw = torch.autograd.grad(y, leaves, cotangent)
    g = cotangent.half().double() * 1e-7  # what the products read
    for ours, truth in ((dx, g @ weight.double()), (dw, g.t() @ x.double())):
        assert (ours - truth).abs().max() < 2**-10 * truth.abs().max()


@pytest.mark.parametrize("activation", ["gelu", None])
def test_row_scale(triton_path, activation):
    factors = torch.tensor([0.0, 2.0, 1.25]).repeat(4)

    def ours(**inputs):
        return ops.linear(**inputs, activation=activation, row_scale=factors)

    def plain(x, **inputs):
        row_scale = factors.to(x.dtype)
        return linear_reference(x, **inputs, activation=activation, row_scale=row_scale)

    check(ours, plain, linear_inputs(m=12))


def test_row_scale_is_a_constant_for_each_row():
    inputs = linear_inputs(m=12)
    with pytest.raises(ValueError, match="row_scale has no gradient"):
        ops.linear(**inputs, row_scale=torch.ones(12, requires_grad=True))
    with pytest.raises(ValueError, match=r"row_scale has shape \[3\]"):
        ops.linear(**inputs, row_scale=torch.ones(3))


def test_any_strides_of_a_cotangent(triton_path):
    x, weight = draw(6, 5, 32), draw(16, 32)
    for cotangent in (
        torch.ones(()).expand(6, 5, 16),
        draw(16, 5, 6).permute(2, 1, 0),
        draw(6, 5, 32)[..., ::2],
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        ours = torch.autograd.grad(ops.linear(*leaves), leaves, cotangent)
        plain = torch.autograd.grad(F.linear(*leaves), leaves, cotangent)
        torch.testing.assert_close(ours, plain)


def test_a_residual_of_another_dtype(triton_path):
    """The gradient of a sum is the cotangent, in the dtype of each of what is summed."""
    x, weight = (draw(4, 8).requires_grad_() for _ in range(2))
    residual = draw(4, 4).bfloat16().requires_grad_()
    y = ops.linear(x, weight, residual=residual)
    (grad,) = torch.autograd.grad(y, [residual], torch.full_like(y, 1.5))
    assert grad.dtype == torch.bfloat16
    assert (grad == 1.5).all()


def test_splits_fill_the_gpu_and_no_more():
    """On 132 multiprocessors of two programs each, and blocks of 64 rows."""

    def split(tiles, rows):
        return choose_split(tiles, -(-rows // 64), 64, 132)

    for tiles in (36, 108, 144):  # ViT-B's linears at batch 256
        rounds = tiles * split(tiles, 50_432) / 264
        assert rounds / math.ceil(rounds) > 0.8  # the last round is nearly full
    assert split(144, 197) == 1  # parts would cost more than the idle programs
    assert 1 < split(6, 12_608) < 64
    assert split(1, 10**6) == MAX_SPLIT
    assert split(1, 100) <= 2  # blocks of rows
    assert split(4, 0) == 1


# --------------------------------------------------------------------------- mixed dtypes


def under_autocast(function, path="triton"):
    def call(**inputs):
        with ops.backend(path), torch.autocast("cpu", torch.bfloat16):
            return function(**inputs)

    return call


# Results are float32 here, so the policy adds no ULP of bfloat16 to twice the error of a few dozen
# values: fixed draws, so that what passes goes on passing.
fixed = functools.partial(draw, seed=0)
X, NORM = fixed(50, 48), {"norm_weight": fixed(48), "norm_bias": fixed(49)[1:]}
LINEAR = {"weight": fixed(40, 48, std=0.1), "bias": fixed(40)}
TAIL = {"scale": fixed(41)[1:], "residual": fixed(50, 40)}
MLP = {
    "w1": fixed(64, 48, std=0.1), "b1": fixed(64), "w2": fixed(48, 64, std=0.1), "b2": fixed(48),
}  # fmt: skip
MIXED = {
    "linear": (ops.linear, linear_reference, {"x": X, **LINEAR, **TAIL}),
    "linear, gelu": (
        ops.linear, linear_reference, {"x": X, **LINEAR, **TAIL, "activation": "gelu"}
    ),
    "norm_linear": (ops.norm_linear, norm_linear_reference, {"x": X, **NORM, **LINEAR}),
    "norm_mlp": (
        ops.mlp, mlp_reference,
        {"x": X, **MLP, **NORM, "scale": fixed(50)[2:], "residual": fixed(50, 48)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_autocast_keeps_float32_where_pytorch_does(triton_path, name):
    """float32 parameters, residual stream and gradients around bfloat16 products; the yardstick is
    PyTorch under autocast."""
    op, reference, inputs = MIXED[name]
    check(under_autocast(op), under_autocast(reference, "torch"), inputs)
    for key, grad in gradients(under_autocast(op), inputs).items():
        assert grad.dtype == inputs[key].dtype


def test_a_residual_that_is_the_input_gets_both_gradients(triton_path):
    """In one kernel, and as the sum of two."""
    inputs = {"x": X, **MLP, **NORM, "scale": draw(48)}

    def skipping(x, **others):
        return ops.mlp(x, **others, residual=x)

    check(skipping, lambda x, **others: mlp_reference(x, **others, residual=x), inputs)
    ours = gradients(skipping, inputs)
    apart = gradients(lambda x, **others: ops.mlp(x, **others, residual=x.clone()), inputs)
    for key, grad in ours.items():
        torch.testing.assert_close(grad, apart[key])


# --------------------------------------------------------------------------- norms


def test_rms_norm_of_one_value(triton_path):
    """The gradient of x / |x| is 0: what is left is rounding, a few ULP of its two summands."""
    x = draw(5, 1).requires_grad_()
    (grad,) = torch.autograd.grad(ops.rms_norm(x, None, eps=0.0).sum(), [x])
    assert (grad.abs() <= 8 * torch.finfo(torch.float32).eps / x.abs()).all()


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
def test_norms_without_eps(triton_path):
    """Rows past the last one have no variance, and must not spoil the sums with 0 * infinity."""
    inputs = {"x": draw(3, 8), "weight": draw(8)}
    for ours, plain in (
        (lambda x, weight: ops.rms_norm(x, weight, eps=0.0),
         lambda x, weight: rms_norm_reference(x, weight, eps=0.0)),
        (lambda x, weight: ops.layer_norm(x, weight, None, eps=0.0),
         lambda x, weight: F.layer_norm(x, (8,), weight, None, eps=0.0)),
    ):  # fmt: skip
        torch.testing.assert_close(gradients(ours, inputs), gradients(plain, inputs))


def test_norm_weights_in_float32_for_half_rows(triton_path):
    inputs = {"x": draw(9, 32).bfloat16(), "weight": draw(32), "bias": draw(33)[1:]}
    grads = gradients(ops.layer_norm, inputs)
    assert [grads[name].dtype for name in inputs] == [torch.bfloat16, torch.float32, torch.float32]
    wide = {name: value.double() for name, value in inputs.items()}
    with ops.backend("torch"):
        truth = gradients(ops.layer_norm, wide)
    # a cotangent rounded to bfloat16 and one that is not are 2^-9 apart
    for name, grad in truth.items():
        torch.testing.assert_close(grads[name].double(), grad, rtol=0.02, atol=0.05)
