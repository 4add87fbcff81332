"""Every backend of `linear` that a tuning table may choose, by the numerics policy."""

import time

import pytest
import torch

from fastvit import ops
from fastvit.kernels._spec import all_specs
from fastvit.kernels._tuning import TileConfig
from fastvit.numerics import compare

SPEC = all_specs()["linear"]
SEED = int(time.time())  # fresh each run; a failure prints it
BACKENDS = {
    "pointers": TileConfig(32, 64, 32),
    "pointers, bands": TileConfig(32, 64, 32, subtiles=2),
    "tma": TileConfig(32, 64, 32, backend="tma"),
    "tma, bands": TileConfig(32, 64, 32, backend="tma", subtiles=4),
    "tma, persistent": TileConfig(32, 32, 32, backend="tma", persistent=1),
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_pass_the_policy(triton_path, monkeypatch, launches, backend, case, dtype):
    tile = BACKENDS[backend]
    monkeypatch.setattr("fastvit.kernels.linear.op.lookup", lambda *args, **sizes: tile)
    report = compare(SPEC.op, SPEC.reference, SPEC.inputs(case, dtype, seed=SEED))
    assert report.passed, f"seed {SEED}\n{report}"

    packed = case.sizes["K"] % 8 == 0  # rows of 16 bytes, else TMA cannot read them
    if backend == "cublas":
        assert launches == []
    else:
        tma = tile.backend == "tma" and packed
        (kernel, programs), = launches  # fmt: skip
        assert kernel == ("linear_tma_kernel" if tma else "linear_kernel")
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
