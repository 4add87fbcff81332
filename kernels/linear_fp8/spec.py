"""Cases, FLOPs and bytes of the ops on e4m3."""

import math
from dataclasses import replace
from typing import Any

import torch

from fastvit.kernels._spec import Case, OpSpec, changed, drawn, no_flops, product_flops, vit_b
from fastvit.kernels.attention.spec import SPECS as ATTENTION_SPECS
from fastvit.kernels.layer_norm.spec import SPECS as NORM_SPECS
from fastvit.kernels.linear_fp8 import op, reference
from fastvit.kernels.linear_fp8.reference import E4M3


def _fp8(
    name: str, m: int, k: int, n: int, *, activation: str | None = None, residual: bool = False,
    out_scale: float | None = None,
) -> Case:  # fmt: skip
    def quantise(inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            "x": (inputs["x"] * 20).to(E4M3),
            "weight": (inputs["weight"] * 40).to(E4M3),
            # rows of different scales; the product is of order 1
            "factor": (inputs["factor"].abs() + 0.5).float() * (k**-0.5 / 800),
            "dtype": inputs["bias"].dtype,
        }

    case = drawn(
        name, {"M": m, "K": k, "N": n, "residual": int(residual)},
        {"activation": activation, "out_scale": out_scale}, x="MK", weight="NK", factor="N",
        bias="N", scale="N" * residual, residual="MN" * residual,
    )  # fmt: skip
    return changed(case, quantise)


def _fp8_bytes(sizes: dict[str, int], itemsize: int) -> int:
    m, k, n = sizes["M"], sizes["K"], sizes["N"]
    return m * k + n * k + itemsize * (1 + sizes["residual"]) * m * n


def _rows(name: str, m: int, d: int, out_scale: float) -> Case:
    return drawn(name, {"M": m, "D": d}, {"out_scale": out_scale}, x="MD")


def _attention(case: Case) -> Case:
    """Of `attention` or `attention_qkv`; the largest values are beyond e4m3."""

    def make(draw: Any) -> dict[str, Any]:
        inputs = case.make(draw) | {"out_scale": 2e-3}
        return {"q": inputs.pop("qkv"), **inputs} if "qkv" in inputs else inputs

    return replace(case, make=make)


def _row_bytes(sizes: dict[str, int], itemsize: int) -> int:
    return (itemsize + 1) * sizes["M"] * sizes["D"]


_LINEAR_CASES = (
    _fp8("one row", 1, 64, 32),
    _fp8("odd sizes, gelu, e4m3 out", 37, 75, 91, activation="gelu", out_scale=0.01),
    _fp8("several tiles, residual", 70, 192, 192, residual=True),
    _fp8("beyond e4m3", 33, 64, 80, activation="relu", out_scale=0.002),
)
_LINEAR_BENCH = (
    _fp8("ViT-B qkv, batch 1", 197, 768, 2304),
    _fp8("ViT-B qkv, batch 256", 197 * 256, 768, 2304),
    _fp8("ViT-B proj, batch 256", 197 * 256, 768, 768, residual=True),
    _fp8("ViT-B fc1, batch 256", 197 * 256, 768, 3072, activation="gelu", out_scale=0.01),
    _fp8("ViT-B fc2, batch 256", 197 * 256, 3072, 768, residual=True),
)
_ROWS_CASES = (
    _rows("one value", 1, 1, 0.01),
    _rows("odd width", 7, 75, 0.01),
    _rows("beyond e4m3", 70, 96, 0.004),
)
_NORM_CASES, _NORM_BENCH = (
    tuple(changed(case, lambda inputs: {"out_scale": 0.02}) for case in cases)
    for cases in (NORM_SPECS[0].cases[:4], NORM_SPECS[0].bench_cases)
)
_SEPARATE, _PACKED, *_ = ATTENTION_SPECS
SPECS = (
    OpSpec(
        "fp8_linear", op.fp8_linear, reference.fp8_linear_reference, _LINEAR_CASES, _LINEAR_BENCH,
        product_flops, _fp8_bytes, dtypes=(torch.float16, torch.bfloat16), inference=True, fp8=True,
        gpu_cases=_LINEAR_BENCH[1:],
    ),
    OpSpec(
        "fp8_layer_norm", op.fp8_layer_norm, reference.fp8_layer_norm_reference, _NORM_CASES,
        _NORM_BENCH, no_flops, _row_bytes, inference=True, fp8=True,
    ),
    OpSpec(
        "fp8_attention", op.fp8_attention, reference.fp8_attention_reference,
        tuple(map(_attention, (*_SEPARATE.cases[1::3], *_PACKED.cases[::2]))),
        tuple(map(_attention, _PACKED.bench_cases[:2])), _SEPARATE.flops,
        lambda sizes, itemsize: _SEPARATE.bytes(sizes, itemsize)
        - (itemsize - 1) * math.prod(sizes[name] for name in "BHNd"),
        inference=True, fp8=True,
        gpu_cases=tuple(map(_attention, (*_PACKED.gpu_cases[:6], _SEPARATE.gpu_cases[1]))),
    ),
    OpSpec(
        "fp8_quantize", op.fp8_quantize, reference.fp8_quantize_reference, _ROWS_CASES,
        vit_b(_rows, 768, 0.01), no_flops, _row_bytes, inference=True, fp8=True,
    ),
)  # fmt: skip
