"""Cases, FLOPs and bytes of `linear`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels._spec import Case, Draw, OpSpec
from fastvit.kernels.layer_norm.inference import E4M3, merge_statistics
from fastvit.kernels.layer_norm.reference import row_statistics_reference
from fastvit.kernels.linear.inference import folded_linear, fp8_linear, linear_moments
from fastvit.kernels.linear.op import linear
from fastvit.kernels.linear.reference import (
    folded_linear_reference,
    fp8_linear_reference,
    linear_reference,
)


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


def _moments_reference(**inputs: Any) -> Tensor:
    y = linear_reference(**inputs)
    statistics = row_statistics_reference(y)
    return torch.stack(merge_statistics(statistics, y.shape[-1]), dim=-1)


def _moments(case: Case) -> Case:
    def make(draw: Draw) -> dict[str, Any]:
        inputs = case.make(draw)
        del inputs["activation"]
        return inputs

    return dataclasses.replace(case, make=make)


def _folded(
    name: str,
    m: int,
    k: int,
    n: int,
    *,
    activation: str | None = None,
    mean: float = 0.0,
    part: int = 64,
) -> Case:
    """With statistics in parts, as `linear_statistics` leaves them."""

    def make(draw: Draw) -> dict[str, Any]:
        x, weight = draw(m, k, mean=mean), draw(n, k, std=k**-0.5)
        parts = [row_statistics_reference(values) for values in x.split(part, dim=1)]
        wide = torch.promote_types(x.dtype, torch.float32)
        return {
            "x": x,
            "statistics": torch.cat(parts, dim=1),
            "weight": weight,
            "colsum": weight.to(wide).sum(dim=1),
            "bias": draw(n).to(wide),
            "activation": activation,
            "eps": 1e-6,
        }

    return Case(name, {"M": m, "K": k, "N": n, "residual": 0}, make)


def _fp8(
    name: str,
    m: int,
    k: int,
    n: int,
    *,
    activation: str | None = None,
    residual: bool = False,
    out_scale: float | None = None,
) -> Case:
    def make(draw: Draw) -> dict[str, Any]:
        bias = draw(n)
        return {
            "x": draw(m, k, std=20.0).to(E4M3),
            "weight": draw(n, k, std=40.0).to(E4M3),
            # rows of different scales; the product is of order 1
            "factor": (draw(n).abs() + 0.5).float() * (k**-0.5 / 800),
            "bias": bias,
            "activation": activation,
            "scale": draw(n) if residual else None,
            "residual": draw(m, n) if residual else None,
            "out_scale": out_scale,
            "dtype": bias.dtype,
        }

    return Case(name, {"M": m, "K": k, "N": n, "residual": int(residual)}, make)


def _fp8_bytes(sizes: dict[str, int], itemsize: int) -> int:
    m, k, n = sizes["M"], sizes["K"], sizes["N"]
    return m * k + n * k + itemsize * (1 + sizes["residual"]) * m * n


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
    OpSpec(
        name="linear_statistics",
        op=linear_moments,
        reference=_moments_reference,
        cases=(
            _moments(_case("one part", 3, 48, 16)),
            _moments(_case("odd sizes", 37, 75, 91)),
            _moments(_case("several tiles, residual", 70, 64, 192, scale=True, residual=True)),
        ),
        bench_cases=tuple(map(_moments, (_vit_b(1)[1], _vit_b(1)[3], _vit_b(256)[1]))),
        flops=_flops,
        bytes=_bytes,
        inference=True,
    ),
    OpSpec(
        name="folded_linear",
        op=folded_linear,
        reference=folded_linear_reference,
        cases=(
            _folded("one row", 1, 64, 32),
            _folded("odd sizes, gelu", 37, 75, 91, activation="gelu"),
            _folded("mean far from zero", 65, 96, 64, mean=3.0),
            _folded("several tiles", 130, 192, 192),
            _folded("statistics in one part", 33, 80, 48, part=80),
        ),
        bench_cases=(
            _folded("ViT-B norm1 + qkv, batch 1", 197, 768, 2304),
            _folded("ViT-B norm2 + fc1, batch 1", 197, 768, 3072, activation="gelu"),
            _folded("ViT-B norm1 + qkv, batch 256", 197 * 256, 768, 2304),
            _folded("ViT-B norm2 + fc1, batch 256", 197 * 256, 768, 3072, activation="gelu"),
        ),
        flops=_flops,
        bytes=_bytes,
        inference=True,
    ),
    OpSpec(
        name="fp8_linear",
        op=fp8_linear,
        reference=fp8_linear_reference,
        cases=(
            _fp8("one row", 1, 64, 32),
            _fp8("odd sizes, gelu, e4m3 out", 37, 75, 91, activation="gelu", out_scale=0.01),
            _fp8("several tiles, residual", 70, 192, 192, residual=True),
            _fp8("beyond e4m3", 33, 64, 80, activation="relu", out_scale=0.002),
        ),
        bench_cases=(
            _fp8("ViT-B qkv, batch 1", 197, 768, 2304),
            _fp8("ViT-B qkv, batch 256", 197 * 256, 768, 2304),
            _fp8("ViT-B proj, batch 256", 197 * 256, 768, 768, residual=True),
            _fp8("ViT-B fc1, batch 256", 197 * 256, 768, 3072, activation="gelu", out_scale=0.01),
            _fp8("ViT-B fc2, batch 256", 197 * 256, 3072, 768, residual=True),
        ),
        flops=_flops,
        bytes=_fp8_bytes,
        inference=True,
        fp8=True,
    ),
)
