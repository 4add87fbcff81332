"""Cases, FLOPs and bytes of `layer_norm` and `rms_norm`."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastvit.kernels._spec import Case, Draw, OpSpec
from fastvit.kernels.layer_norm.inference import fp8_layer_norm, fp8_quantize, row_statistics
from fastvit.kernels.layer_norm.op import layer_norm, rms_norm
from fastvit.kernels.layer_norm.reference import (
    fp8_layer_norm_reference,
    fp8_quantize_reference,
    layer_norm_reference,
    rms_norm_reference,
    row_statistics_reference,
)


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
        # one value's RMS norm has a gradient that is all rounding: there is nothing to compare
        *((_case("one value", 1, 1),) if center else ()),
        _case("odd width", 7, 75, center=center),
        _case("ViT-Ti", 197, 192, center=center),
        _case("no affine", 5, 96, affine=False, center=center),
        _case("mean far from zero", 33, 384, mean=30.0, center=center),
        _case("wide", 3, 4096, center=center),
        _case("widest", 2, 16384, center=center),
    )


def _bench_cases(center: bool) -> tuple[Case, ...]:
    return tuple(
        _case(f"ViT-B, batch {batch}", 197 * batch, 768, center=center) for batch in (1, 256)
    )


def _flops(sizes: dict[str, int]) -> int:
    return 0  # as PyTorch's counter: only products of matrices count


def _bytes(sizes: dict[str, int], itemsize: int) -> int:
    return 2 * itemsize * sizes["M"] * sizes["D"]


def _rows(name: str, m: int, d: int, *, mean: float = 0.0, out_scale: float | None = None) -> Case:
    def make(draw: Draw) -> dict[str, Any]:
        x = {"x": draw(m, d, mean=mean)}
        return x if out_scale is None else {**x, "out_scale": out_scale}

    return Case(name, {"M": m, "D": d}, make)


def _fp8(case: Case) -> Case:
    def make(draw: Draw) -> dict[str, Any]:
        return {**case.make(draw), "out_scale": 0.02}

    return dataclasses.replace(case, make=make)


def _row_bytes(sizes: dict[str, int], itemsize: int) -> int:
    return sizes["M"] * (itemsize * sizes["D"] + 8)


def _fp8_bytes(sizes: dict[str, int], itemsize: int) -> int:
    return (itemsize + 1) * sizes["M"] * sizes["D"]


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
    OpSpec(
        name="row_statistics",
        op=row_statistics,
        reference=row_statistics_reference,
        cases=(
            _rows("one value", 1, 1),
            _rows("odd width", 7, 75),
            _rows("mean far from zero", 33, 384, mean=30.0),
        ),
        bench_cases=tuple(_rows(f"ViT-B, batch {b}", 197 * b, 768) for b in (1, 256)),
        flops=_flops,
        bytes=_row_bytes,
        inference=True,
    ),
    OpSpec(
        name="fp8_layer_norm",
        op=fp8_layer_norm,
        reference=fp8_layer_norm_reference,
        cases=tuple(map(_fp8, _cases(center=True)[:4])),
        bench_cases=tuple(map(_fp8, _bench_cases(center=True))),
        flops=_flops,
        bytes=_fp8_bytes,
        inference=True,
        fp8=True,
    ),
    OpSpec(
        name="fp8_quantize",
        op=fp8_quantize,
        reference=fp8_quantize_reference,
        cases=(
            _rows("one value", 1, 1, out_scale=0.01),
            _rows("odd width", 7, 75, out_scale=0.01),
            _rows("beyond e4m3", 70, 96, out_scale=0.004),
        ),
        bench_cases=tuple(
            _rows(f"ViT-B, batch {b}", 197 * b, 768, out_scale=0.01) for b in (1, 256)
        ),
        flops=_flops,
        bytes=_fp8_bytes,
        inference=True,
        fp8=True,
    ),
)
