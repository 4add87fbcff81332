"""Cases, FLOPs and bytes of `norm_linear`."""

from __future__ import annotations

from typing import Any

from fastvit.kernels._spec import Case, Draw, OpSpec
from fastvit.kernels.norm_linear.op import norm_linear
from fastvit.kernels.norm_linear.reference import norm_linear_reference


def _case(name: str, m: int, k: int, n: int, *, mean: float = 0.0, full: bool = True) -> Case:
    def make(draw: Draw) -> dict[str, Any]:
        return {
            "x": draw(m, k, mean=mean),
            "norm_weight": draw(k) if full else None,
            "norm_bias": draw(k) if full else None,
            "weight": draw(n, k, std=k**-0.5),
            "bias": draw(n) if full else None,
            "eps": 1e-6,
        }

    return Case(name, {"M": m, "K": k, "N": n}, make)


def _flops(sizes: dict[str, int]) -> int:
    return 2 * sizes["M"] * sizes["K"] * sizes["N"]


def _bytes(sizes: dict[str, int], itemsize: int) -> int:
    m, k, n = sizes["M"], sizes["K"], sizes["N"]
    # the normalised rows are written and read once
    return itemsize * (3 * m * k + n * k + m * n)


SPECS = (
    OpSpec(
        name="norm_linear",
        op=norm_linear,
        reference=norm_linear_reference,
        cases=(
            _case("one row", 1, 64, 32),
            _case("odd sizes", 37, 75, 91),
            _case("several tiles", 130, 96, 192),
            _case("no affine, no bias", 33, 64, 80, full=False),
            _case("mean far from zero", 65, 96, 64, mean=30.0),
        ),
        bench_cases=tuple(
            _case(f"ViT-B norm1 and qkv, batch {batch}", 197 * batch, 768, 2304)
            for batch in (1, 256)
        ),
        flops=_flops,
        bytes=_bytes,
    ),
)
