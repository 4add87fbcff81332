"""`norm_linear`: launcher, registration, public function.

Two kernels, as the norm's statistics cannot be found inside the product's loop. What it is for is
memory: a norm and a linear apart keep the norm's result for the backward, this keeps x alone.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_shape, check_tensors
from fastvit.kernels._library import Gradient, define_op, uses_triton
from fastvit.kernels.layer_norm.op import check_layer_norm, launch_norm
from fastvit.kernels.linear.op import launch_linear
from fastvit.kernels.norm_linear.reference import norm_linear_reference


def _launch(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    normal = launch_norm(x, norm_weight, norm_bias, eps, True, dtype=weight.dtype)
    return launch_linear(normal, weight, bias, "none", None, None)


def _fake(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, *_: object
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=weight.dtype)


def _flops(
    x: tuple[int, ...], norm_weight: object, norm_bias: object, weight: tuple[int, ...], *_: object
) -> int:
    return 2 * math.prod(x[:-1]) * weight[0] * weight[1]


def _backward(*args: Any) -> list[Tensor]:
    from fastvit.kernels.norm_linear.backward import norm_linear_backward

    return norm_linear_backward(*args)


_norm_linear = define_op(
    "norm_linear",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, float eps)",
    launch=_launch,
    eager=norm_linear_reference,
    fake=_fake,
    flops=_flops,
    autocast=("weight", "bias"),  # the norm reads x as it is
    gradient=Gradient(_backward),
)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """LN(x) W^T + b, of which the backward keeps x only and computes LN(x) again.

    Args:
        x: [..., K].
        norm_weight, norm_bias: [K] or None, of x's dtype or float32, as in `layer_norm`.
        weight: [N, K], bias: [N] or None, of x's dtype.
        eps: added to the variance.

    Returns:
        Contiguous [..., N] of x's dtype; under autocast of autocast's, while the norm reads x in
        its own. LN(x) is rounded to the result's dtype.

    Raises:
        TypeError, ValueError: as `layer_norm` and `linear`.

    Source: ViT paper (arXiv:2010.11929), equation 2.
    """
    check_layer_norm("norm_linear", x, norm_weight, norm_bias)
    check_tensors("norm_linear", x, weight=weight, bias=bias)
    check_same_dtype("norm_linear", x, weight=weight, bias=bias)
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"norm_linear: x {list(x.shape)} and weight {list(weight.shape)} do not fit "
            "[..., K], [N, K]"
        )
    check_shape("norm_linear", "bias", bias, weight.shape[0])
    op = _norm_linear if uses_triton(x) else norm_linear_reference
    return op(x, norm_weight, norm_bias, weight, bias, eps)
