"""The kernels that CUDA graphs capture for few tokens on a Hopper GPU (`accelerate/latency.py`),
described as ops: none is registered, so the audit and `make gpu` find them here.

Legend: M rows, N output features, K input features; B batch, H heads, N tokens, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.kernels._spec import Case, OpSpec, drawn, product_flops
from fastvit.kernels.attention.hopper_small_launch import early_attention_qkv
from fastvit.kernels.attention.reference import attention_qkv_reference
from fastvit.kernels.layer_norm.reference import layer_norm_reference
from fastvit.kernels.linear.hopper_small_launch import (
    HALF,
    MOST_TILES,
    fold,
    row_statistics,
    small_linear,
)
from fastvit.kernels.linear.reference import linear_reference

EPS = 1e-6


def few_rows(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, scale: Tensor | None = None, residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:  # fmt: skip
    """act(LN?(x) W^T + b) * scale + residual by `small_linear`; with statistics of y's rows where
    there is a residual."""
    count = torch.zeros(MOST_TILES, dtype=torch.int32, device=x.device)
    options: dict[str, Any] = {"activation": activation, "count": count, "coming": weight}
    if norm_weight is not None:
        weight, bias, options["colsum"] = fold(norm_weight, norm_bias, weight, bias)
        options |= {"statistics": row_statistics(x), "eps": EPS}
    keep = residual is not None
    return small_linear(x, weight, bias, scale=scale, residual=residual, keep=keep, **options)[0]


def few_rows_reference(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, scale: Tensor | None = None, residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:  # fmt: skip
    """The same, layer by layer."""
    if norm_weight is not None:
        x = layer_norm_reference(x, norm_weight, norm_bias, EPS)
    return linear_reference(x, weight, bias, scale, residual, None, activation)


def few_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """`early_attention_qkv`; a RuntimeError where another kernel would run."""
    out = early_attention_qkv(qkv, num_heads)
    if out is None:
        raise RuntimeError(f"no kernel for few heads takes {list(qkv.shape)}")
    return out


def _linear(
    name: str, m: int, k: int, n: int, *, norm: bool = False, added: bool = False,
    activation: str | None = None,
) -> Case:  # fmt: skip
    sizes = {"M": m, "K": k, "N": n, "norm": int(norm), "added": int(added)}
    return drawn(
        name, sizes, {"activation": activation}, x="MK", weight="NK/K", bias="N",
        norm_weight="K" * norm, norm_bias="K" * norm, scale="N" * added, residual="MN" * added,
    )  # fmt: skip


def _block(name: str, m: int, width: int) -> tuple[Case, ...]:
    """The four linears of a ViT's block."""
    return (
        _linear(f"{name} qkv", m, width, 3 * width, norm=True),
        _linear(f"{name} proj", m, width, width, added=True),
        _linear(f"{name} fc1", m, width, 4 * width, norm=True, activation="gelu"),
        _linear(f"{name} fc2", m, 4 * width, width, added=True),
    )


def _linear_bytes(sizes: dict[str, int], itemsize: int) -> int:
    m, k, n = sizes["M"], sizes["K"], sizes["N"]
    return itemsize * (m * k + n * k + (1 + sizes["added"]) * m * n)


def _attention(name: str, b: int, h: int, n: int, d: int) -> Case:
    sizes = {"B": b, "H": h, "N": n, "d": d, "W": 3 * h * d}
    return drawn(name, sizes, {"num_heads": h}, qkv="BNW")


SPECS = {
    "few_rows": OpSpec(
        "few_rows", few_rows, few_rows_reference,
        (*_block("ViT-Ti", 197, 192), *_block("ViT-S, batch 4", 788, 384),
         *_block("ViT-B, batch 4", 788, 768), *_block("ViT-L", 197, 1024),
         *_block("SO400M, 256 tokens", 256, 1152)),
        _block("ViT-B", 197, 768), product_flops, _linear_bytes, dtypes=HALF, inference=True,
    ),
    "few_heads": OpSpec(
        "few_heads", few_heads, attention_qkv_reference,
        (_attention("N=64, 2 heads", 1, 2, 64, 64), _attention("batch 4", 4, 12, 197, 64)),
        (_attention("ViT-B", 1, 12, 197, 64),),
        lambda s: 4 * s["B"] * s["H"] * s["N"] ** 2 * s["d"],
        lambda s, itemsize: itemsize * 4 * s["B"] * s["N"] * s["H"] * s["d"],
        dtypes=HALF, inference=True,
    ),
}  # fmt: skip
