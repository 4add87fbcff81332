"""Cases, FLOPs and bytes of `norm_linear`."""

from fastvit.kernels._spec import Case, OpSpec, drawn, product_flops, shifted, vit_b
from fastvit.kernels.norm_linear.op import norm_linear
from fastvit.kernels.norm_linear.reference import norm_linear_reference


def _case(name: str, m: int, k: int, n: int, *, full: bool = True) -> Case:
    return drawn(
        name, {"M": m, "K": k, "N": n}, {"eps": 1e-6}, x="MK", norm_weight="K" * full,
        norm_bias="K" * full, weight="NK/K", bias="N" * full,
    )  # fmt: skip


def _bytes(sizes: dict[str, int], itemsize: int) -> int:
    m, k, n = sizes["M"], sizes["K"], sizes["N"]
    # the normalised rows are written and read once
    return itemsize * (3 * m * k + n * k + m * n)


_CASES = (
    _case("one row", 1, 64, 32),
    _case("odd sizes", 37, 75, 91),
    _case("several tiles", 130, 96, 192),
    _case("no affine, no bias", 33, 64, 80, full=False),
    shifted(_case("mean far from zero", 65, 96, 64)),
)
SPECS = (
    OpSpec(
        "norm_linear", norm_linear, norm_linear_reference, _CASES, vit_b(_case, 768, 2304),
        product_flops, _bytes,
    ),
)  # fmt: skip
