"""`norm_linear`: registration, public function.

Two kernels, as the norm's statistics cannot be found inside the product's loop. What it is for is
memory: a norm and a linear apart keep the norm's result for the backward, this keeps x alone.
"""

from typing import Any

from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_tensors
from fastvit.kernels._register import Gradient, define_op
from fastvit.kernels.layer_norm.op import check_layer_norm
from fastvit.kernels.linear.op import product_flops
from fastvit.kernels.norm_linear.launch import norm_linear_backward, prepare, run
from fastvit.kernels.norm_linear.reference import norm_linear_reference


def _check(x: Any, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any, eps: float) -> None:
    check_layer_norm("norm_linear", x, norm_weight, norm_bias)
    check_tensors("norm_linear", x=(x, "... K"), weight=(weight, "N K"), bias=(bias, "N"))
    check_same_dtype("norm_linear", x, weight=weight, bias=bias)


_norm_linear = define_op(
    "norm_linear",
    "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, float eps",
    _check, prepare, run, eager=norm_linear_reference,
    fake=lambda x, norm_weight, norm_bias, weight, *rest: x.new_empty(
        (*x.shape[:-1], weight.shape[0]), dtype=weight.dtype
    ),
    flops=lambda x, norm_weight, norm_bias, weight, *rest: product_flops(x, weight),
    autocast=("weight", "bias"),  # the norm reads x as it is
    gradient=Gradient(norm_linear_backward),
)  # fmt: skip


def norm_linear(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor,
    bias: Tensor | None = None, *, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
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
    return _norm_linear.apply((x, norm_weight, norm_bias, weight, bias), eps)
