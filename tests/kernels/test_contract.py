"""The contract every op keeps, read off its OpSpec: numerics of output and gradients, opcheck,
compile, export, strides, poisoned memory, repeatability, FLOPs, bad input.

Kernels run in the interpreter (fixture `triton_path`).
"""

import pytest
import torch
from seeds import SEED
from torch.utils.flop_counter import FlopCounterMode

from fastvit import ops
from fastvit.kernels._register import OPS
from fastvit.kernels.specs import all_specs
from fastvit.numerics import compare_case

SPECS = all_specs()
CASES = [(spec, case) for spec in SPECS.values() for case in spec.cases]

TRAINED = {name: spec for name, spec in SPECS.items() if not spec.inference}
INFERENCE = {name: spec for name, spec in SPECS.items() if spec.inference}


def parametrize_cases(cases):
    ids = [f"{spec.name}: {case.name}" for spec, case in cases]
    return pytest.mark.parametrize(("spec", "case"), cases, ids=ids)


each_op = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_trained_op = pytest.mark.parametrize("spec", TRAINED.values(), ids=TRAINED)
each_case = parametrize_cases(CASES)
each_trained_case = parametrize_cases([case for case in CASES if case[0].name in TRAINED])


def tensors(inputs):
    return {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}


def smallest(spec, dtype=None):
    """Inputs of the case with the fewest elements among those with several tiles of options, in the
    op's first dtype by default: float32 but for what has half results only."""
    case = min(spec.cases[1:], key=lambda case: spec.bytes(case.sizes, 4))
    return spec.inputs(case, dtype or spec.dtypes[0], seed=SEED)


@pytest.mark.parametrize(
    ("spec", "case", "dtype"),
    [
        pytest.param(spec, case, dtype, id=f"{dtype}-{spec.name}: {case.name}")
        for spec, case in CASES
        for dtype in spec.dtypes
    ],
)
def test_numerics_forward(triton_path, spec, case, dtype):
    report = compare_case(spec, case, dtype, seed=SEED)
    assert report.passed, f"seed {SEED}\n{report}"


@each_trained_case
def test_numerics_backward(triton_path, spec, case):
    report = compare_case(spec, case, torch.float32, seed=SEED, backward=True)
    assert len(report.rows) > 1
    assert report.passed, f"seed {SEED}\n{report}"


@each_op
def test_float64_forward_is_exact_to_its_rounding(triton_path, spec):
    if spec.fp8:
        pytest.skip("e4m3 has no form in float64")
    inputs = smallest(spec, torch.float64)
    ours, truth = spec.op(**inputs), spec.reference(**inputs)
    # 1e-12: a few hundred roundings of 1e-16 each
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@each_trained_op
def test_gradcheck_in_float64(triton_path, spec):
    inputs = smallest(spec, torch.float64)
    wanted = {k: v for k, v in tensors(inputs).items() if v.is_floating_point()}
    leaves = [value.requires_grad_() for value in wanted.values()]
    fixed = {k: v for k, v in inputs.items() if k not in wanted}
    run = lambda *args: spec.op(**dict(zip(wanted, args, strict=True)), **fixed)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@each_op
def test_opcheck(triton_path, spec):
    inputs = smallest(spec)
    calls = []
    op = OPS[spec.name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(op), "__call__", lambda self, *a: calls.append(a) or self.overload(*a))
        with FlopCounterMode(display=False):  # a mode, for which a call goes through PyTorch
            spec.op(**inputs)
    (args,) = calls
    args = tuple(
        a.detach().requires_grad_(a.is_floating_point() and not spec.inference)
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    )
    # opcheck compares the inputs before and after, and PyTorch cannot compare e4m3
    schema = () if spec.fp8 else ("test_schema",)
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.overload, args, test_utils=(*schema, *others))


@each_op
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_compiles_as_one_graph(triton_path, spec, path):
    inputs = smallest(spec)
    leaves = tensors(inputs)
    for value in leaves.values():
        value.requires_grad_(value.is_floating_point() and not spec.inference)
    with ops.backend(path):
        torch.compiler.reset()
        compiled = torch.compile(lambda: spec.op(**inputs), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), spec.op(**inputs))
        if spec.inference:
            return
        floats = [value for value in leaves.values() if value.requires_grad]
        ours = torch.autograd.grad(compiled().square().sum(), floats)
        plain = torch.autograd.grad(spec.op(**inputs).square().sum(), floats)
        torch.testing.assert_close(ours, plain)


@each_op
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_exports(triton_path, spec, path):
    class Module(torch.nn.Module):
        def forward(self, inputs):
            return spec.op(**inputs, **fixed)

    inputs = smallest(spec)
    # torch.export takes no dtype among its inputs
    fixed = {k: inputs.pop(k) for k, v in list(inputs.items()) if isinstance(v, torch.dtype)}
    with ops.backend(path):
        program = torch.export.export(Module(), (inputs,))
        torch.testing.assert_close(program.module()(inputs), spec.op(**inputs, **fixed))
        used = any(f"fastvit.{spec.name}" in str(node.target) for node in program.graph.nodes)
        assert used == (path == "triton")


