"""Forms of `linear` for inference: the LayerNorm before it folded in, statistics of its rows for
the next such fold, and e4m3 operands.

A LayerNorm and the linear after it are one product of the raw rows:

    LN(x) W + b = rstd * (x (gamma W)) - rstd * mean * colsum(gamma W) + (beta W + b)

Three things keep this as exact as the norm by itself: gamma W is folded in float32 and rounded
once; colsum is taken of the *rounded* gamma W; the mean and variance come as centred statistics,
which the linear before leaves behind with its rows or `row_statistics` finds.

Shape legend: M rows, K input features, N output features, T parts of a row's statistics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvit.kernels._checks import (
    check_fp8_device,
    check_out_scale,
    check_same_dtype,
    check_shape,
    check_tensors,
)
from fastvit.kernels._library import define_inference_op, uses_triton
from fastvit.kernels._tuning import cdiv
from fastvit.kernels.layer_norm.inference import E4M3, merge_statistics
from fastvit.kernels.layer_norm.reference import row_statistics_reference
from fastvit.kernels.linear.op import (
    Extra,
    check_activation,
    launch_with,
    statistics_band,
)
from fastvit.kernels.linear.reference import (
    folded_linear_reference,
    fp8_linear_reference,
    linear_reference,
)


def _flops(x: tuple[int, ...], weight: tuple[int, ...]) -> int:
    return 2 * math.prod(x[:-1]) * weight[0] * weight[1]


# --------------------------------------------------------------------------- statistics out


def _launch_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    extra = Extra(wants_statistics=True, dtype=_row_dtype(x, residual))
    y, statistics = launch_with(extra, x, weight, bias, "none", scale, residual)
    assert statistics is not None
    return y, statistics


def _eager_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    bias = None if bias is None else bias.to(x.dtype)
    y = linear_reference(x, weight, bias, None, scale, residual).to(_row_dtype(x, residual))
    return y, row_statistics_reference(y)


def _row_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else residual.dtype


def _fake_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=_row_dtype(x, residual))
    if not uses_triton(x):
        parts = 1
    elif all(isinstance(size, int) for size in (*x.shape, *weight.shape)):
        parts = cdiv(weight.shape[0], statistics_band(x, weight))
    else:  # it depends on the tuning table's row for the actual sizes
        parts = torch.library.get_ctx().new_dynamic_size()
    dtype = torch.promote_types(x.dtype, torch.float32)
    return y, x.new_empty((*x.shape[:-1], parts, 2), dtype=dtype)


_linear_statistics = define_inference_op(
    "linear_statistics",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual)",
    returns="(Tensor, Tensor)",
    launch=_launch_statistics,
    eager=_eager_statistics,
    fake=_fake_statistics,
    flops=lambda x, weight, *rest: _flops(x, weight),
)


def linear_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear` without an activation, and the statistics of the rows that it stores.

    Args:
        x, weight, residual: as in `linear`.
        bias, scale: as in `linear`, of any floating dtype.

    Returns:
        [..., N] of residual's dtype, x's without one, and float32 (float64 for float64 input)
        [..., T, 2]: mean and sum of centred squares of each part of a row of the result, as
        rounded. T depends on the tuning table; `merge_statistics` and `folded_linear` take any.

    Raises:
        TypeError, ValueError: as `linear`.
    """
    _check("linear_statistics", x, weight, bias)
    check_tensors("linear_statistics", x, scale=scale, residual=residual)
    n = weight.shape[0]
    check_shape("linear_statistics", "bias", bias, n)
    check_shape("linear_statistics", "scale", scale, n)
    check_shape("linear_statistics", "residual", residual, *x.shape[:-1], n)
    op = _linear_statistics if uses_triton(x) else _eager_statistics
    return op(x, weight, bias, scale, residual)  # type: ignore[return-value]


