"""Cases, FLOPs and bytes of `layer_norm` and `rms_norm`."""

from __future__ import annotations

from typing import Any

from fastvit.kernels._spec import Case, Draw, OpSpec
from fastvit.kernels.layer_norm.op import layer_norm, rms_norm
from fastvit.kernels.layer_norm.reference import layer_norm_reference, rms_norm_reference


def _case(
    name: str, m: int, d: int, *, mean: float = 0.0, affine: bool = True, center: bool = True
) -> Case:
    def make(draw: Draw) -> dict[str, Any]:
        inputs = {"x": draw(m, d, mean=mean), "weight": draw(d) if affine else None}
        if center:
            inputs["bias"] = draw(d) if affine else None
        return {**inputs, "eps": 1e-6}

    return Case(name, {"M": m, "D": d}, make)


def _cases(center: bool) -> tuple[Case, ...]:
    return (
        _case("one value", 1, 1, center=center),
        _case("odd width", 7, 75, center=center),
        _case("ViT-Ti", 197, 192, center=center),
        _case("no affine", 5, 96, affine=False, center=center),
        _case("mean far from zero", 33, 384, mean=30.0, center=center),
        _case("wide", 3, 4096, center=center),
    )


def _bench_cases(center: bool) -> tuple[Case, ...]:
    return tuple(
        _case(f"ViT-B, batch {batch}", 197 * batch, 768, center=center) for batch in (1, 256)
    )


def _flops(sizes: dict[str, int]) -> int:
    return 0  # as PyTorch's counter: only products of matrices count


def _bytes(sizes: dict[str, int], itemsize: int) -> int:
    return 2 * itemsize * sizes["M"] * sizes["D"]


SPECS = (
    OpSpec(
        name="layer_norm",
        op=layer_norm,
        reference=layer_norm_reference,
        cases=_cases(center=True),
        bench_cases=_bench_cases(center=True),
        flops=_flops,
        bytes=_bytes,
    ),
    OpSpec(
        name="rms_norm",
        op=rms_norm,
        reference=rms_norm_reference,
        cases=_cases(center=False),
        bench_cases=_bench_cases(center=False),
        flops=_flops,
        bytes=_bytes,
    ),
)
