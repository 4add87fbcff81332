"""Cases, FLOPs and bytes of `linear`."""

from __future__ import annotations

from typing import Any

from fastvit.kernels._spec import Case, Draw, OpSpec
from fastvit.kernels.linear.op import linear
from fastvit.kernels.linear.reference import linear_reference


def _case(
    name: str,
    m: int,
    k: int,
    n: int,
    *,
    activation: str | None = None,
    bias: bool = True,
    scale: bool = False,
    residual: bool = False,
) -> Case:
    def make(draw: Draw) -> dict[str, Any]:
        return {
            "x": draw(m, k),
            "weight": draw(n, k, std=k**-0.5),
            "bias": draw(n) if bias else None,
            "activation": activation,
            "scale": draw(n) if scale else None,
            "residual": draw(m, n) if residual else None,
        }

    return Case(name, {"M": m, "K": k, "N": n, "residual": int(residual)}, make)


def _outliers(name: str, m: int, k: int, n: int) -> Case:
    """Activations as trained ViTs have them: a few channels 100 times the median."""

    def make(draw: Draw) -> dict[str, Any]:
        x = draw(m, k)
        x[:, :: k // 4] *= 100
        return {"x": x, "weight": draw(n, k, std=k**-0.5), "bias": draw(n), "activation": "gelu"}

    return Case(name, {"M": m, "K": k, "N": n, "residual": 0}, make)


def _flops(sizes: dict[str, int]) -> int:
    return 2 * sizes["M"] * sizes["K"] * sizes["N"]


def _bytes(sizes: dict[str, int], itemsize: int) -> int:
    m, k, n = sizes["M"], sizes["K"], sizes["N"]
    return itemsize * (m * k + n * k + (1 + sizes["residual"]) * m * n)


def _vit_b(batch: int) -> tuple[Case, ...]:
    m = 197 * batch
    return (
        _case(f"ViT-B qkv, batch {batch}", m, 768, 2304),
        _case(f"ViT-B proj, batch {batch}", m, 768, 768, scale=True, residual=True),
        _case(f"ViT-B fc1, batch {batch}", m, 768, 3072, activation="gelu"),
        _case(f"ViT-B fc2, batch {batch}", m, 3072, 768, scale=True, residual=True),
    )


SPECS = (
    OpSpec(
        name="linear",
        op=linear,
        reference=linear_reference,
        cases=(
            _case("one row", 1, 64, 32),
            _case("odd sizes, gelu", 37, 75, 91, activation="gelu"),
            _case("several tiles, residual", 197, 192, 192, scale=True, residual=True),
            _case("gelu_tanh", 65, 96, 64, activation="gelu_tanh"),
            _case("quick_gelu", 65, 96, 64, activation="quick_gelu"),
            _case("silu, no bias", 33, 64, 80, activation="silu", bias=False),
            _case("relu, residual", 33, 64, 80, activation="relu", residual=True),
            _outliers("outlier channels", 130, 384, 192),
        ),
        bench_cases=_vit_b(1) + _vit_b(256),
        flops=_flops,
        bytes=_bytes,
    ),
)
