"""Cases, FLOPs and bytes of `linear`."""

from typing import Any

from fastvit.kernels._hopper_cases import LINEAR
from fastvit.kernels._spec import Case, OpSpec, changed, drawn, product_flops
from fastvit.kernels.linear.op import linear
from fastvit.kernels.linear.reference import linear_reference


def _case(
    name: str, m: int, k: int, n: int, *, activation: str | None = None, bias: bool = True,
    scale: bool = False, residual: bool = False,
) -> Case:  # fmt: skip
    return drawn(
        name, {"M": m, "K": k, "N": n, "residual": int(residual)},
        {"activation": activation},
        x="MK", weight="NK/K", bias="N" * bias, scale="N" * scale, residual="MN" * residual,
    )  # fmt: skip


def _outliers(inputs: dict[str, Any]) -> dict[str, Any]:
    """Activations as trained ViTs have them: a few channels 100 times the median."""
    inputs["x"][:, :: inputs["x"].shape[1] // 4] *= 100
    return inputs


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


_CASES = (
    _case("one row", 1, 64, 32),
    _case("odd sizes, gelu", 37, 75, 91, activation="gelu"),
    _case("several tiles, residual", 197, 192, 192, scale=True, residual=True),
    _case("gelu_tanh", 65, 96, 64, activation="gelu_tanh"),
    _case("quick_gelu", 65, 96, 64, activation="quick_gelu"),
    _case("silu, no bias", 33, 64, 80, activation="silu", bias=False),
    _case("relu, residual", 33, 64, 80, activation="relu", residual=True),
    changed(_case("outlier channels", 130, 384, 192, activation="gelu"), _outliers),
)
SPECS = (
    OpSpec(
        "linear", linear, linear_reference, _CASES, _vit_b(1) + _vit_b(256), product_flops, _bytes,
        gpu_cases=tuple(_case(*sizes, **options) for *sizes, options in LINEAR),
    ),
)  # fmt: skip
