"""Gradients of y = LN(x) W^T + b, from x: LN(x) is computed again beside the norm's gradient.

Shape legend: M rows (batch x tokens), K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.kernels.layer_norm.backward import norm_gradients
from fastvit.kernels.layer_norm.op import launch_norm
from fastvit.kernels.linear.backward import (
    input_gradient,
    parameter_gradients,
    pre_gradient,
    select,
)


def norm_linear_backward(
    grad: Tensor,
    output: None,
    kept: Sequence[Tensor],
    args: tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, float],
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `_library.Gradient` has it."""
    x, norm_weight, norm_bias, weight, bias, eps = args
    g, sums, _ = pre_gradient(grad, weight.dtype)
    of_norm = (needs[0], needs[1], needs[2])
    dx, dnorm_weight, dnorm_bias, normal = through_norm(
        g, x, norm_weight, norm_bias, eps, weight, of_norm, wants_normal=needs[3]
    )
    wanted = (needs[3], needs[4], False)
    dw, db, _ = parameter_gradients(g, normal, weight, bias, None, sums, wanted)
    return select((dx, dnorm_weight, dnorm_bias, dw, db, None), needs)


def through_norm(
    g: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    needs: tuple[bool, bool, bool],
    *,
    wants_normal: bool,
    add: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, norm_weight and norm_bias, those that `needs` names, and LN(x) if wanted.

    Args:
        g: the gradient of LN(x) W^T, [M, N].
        add: [..., K], added to the gradient of x.
    """
    if not any(needs):
        normal = None
        if wants_normal:
            normal = launch_norm(x, norm_weight, norm_bias, eps, True, dtype=weight.dtype)
        return None, None, None, normal
    normal = torch.empty(x.shape, dtype=weight.dtype, device=x.device) if wants_normal else None
    dx, dnorm_weight, dnorm_bias = norm_gradients(
        input_gradient(g, weight), x, norm_weight, norm_bias, eps, needs, add=add, normal=normal
    )
    return dx, dnorm_weight, dnorm_bias, normal
