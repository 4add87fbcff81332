"""Every backend of `linear` that a tuning table may choose, by the numerics policy."""

import time

import pytest
import torch

from fastvit import ops
from fastvit.kernels._spec import all_specs
from fastvit.kernels._tuning import TileConfig
from fastvit.numerics import compare_case

SPEC = all_specs()["linear"]
SEED = int(time.time())  # fresh each run; a failure prints it
BACKENDS = {
    "pointers": TileConfig(32, 64, 32),
    "pointers, bands": TileConfig(32, 64, 32, subtiles=2),
    "tma": TileConfig(32, 64, 32, backend="tma"),
    "tma, bands": TileConfig(32, 64, 32, backend="tma", subtiles=4),
    "tma, persistent": TileConfig(32, 32, 32, backend="tma", persistent=1),
    "device_tma": TileConfig(32, 32, 32, backend="device_tma", persistent=1),
    "device_tma, warps": TileConfig(
        32, 64, 32, backend="device_tma", subtiles=2, warp_specialize=True
    ),
    "split": TileConfig(32, 64, 32, split_k=3),
    "split, bands": TileConfig(32, 64, 32, split_k=2, subtiles=2),
    "split, tma": TileConfig(32, 32, 32, backend="tma", split_k=4),
    "cublas": TileConfig(32, 32, 32, backend="cublas"),
}


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched, on a card of 3 multiprocessors."""
    from fastvit.kernels import _library

    seen = []

    def launch(kernel, programs, tile, **arguments):
        seen.append((kernel.fn.__name__, programs))
        _library.launch(kernel, programs, tile, **arguments)

    monkeypatch.setattr("fastvit.kernels.linear.op.launch", launch)
    monkeypatch.setattr("fastvit.kernels.linear.op.multiprocessors", lambda device: 3)
    return seen


# float16 differs in the interpreter's arithmetic only, so one backend of each kernel gets it
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, torch.bfloat16) for name in BACKENDS]
    + [(name, torch.float16) for name in ("pointers", "tma", "device_tma", "split", "cublas")],
    ids=str,
)
def test_backends_pass_the_policy(triton_path, monkeypatch, launches, backend, case, dtype):
    tile = BACKENDS[backend]
    monkeypatch.setattr("fastvit.kernels.linear.op.lookup", lambda *args, **sizes: tile)
    report = compare_case(SPEC, case, dtype, seed=SEED)
    assert report.passed, f"seed {SEED}\n{report}"

    packed = case.sizes["K"] % 8 == 0  # rows of 16 bytes, else TMA cannot read them
    tma = tile.backend not in ("", "cublas") and packed
    if backend == "cublas":
        assert launches == []
    elif tile.split_k > 1 and (tma or tile.backend == ""):
        (kernel, programs), (then, _) = launches
        assert (kernel, then) == ("linear_split_kernel", "linear_reduce_kernel")
        assert programs % tile.split_k == 0
    else:
        (kernel, programs), = launches  # fmt: skip
        assert kernel == (f"linear_{tile.backend}_kernel" if tma else "linear_kernel")
        if tma and tile.persistent:
            assert programs <= 3


def test_strided_operands_take_pointers(triton_path, launches):
    """The table asks for TMA; a transposed weight or every second row still comes out right."""
    x, weight = torch.randn(64, 40).half(), torch.randn(32, 64).half()
    for a, b in ((x.T, weight), (x.T.contiguous()[::2], weight.T.contiguous().T)):
        torch.testing.assert_close(SPEC.op(a, b[:, : a.shape[1]]), a @ b[:, : a.shape[1]].T)
    assert {name for name, _ in launches} == {"linear_kernel"}


def test_polynomial_gelu_over_every_bfloat16(triton_path):
    """All bfloat16 inputs within +-300, through an identity matrix: within 4e-5 of erf's GELU
    before the store's rounding, hence within half a ULP plus that after it."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    x = bits.view(torch.bfloat16)
    x = x[x.float().abs() <= 300]  # larger ones overflow nothing, but are all 0 or x
    x = torch.nn.functional.pad(x, (0, -len(x) % 16)).view(-1, 16)
    ours = ops.linear(x, torch.eye(16, dtype=torch.bfloat16), activation="gelu").double()
    truth = torch.nn.functional.gelu(x.double())
    half_ulp = truth.abs() * 2.0**-8  # at most, with 8 significant bits
    assert ((ours - truth).abs() <= half_ulp + 4e-5).all()
    large = x >= 4.5
    assert torch.equal(ours[large], x[large].double())
    assert (ours[x <= -4.5] == 0).all()


def test_other_dtypes_keep_erf(triton_path):
    """float16 and float32 results, and bfloat16 operands with a float32 residual."""
    x = torch.linspace(-6, 6, 256).view(-1, 1)
    for dtype, residual, tolerance in (
        (torch.float32, None, 1e-6),
        (torch.bfloat16, torch.zeros(256, 1), 1e-6),
    ):
        a = x.to(dtype)
        ours = ops.linear(a, torch.ones(1, 1, dtype=dtype), activation="gelu", residual=residual)
        truth = torch.nn.functional.gelu(a.double())
        assert (ours.double() - truth).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_split_sums_are_in_the_accumulators_dtype(triton_path, monkeypatch, launches, dtype):
    """Also with more parts than steps, and twice with the same bits."""
    tile = TileConfig(16, 32, 32, split_k=8)
    monkeypatch.setattr("fastvit.kernels.linear.op.lookup", lambda *args, **sizes: tile)
    inputs = SPEC.inputs(SPEC.cases[1], dtype, seed=SEED)  # K = 75: three steps
    first, second = (SPEC.op(**inputs) for _ in range(2))
    truth = SPEC.reference(**SPEC.inputs(SPEC.cases[1], torch.float64, seed=SEED))
    assert torch.equal(first, second)
    # sums of 75 products and erf, each within a few ULP
    assert (first - truth).abs().max() < 50 * torch.finfo(dtype).eps * truth.abs().max()
    assert {name for name, _ in launches} == {"linear_split_kernel", "linear_reduce_kernel"}
