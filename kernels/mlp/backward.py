"""Gradients of `mlp`, from what goes into its activation.

With pre = h W1^T + b1, hidden = act(pre) and G the gradient of hidden W2^T + b2:

    dpre = (G W2) * act'(pre)    dh = dpre W1    dW1 = dpre^T h    dW2 = G^T hidden

The product G W2 gives dpre and hidden again in its epilogue, so the hidden layer is kept once, not
twice. Where a norm stands in front, h is computed again too, beside the gradient of the norm.

Shape legend: M rows (batch x tokens), K input features, F hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastvit.kernels.linear.backward import (
    hidden_gradient,
    input_gradient,
    parameter_gradients,
    pre_gradient,
    select,
)
from fastvit.kernels.norm_linear.backward import through_norm


class _Second(NamedTuple):
    """What the second linear gives."""

    dpre: Tensor  # [M, F]
    dw2: Tensor | None
    db2: Tensor | None
    dscale: Tensor | None


def _second(
    grad: Tensor, pre: Tensor, w2: Tensor, b2: Tensor | None, activation: str,
    scale: Tensor | None, row_scale: Tensor | None, needs: tuple[bool, bool, bool],
) -> _Second:  # fmt: skip
    g, sums, _ = pre_gradient(grad, w2.dtype, row_scale=row_scale)
    dpre, hidden = hidden_gradient(g, w2, scale, pre, activation)
    return _Second(dpre, *parameter_gradients(g, hidden, w2, b2, scale, sums, needs))


def mlp_backward(
    grad: Tensor, output: None, kept: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor]:
    """As `_library.Gradient` has it; what is kept is pre."""
    x, w1, b1, w2, b2, activation, scale, _, row_scale = args
    dpre, dw2, db2, dscale = _second(
        grad, kept[0], w2, b2, activation, scale, row_scale, (needs[3], needs[4], needs[6])
    )
    dx = input_gradient(dpre, w1).view(x.shape) if needs[0] else None
    dw1, db1, _ = parameter_gradients(dpre, x, w1, b1, None, None, (needs[1], needs[2], False))
    return select((dx, dw1, db1, dw2, db2, None, dscale, None, None), needs)


def norm_mlp_backward(
    grad: Tensor, output: None, kept: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor]:
    """As `mlp_backward`, for `norm_mlp`."""
    x, norm_weight, norm_bias, eps, w1, b1, w2, b2, activation, scale, _, row_scale, skip = args
    dpre, dw2, db2, dscale = _second(
        grad, kept[0], w2, b2, activation, scale, row_scale, (needs[6], needs[7], needs[9])
    )
    of_norm = (needs[0], needs[1], needs[2])
    dx, dnorm_weight, dnorm_bias, h = through_norm(
        dpre, x, norm_weight, norm_bias, eps, w1, of_norm, add=grad if skip else None,
        wants_normal=needs[4],
    )  # fmt: skip
    dw1, db1, _ = parameter_gradients(dpre, h, w1, b1, None, None, (needs[4], needs[5], False))
    grads = (
        dx, dnorm_weight, dnorm_bias, None, dw1, db1, dw2, db2, None, dscale, None, None, None
    )  # fmt: skip
    return select(grads, needs)
