"""Cases, FLOPs and bytes of `mlp`, behind a norm or not."""

from fastvit.kernels._hopper_cases import MLP
from fastvit.kernels._spec import Case, OpSpec, drawn, vit_b
from fastvit.kernels.mlp.op import mlp
from fastvit.kernels.mlp.reference import mlp_reference


def _case(
    name: str, m: int, k: int, f: int, *, activation: str = "gelu", full: bool, norm: bool = False
) -> Case:
    return drawn(
        name, {"M": m, "K": k, "F": f, "residual": int(full)}, {"activation": activation},
        x="MK", w1="FK/K", b1="F" * full, w2="KF/F", b2="K" * full, scale="K" * full,
        residual="MK" * full, norm_weight="K" * norm, norm_bias="K" * norm,
    )  # fmt: skip


def _flops(sizes: dict[str, int]) -> int:
    return 4 * sizes["M"] * sizes["K"] * sizes["F"]


def _bytes(sizes: dict[str, int], itemsize: int) -> int:
    m, k, f = sizes["M"], sizes["K"], sizes["F"]
    # the hidden layer is written and read once
    return itemsize * ((2 + sizes["residual"]) * m * k + 2 * k * f + 2 * m * f)


def _norm_bytes(sizes: dict[str, int], itemsize: int) -> int:
    # the normalised rows are written and read once
    return _bytes(sizes, itemsize) + 2 * itemsize * sizes["M"] * sizes["K"]


_CASES = (
    _case("several tiles", 130, 96, 384, full=True),
    _case("odd hidden, no bias", 19, 48, 75, full=False),
    _case("quick_gelu", 50, 64, 256, activation="quick_gelu", full=True),
)
_NORM_CASES = (
    _case("several tiles", 130, 64, 256, full=True, norm=True),
    _case("odd hidden, silu", 19, 48, 75, activation="silu", full=False, norm=True),
)
_BENCH, _NORM_BENCH = (vit_b(_case, 768, 3072, full=True, norm=norm) for norm in (False, True))
SPECS = (
    OpSpec("mlp", mlp, mlp_reference, _CASES, _BENCH, _flops, _bytes),
    OpSpec(
        "norm_mlp", mlp, mlp_reference, _NORM_CASES, _NORM_BENCH, _flops, _norm_bytes,
        gpu_cases=tuple(_case(*sizes, **options, norm=True) for *sizes, options in MLP),
    ),
)  # fmt: skip