@each_op
def test_any_strides(triton_path, spec):
    inputs = smallest(spec)
    expected = spec.op(**inputs)

    def scattered(value):
        # every second element along each dimension of a larger tensor, dimensions reversed
        large = torch.full([2 * size for size in reversed(value.shape)], float("nan")).to(value)
        view = large[tuple(slice(None, None, 2) for _ in value.shape)].permute(
            *reversed(range(value.dim()))
        )
        view.copy_(value)
        return view

    strided = {k: scattered(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    torch.testing.assert_close(spec.op(**strided), expected)


@each_case
def test_same_input_same_bits(triton_path, spec, case):
    inputs = spec.inputs(case, torch.float16, seed=SEED)
    assert torch.equal(spec.op(**inputs), spec.op(**inputs))


@each_case
def test_every_element_is_written(triton_path, spec, case):
    """`triton_path` fills new memory with NaN; the negative control shows that it does."""
    assert torch.empty(3).isnan().all()
    assert spec.op(**spec.inputs(case, spec.dtypes[0], seed=SEED)).float().isfinite().all()


@each_op
def test_nan_in_is_nan_out(triton_path, spec):
    inputs = smallest(spec)
    name = next(iter(inputs))
    if inputs[name].dtype == torch.uint8:
        pytest.skip("bytes hold no NaN")
    inputs[name][(0,) * inputs[name].dim()] = float("nan")
    ours, reference = spec.op(**inputs), spec.reference(**inputs)
    assert reference.isnan().any()
    assert torch.equal(ours.isnan(), reference.isnan())


@each_case
def test_flops(triton_path, spec, case):
    """PyTorch's counter on our op finds the closed form, which plain PyTorch's products give."""
    inputs = spec.inputs(case, spec.dtypes[0], seed=SEED)
    counts = []
    for run, path in ((spec.op, "triton"), (spec.reference, "torch")):
        with ops.backend(path), FlopCounterMode(display=False) as counter:
            run(**inputs)
        counts.append(counter.get_total_flops())
    assert counts == [spec.flops(case.sizes)] * 2


@each_trained_op
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_autocast(triton_path, spec, path):
    """Under autocast the result has the dtype that PyTorch's own functions give."""
    inputs = smallest(spec)
    with ops.backend(path), torch.autocast("cpu", torch.bfloat16):
        ours = spec.op(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        plain = spec.reference(**inputs)
    if "norm" not in spec.name:  # norms stay float32 on a GPU; PyTorch's CPU rule differs
        assert ours.dtype == plain.dtype
    # 8 bits of mantissa, a few roundings of a sum of order 1 apart
    torch.testing.assert_close(ours.float(), plain.float(), rtol=0.05, atol=0.1)


@each_op
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_bad_dtype_is_named(triton_path, spec, path):
    inputs = smallest(spec)
    first = next(iter(inputs))
    for dtype in (torch.complex64, torch.int32):
        with ops.backend(path), pytest.raises(TypeError, match=str(dtype)):
            spec.op(**{**inputs, first: inputs[first].to(dtype)})


@each_op
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_mixed_dtypes_are_named(triton_path, spec, path):
    inputs = smallest(spec)
    names = [name for name, value in tensors(inputs).items() if value.is_floating_point()]
    if len(names) < 2:
        pytest.skip("one tensor only")
    with ops.backend(path), pytest.raises(TypeError, match="float16"):
        spec.op(**{**inputs, names[1]: inputs[names[1]].half()})


@each_op
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_mixed_devices_are_named(triton_path, spec, path):
    inputs = smallest(spec)
    names = [name for name, value in tensors(inputs).items() if value.is_floating_point()]
    if len(names) < 2:
        pytest.skip("one tensor only")
    with ops.backend(path), pytest.raises(ValueError, match="meta"):
        spec.op(**{**inputs, names[1]: inputs[names[1]].to("meta")})


@each_op
@pytest.mark.parametrize("path", ["triton", "torch"])
def test_empty_batch(triton_path, spec, path):
    inputs = smallest(spec)
    batched = {"x", "statistics", "residual", "q", "k", "v", "qkv", "images", "attn_mask"}
    empty = {k: v[:0] if k in batched and v is not None else v for k, v in inputs.items()}
    if "cu_seqlens" in empty:
        empty["cu_seqlens"] = inputs["cu_seqlens"][:1]
    with ops.backend(path):
        out = spec.op(**empty)
    assert out.shape[0] == 0
    assert out.shape[1:] == spec.reference(**inputs).shape[1:]


@pytest.mark.parametrize("spec", INFERENCE.values(), ids=INFERENCE)
def test_an_op_for_inference_has_no_gradient_and_ignores_autocast(triton_path, spec):
    inputs = smallest(spec)
    plain = spec.op(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spec.op(**inputs).float(), plain.float())
    name = next(k for k, v in tensors(inputs).items() if v.dtype == torch.float32)
    inputs[name].requires_grad_()
    out = spec.op(**inputs)
    if out.dtype != torch.float32:  # e4m3 has no sum
        out = out.float()
    with pytest.raises(RuntimeError, match="for inference"):
        out.sum().backward()
