"""Every backend of `linear` that a tuning table may choose, by the numerics policy."""

import pytest
import torch
from seeds import SEED

from fastvit import ops
from fastvit.kernels._tuning import TileConfig, forced
from fastvit.kernels.specs import all_specs
from fastvit.numerics import compare_case

SPEC = all_specs()["linear"]
BACKENDS = {
    "pointers": TileConfig(32, 64, 32),
    "pointers, bands": TileConfig(32, 64, 32, subtiles=2),
    "tma": TileConfig(32, 64, 32, backend="tma"),
    "tma, bands": TileConfig(32, 64, 32, backend="tma", subtiles=4),
    "cublas": TileConfig(32, 32, 32, backend="cublas"),
}


# float16 differs in the interpreter's arithmetic only, so one backend of each kernel gets it
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, torch.bfloat16) for name in BACKENDS]
    + [(name, torch.float16) for name in ("pointers", "tma", "cublas")],
    ids=str,
)
def test_backends_pass_the_policy(triton_path, launched, backend, case, dtype):
    tile = BACKENDS[backend]
    with forced("linear", tile):
        report = compare_case(SPEC, case, dtype, seed=SEED)
    assert report.passed, f"seed {SEED}\n{report}"

    packed = case.sizes["K"] % 8 == 0  # rows of 16 bytes, else TMA cannot read them
    if backend == "cublas":
        assert launched == []
    else:
        (prepared,) = launched
        assert len(prepared.boxes) == (2 if tile.backend == "tma" and packed else 0)


def test_strided_operands_take_pointers(triton_path, launched):
    """The table asks for TMA; a transposed weight or every second row still comes out right."""
    x, weight = torch.randn(64, 40).half(), torch.randn(32, 64).half()
    with forced("linear", BACKENDS["tma"]):
        for a, b in ((x.T, weight), (x.T.contiguous()[:, ::2], weight[:, :32])):
            torch.testing.assert_close(SPEC.op(a, b), a @ b.T)
    assert [prepared.boxes for prepared in launched] == [()] * 2


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
