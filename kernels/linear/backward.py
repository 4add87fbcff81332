"""Gradients of y = act(x W^T + b) * scale * row_scale + residual.

With pre = x W^T + b and the gradient g of y:

    G = g * row_scale * scale * act'(pre)    dx = G W    dW = G^T x    db = colsum(G)
    dscale = colsum(g * row_scale * act(pre))

Without an activation the scale stays out of G, and pre need not be kept: with P = G^T x,

    dx = G (scale W)    dW = scale * P    db = scale * colsum(G)
    dscale = rowsum(P * W) + b * colsum(G)

Nothing is added up by atomics: the sums over all rows, P among them, are split into parts, which a
second step adds in order.

Shape legend: M rows (batch x tokens), N output features, K input features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit.kernels._device import architecture, multiprocessors
from fastvit.kernels._library import launch
from fastvit.kernels._tuning import TileConfig, cdiv, lookup
from fastvit.kernels.linear.op import (
    GROUP_M,
    PORTABLE,
    Extra,
    _fits_tma,
    float32_precision,
    launch_with,
)

PASS = TileConfig(16, 128)  # of `pre_gradient_kernel`
PASS_ROWS = 256  # rows of one program of it
SUM = TileConfig(4, 256)  # rows and columns at a time of `weight_gradient_kernel`
# What a part of the sum over rows costs, in rows of products: writing and reading it in float32
# takes an H200 as long as multiplying that many rows does (8 bytes at 4.3 TB/s, 2 FLOP at
# 790 TFLOP/s).
SPLIT_COST = 735
MAX_SPLIT = 32


class PreGradient(NamedTuple):
    """G as in the module's docstring, [M, N], and sums over its rows where they were asked for."""

    grad: Tensor
    sums: Tensor | None  # [N], float64
    scale_sums: Tensor | None  # [N], float64: dscale of a linear with an activation


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are kept in."""
    return torch.promote_types(dtype, torch.float32)


def select(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Those of `grads`, one for each argument, that are needed."""
    return [g for g, need in zip(grads, needs, strict=True) if need and g is not None]