def linear_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Mean and variance of the rows of `linear_statistics`, [..., 2]: what its test compares."""
    y, statistics = linear_statistics(x, weight, bias, scale=scale, residual=residual)
    return torch.stack(merge_statistics(statistics, y.shape[-1]), dim=-1)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(op, x, weight=weight, bias=bias)
    check_same_dtype(op, x, weight=weight)
    _check_product(op, x, weight)


def _check_product(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x {list(x.shape)} and weight {list(weight.shape)} do not fit [..., K], [N, K]"
        )


# --------------------------------------------------------------------------- folded in


def _launch_folded(
    x: Tensor, statistics: Tensor, weight: Tensor, colsum: Tensor, bias: Tensor | None,
    activation: str, eps: float,
) -> Tensor:  # fmt: skip
    extra = Extra(statistics=statistics.contiguous(), colsum=colsum.contiguous(), eps=eps)
    # a float32 bias does not make the result one
    return launch_with(extra._replace(dtype=x.dtype), x, weight, bias, activation, None, None)[0]


_folded_linear = define_inference_op(
    "folded_linear",
    "(Tensor x, Tensor statistics, Tensor weight, Tensor colsum, Tensor? bias, str activation, "
    "float eps)",
    launch=_launch_folded,
    eager=folded_linear_reference,
    fake=lambda x, statistics, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
    flops=lambda x, statistics, weight, *rest: _flops(x, weight),
)


def folded_linear(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    colsum: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """act(LN(x) W^T + b) with the norm's weight and bias folded into `weight` and `bias` by
    `fold`, and its mean and variance applied to the sums.

    Args:
        x: [..., K], not normalised.
        statistics: [..., T, 2] of x's rows, from `linear_statistics` or `row_statistics`.
        weight: [N, K] of x's dtype.
        colsum: [N], sums of weight's rows, float32 (float64 for float64 input), as the statistics.
        bias: [N], float32 or of x's dtype.
        activation: as in `linear`.
        eps: added to the variance.

    Returns:
        [..., N] of x's dtype.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or devices that do not fit, an unknown activation.
    """
    activation = check_activation("folded_linear", activation)
    _check("folded_linear", x, weight, bias)
    check_tensors("folded_linear", x, statistics=statistics, colsum=colsum)
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, tensor in (("statistics", statistics), ("colsum", colsum)):
        if tensor.dtype != wide:
            raise TypeError(f"folded_linear: {name} is {tensor.dtype}, expected {wide}")
    if statistics.shape[:-2] != x.shape[:-1] or statistics.shape[-1] != 2:
        raise ValueError(
            f"folded_linear: statistics {list(statistics.shape)} are not [..., T, 2] for "
            f"x {list(x.shape)}"
        )
    n = weight.shape[0]
    check_shape("folded_linear", "colsum", colsum, n)
    check_shape("folded_linear", "bias", bias, n)
    op = _folded_linear if uses_triton(x) else folded_linear_reference
    return op(x, statistics, weight, colsum, bias, activation, eps)


@torch.no_grad()
def fold(
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A norm's weight and bias folded into the linear after it, for `folded_linear`.

    Args:
        weight: [N, K], bias: [N]: the linear's; float32 masters where there are any.
        norm_weight, norm_bias: [K], the norm's.
        dtype: of the folded weight; weight's by default.

    Returns:
        The folded weight [N, K], and in float32 (float64 for float64 weights) the sums of its
        rounded rows [N] and the folded bias [N], None without any bias.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    folded = weight.to(wide) if norm_weight is None else weight.to(wide) * norm_weight.to(wide)
    folded = folded.to(dtype or weight.dtype)
    total = None if bias is None else bias.to(wide)
    if norm_bias is not None:
        shift = weight.to(wide) @ norm_bias.to(wide)
        total = shift if total is None else total + shift
    return folded.contiguous(), folded.to(wide).sum(dim=1), total


# --------------------------------------------------------------------------- e4m3


def _launch_fp8(
    x: Tensor, weight: Tensor, factor: Tensor, bias: Tensor | None, activation: str,
    scale: Tensor | None, residual: Tensor | None, out_scale: float | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    dtype = dtype if out_scale is None else E4M3
    extra = Extra(factor=factor.contiguous(), out_scale=out_scale, dtype=dtype)
    return launch_with(extra, x, weight, bias, activation, scale, residual)[0]


_fp8_linear = define_inference_op(
    "fp8_linear",
    "(Tensor x, Tensor weight, Tensor factor, Tensor? bias, str activation, Tensor? scale, "
    "Tensor? residual, float? out_scale, ScalarType dtype)",
    launch=_launch_fp8,
    eager=fp8_linear_reference,
    fake=lambda x, weight, factor, bias, activation, scale, residual, out_scale, dtype: x.new_empty(
        (*x.shape[:-1], weight.shape[0]), dtype=dtype if out_scale is None else E4M3
    ),
    flops=lambda x, weight, *rest: _flops(x, weight),
)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`linear` of e4m3 operands: act((x W^T) * factor + b) * scale + residual.

    Args:
        x: [..., K] of torch.float8_e4m3fn.
        weight: [N, K] of torch.float8_e4m3fn.
        factor: float32 [N], x's scale times that of each row of weight.
        bias, activation, scale, residual: as in `linear`, of any floating dtypes.
        out_scale: divide the result by it and store it as e4m3, beyond +-448 as +-448.
        dtype: of the result without `out_scale`.

    Returns:
        [..., N] of `dtype`, or of torch.float8_e4m3fn with `out_scale`. Sums are those of the
        tensor core's fp8 products, which on sm_90 keep fewer than float32's digits; elsewhere and
        on a CPU they are in float32.

    Raises:
        TypeError: operands that are not e4m3, a factor that is not float32.
        ValueError: shapes or devices that do not fit, an unknown activation.
        RuntimeError: a GPU without this e4m3 (before sm_89, AMD's).

    Source: FP8 Formats for Deep Learning (arXiv:2209.05433).
    """
    activation = check_activation("fp8_linear", activation)
    for name, tensor, wanted in (("x", x, E4M3), ("weight", weight, E4M3),
                                 ("factor", factor, torch.float32)):  # fmt: skip
        if tensor.dtype != wanted:
            raise TypeError(f"fp8_linear: {name} is {tensor.dtype}, expected {wanted}")
        if tensor.device != x.device:
            raise ValueError(f"fp8_linear: {name} is on {tensor.device}, the input on {x.device}")
    check_tensors("fp8_linear", factor, bias=bias, scale=scale, residual=residual)
    check_out_scale("fp8_linear", out_scale)
    _check_product("fp8_linear", x, weight)
    n = weight.shape[0]
    for name, vector in (("factor", factor), ("bias", bias), ("scale", scale)):
        check_shape("fp8_linear", name, vector, n)
    check_shape("fp8_linear", "residual", residual, *x.shape[:-1], n)
    op = fp8_linear_reference
    if uses_triton(x):
        check_fp8_device("fp8_linear", x.device)
        op = _fp8_linear
    return op(x, weight, factor, bias, activation, scale, residual, out_scale, dtype)
