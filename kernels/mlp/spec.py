"""Cases, FLOPs and bytes of `mlp`."""

from __future__ import annotations

from typing import Any

from fastvit.kernels._spec import Case, Draw, OpSpec
from fastvit.kernels.mlp.op import mlp
from fastvit.kernels.mlp.reference import mlp_reference


def _case(
    name: str, m: int, k: int, f: int, *, activation: str = "gelu", full: bool, norm: bool = False
) -> Case:
    def make(draw: Draw) -> dict[str, Any]:
        return {
            "x": draw(m, k),
            "w1": draw(f, k, std=k**-0.5),
            "b1": draw(f) if full else None,
            "w2": draw(k, f, std=f**-0.5),
            "b2": draw(k) if full else None,
            "activation": activation,
            "scale": draw(k) if full else None,
            "residual": draw(m, k) if full else None,
            **({"norm_weight": draw(k), "norm_bias": draw(k)} if norm else {}),
        }

    return Case(name, {"M": m, "K": k, "F": f, "residual": int(full)}, make)


def _flops(sizes: dict[str, int]) -> int:
    return 4 * sizes["M"] * sizes["K"] * sizes["F"]


def _bytes(sizes: dict[str, int], itemsize: int) -> int:
    m, k, f = sizes["M"], sizes["K"], sizes["F"]
    # the hidden layer is written and read once
    return itemsize * ((2 + sizes["residual"]) * m * k + 2 * k * f + 2 * m * f)


SPECS = (
    OpSpec(
        name="mlp",
        op=mlp,
        reference=mlp_reference,
        cases=(
            _case("several tiles", 130, 96, 384, full=True),
            _case("odd hidden, no bias", 19, 48, 75, full=False),
            _case("quick_gelu", 50, 64, 256, activation="quick_gelu", full=True),
        ),
        bench_cases=tuple(
            _case(f"ViT-B, batch {batch}", 197 * batch, 768, 3072, full=True) for batch in (1, 256)
        ),
        flops=_flops,
        bytes=_bytes,
    ),
    OpSpec(
        name="norm_mlp",
        op=mlp,
        reference=mlp_reference,
        cases=(
            _case("several tiles", 130, 64, 256, full=True, norm=True),
            _case("odd hidden, silu", 19, 48, 75, activation="silu", full=False, norm=True),
        ),
        bench_cases=tuple(
            _case(f"ViT-B, batch {batch}", 197 * batch, 768, 3072, full=True, norm=True)
            for batch in (1, 256)
        ),
        flops=_flops,
        bytes=lambda sizes, itemsize: (
            # the normalised rows are written and read once
            _bytes(sizes, itemsize) + 2 * itemsize * sizes["M"] * sizes["K"]
        ),
    ),
)