def linear_backward(
    grad: Tensor,
    output: None,
    kept: Sequence[Tensor],
    args: tuple[Tensor, Tensor, Tensor | None, str, Tensor | None, None, Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `_library.Gradient` has it; what is kept is pre, or an empty tensor."""
    x, weight, bias, activation, scale, _, row_scale = args
    (pre,) = kept
    if activation == "none":
        g, sums, dscale = pre_gradient(grad, x.dtype, row_scale=row_scale)
        inner = scale
    else:
        g, sums, dscale = pre_gradient(
            grad, x.dtype, row_scale=row_scale, scale=scale, pre=pre, activation=activation,
            wants_scale=needs[4],
        )  # fmt: skip
        inner = None  # is in G
    dx = input_gradient(g, weight, inner).view(x.shape) if needs[0] else None
    wanted = (needs[1], needs[2], needs[4] and dscale is None)
    dw, db, inner_dscale = parameter_gradients(g, x, weight, bias, inner, sums, wanted)
    if dscale is not None and scale is not None:
        dscale = dscale.to(scale.dtype)
    dscale = inner_dscale if dscale is None else dscale
    return select((dx, dw, db, None, dscale, None, None), needs)


# --------------------------------------------------------------------------- G


def pre_gradient(
    grad: Tensor,
    dtype: torch.dtype,
    *,
    row_scale: Tensor | None = None,
    scale: Tensor | None = None,
    pre: Tensor | None = None,
    hidden: Tensor | None = None,
    activation: str = "none",
    wants_scale: bool = False,
    only_sums: bool = False,
) -> PreGradient:
    """G in `dtype`, in one pass; without one where grad [..., N] is G already.

    Args:
        scale: for an activation only.
        pre: [..., N], contiguous, for an activation.
        hidden: [..., N], contiguous: gets act(pre).
        wants_scale: sum the gradient of scale too.
        only_sums: G is not wanted.
    """
    import triton.language as tl

    from fastvit.kernels.linear.backward_kernel import pre_gradient_kernel

    n = grad.shape[-1]
    g = grad.reshape(-1, n)
    is_packed = g.dtype == dtype and g.stride(1) == 1 and row_scale is None
    if is_packed and pre is None and not only_sums:
        return PreGradient(g, None, None)
    m = g.shape[0]
    wide = wide_dtype(dtype)
    parts = cdiv(m, PASS_ROWS)
    out = None if only_sums else g.new_empty(m, n, dtype=dtype)
    sums = g.new_empty(parts, n, dtype=torch.float64)
    scale_sums = torch.empty_like(sums) if wants_scale else None
    if activation == "gelu" and dtype == torch.bfloat16:
        activation = "gelu_polynomial"
    if g.numel():
        launch(
            pre_gradient_kernel,
            parts * cdiv(n, PASS.BLOCK_N),
            PASS,
            grad_ptr=g,
            pre_ptr=pre,
            scale_ptr=None if scale is None else scale.contiguous(),
            row_scale_ptr=None if row_scale is None else row_scale.reshape(-1),
            out_ptr=out,
            hidden_ptr=hidden,
            sums_ptr=sums,
            scale_sums_ptr=scale_sums,
            M=m,
            N=n,
            stride_gm=g.stride(0),
            stride_gn=g.stride(1),
            ROWS=PASS_ROWS,
            ACTIVATION=activation,
            ACC=tl.float64 if wide == torch.float64 else tl.float32,
            BLOCK_M=PASS.BLOCK_M,
            BLOCK_N=PASS.BLOCK_N,
        )
    return PreGradient(
        g if out is None else out, sums.sum(0), None if scale_sums is None else scale_sums.sum(0)
    )


# --------------------------------------------------------------------------- products


def input_gradient(g: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """G (scale W): [M, N] to [M, K]."""
    turned, factor = _turned(weight, scale)
    return launch_with(Extra(dtype=g.dtype), g, turned, None, "none", factor, None)[0]


def hidden_gradient(
    g: Tensor, weight: Tensor, scale: Tensor | None, pre: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """(G (scale W)) * act'(pre) and act(pre), both [M, K]; pre is [..., K]."""
    n, k = weight.shape
    tile = lookup("linear", architecture(g.device), g.dtype, M=g.shape[0], N=k, K=n)
    if tile.backend == "cublas":
        hidden = pre.new_empty(g.shape[0], k)
        dh = input_gradient(g, weight, scale)
        out = pre_gradient(dh, g.dtype, pre=pre, hidden=hidden, activation=activation)
        return out.grad, hidden
    turned, factor = _turned(weight, scale)
    extra = Extra(dtype=g.dtype, pre=pre.view(g.shape[0], k))
    out, hidden = launch_with(extra, g, turned, None, activation, factor, None)
    assert hidden is not None
    return out, hidden


def _turned(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(scale W)^T as a linear's weight [K, N], up to a factor, given as a scale [K].

    The factor keeps a small LayerScale out of float16, in which 1e-5 * W would lose its digits.
    """
    if scale is None:
        return weight.t().contiguous(), None
    wide = wide_dtype(weight.dtype)
    scale = scale.to(wide)
    largest = scale.abs().amax().clamp_min(torch.finfo(wide).tiny)
    scaled = (weight * (scale / largest)[:, None]).to(weight.dtype)
    return scaled.t().contiguous(), largest.expand(weight.shape[1])


def parameter_gradients(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    sums: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, bias and scale, those that `needs` names.

    Args:
        g: G [M, N], without `scale`.
        x: [..., K]; not read where only the bias needs one.
        sums: G's column sums [N], if there are any yet.
    """
    wants_weight, wants_bias, wants_scale = needs
    dw = dscale = None
    if wants_weight or wants_scale:
        assert x is not None
        missing = sums is None and (wants_bias or (wants_scale and bias is not None))
        partial, found = _weight_product(g, x.reshape(-1, x.shape[-1]), missing)
        sums = found if missing else sums
        dw, dscale = _weight_gradient(
            partial, weight, bias, scale, sums, wants_weight=wants_weight, wants_scale=wants_scale
        )
    if not wants_bias or bias is None:
        return dw, None, dscale
    if sums is None:
        sums = _column_sums(g)
    db = sums if scale is None else sums * scale
    return dw, db.to(bias.dtype), dscale


def _column_sums(g: Tensor) -> Tensor:
    sums = pre_gradient(g, g.dtype, only_sums=True).sums
    assert sums is not None
    return sums


def _weight_product(g: Tensor, x: Tensor, wants_sums: bool) -> tuple[Tensor, Tensor | None]:
    """G^T x in parts [S, N, K] of which it is the sum, and G's column sums [N] if wanted."""
    import triton.language as tl

    from fastvit.kernels.linear.backward_kernel import weight_product_kernel

    (m, n), k = g.shape, x.shape[1]
    wide = wide_dtype(g.dtype)
    # the rows, columns and depth of this product
    tile = lookup("linear_backward", architecture(g.device), g.dtype, M=n, N=k, K=m)
    if tile.backend == "cublas":
        return _plain_product(g, x)[None], _column_sums(g) if wants_sums else None
    if tile.backend == "tma" and not (_fits_tma(g) and _fits_tma(x)):
        tile = PORTABLE
    tiles_k = cdiv(k, tile.BLOCK_N)
    tiles = cdiv(n, tile.BLOCK_M) * tiles_k
    split = tile.split_k
    if split == 1:
        split = choose_split(tiles, cdiv(m, tile.BLOCK_K), tile.BLOCK_K, multiprocessors(g.device))
    partial = g.new_empty(split, n, k, dtype=wide)
    sums = g.new_empty(split * tiles_k, n, dtype=torch.float64) if wants_sums else None
    operands: dict[str, object] = {"grad": g, "x": x}
    if tile.backend == "tma":
        from triton.tools.tensor_descriptor import TensorDescriptor

        operands = {
            "grad": TensorDescriptor.from_tensor(g, [tile.BLOCK_K, tile.BLOCK_M]),
            "x": TensorDescriptor.from_tensor(x, [tile.BLOCK_K, tile.BLOCK_N]),
        }
    launch(
        weight_product_kernel,
        tiles * split,
        tile,
        **operands,
        partial_ptr=partial,
        sums_ptr=sums,
        SPLIT=split,
        M=m,
        N=n,
        K=k,
        stride_gm=g.stride(0),
        stride_gn=g.stride(1),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        PRECISION=float32_precision(g.dtype),
        ACC=tl.float64 if wide == torch.float64 else tl.float32,
        EVEN_M=m % tile.BLOCK_K == 0,
        GROUP=GROUP_M,
        TMA=tile.backend == "tma",
        BLOCK_M=tile.BLOCK_K,
        BLOCK_N=tile.BLOCK_M,
        BLOCK_K=tile.BLOCK_N,
    )
    return partial, None if sums is None else sums.sum(0)


def _plain_product(g: Tensor, x: Tensor) -> Tensor:
    """G^T x in float32 or wider by PyTorch: unscaled, it may exceed float16's range."""
    if g.dtype == wide_dtype(g.dtype):
        return g.t() @ x
    if g.is_cuda:
        return torch.mm(g.t(), x, out_dtype=torch.float32)
    return g.t().float() @ x.float()


def _weight_gradient(
    partial: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    sums: Tensor | None,
    *,
    wants_weight: bool,
    wants_scale: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dW and dscale from the parts of P."""
    import triton.language as tl

    from fastvit.kernels.linear.backward_kernel import weight_gradient_kernel

    split, n, k = partial.shape
    wide = wide_dtype(partial.dtype)
    dw = partial.new_empty(n, k, dtype=weight.dtype) if wants_weight else None
    dscale = None
    if wants_scale and scale is not None:
        dscale = partial.new_empty(n, dtype=scale.dtype)
    else:
        bias = None
    launch(
        weight_gradient_kernel,
        cdiv(n, SUM.BLOCK_M),
        SUM,
        partial_ptr=partial,
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.to(wide).contiguous(),
        scale_ptr=None if scale is None else scale.to(wide).contiguous(),
        colsum_ptr=None if bias is None else sums,
        dweight_ptr=dw,
        dscale_ptr=dscale,
        SPLIT=split,
        N=n,
        K=k,
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        ACC=tl.float64 if wide == torch.float64 else tl.float32,
        BLOCK_N=SUM.BLOCK_M,
        BLOCK_K=SUM.BLOCK_N,
    )
    return dw, dscale


@functools.lru_cache(maxsize=1024)
def choose_split(tiles: int, steps: int, step: int, processors: int) -> int:
    """In how many parts to split a sum of `steps` steps of `step` rows for each of `tiles` tiles:
    enough to fill the GPU's last round of programs (two a multiprocessor), few enough not to pay
    more for the parts than that saves."""
    slots = 2 * processors

    def cost(split: int) -> float:
        rounds = math.ceil(tiles * split / slots)
        return rounds * math.ceil(steps / split) * step * slots / tiles + split * SPLIT_COST

    return min(range(1, min(MAX_SPLIT, max(steps, 1)) + 1), key=cost)
