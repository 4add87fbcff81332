"""Cases, FLOPs and bytes of `layer_norm` and `rms_norm`."""

from fastvit.kernels._spec import Case, OpSpec, drawn, no_flops, shifted, vit_b
from fastvit.kernels.layer_norm.op import layer_norm, rms_norm
from fastvit.kernels.layer_norm.reference import layer_norm_reference, rms_norm_reference


def _spec(name: str, center: bool) -> OpSpec:
    def case(name: str, m: int, d: int, affine: bool = True) -> Case:
        vectors = dict.fromkeys(("weight", "bias") if center else ("weight",), "D" * affine)
        return drawn(name, {"M": m, "D": d}, {"eps": 1e-6}, x="MD", **vectors)

    cases = (
        # one value's RMS norm has a gradient that is all rounding: there is nothing to compare
        *((case("one value", 1, 1),) if center else ()),
        case("odd width", 7, 75),
        case("ViT-Ti", 197, 192),
        case("no affine", 5, 96, affine=False),
        shifted(case("mean far from zero", 33, 384)),
        case("wide", 3, 4096),
        case("widest", 2, 16384),
    )
    op = layer_norm if center else rms_norm
    reference = layer_norm_reference if center else rms_norm_reference
    return OpSpec(
        name, op, reference, cases, vit_b(case, 768), no_flops,
        lambda sizes, itemsize: 2 * itemsize * sizes["M"] * sizes["D"],
    )  # fmt: skip


SPECS = (_spec("layer_norm", center=True), _spec("rms_norm", center=False))
