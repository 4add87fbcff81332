"""`norm_linear`'s launcher: a layer norm's, then a linear's; and its gradients, from x: LN(x) is
computed again beside the norm's gradient.

Shape legend: M rows (batch x tokens), K input features, N output features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels._backend import Grads, Meta, packed, prepare_and_run
from fastvit.kernels._device import cached
from fastvit.kernels._launch import Output, run_to_output
from fastvit.kernels.layer_norm import launch as layer_norm
from fastvit.kernels.linear import launch as linear
from fastvit.kernels.linear import launch_backward as backward


@cached
def prepare(
    x: Meta, norm_weight: Meta | None, norm_bias: Meta | None, weight: Meta, bias: Meta | None,
    eps: float, precision: str,
) -> tuple[Output, linear.Linear]:  # fmt: skip
    """The prepared norm and linear, arguments as in `fastvit.ops.norm_linear`."""
    norm = layer_norm.prepare(x, norm_weight, norm_bias, eps, dtype=weight.dtype)
    normal = packed(norm.dtype, norm.shape, x.device)
    product = linear.prepare(normal, weight, bias, None, None, None, "none", precision)
    return norm, product


def run(
    prepared: tuple[Output, linear.Linear], x: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """[..., N], contiguous."""
    normal = run_to_output(prepared[0], x, norm_weight, norm_bias)
    return linear.run(prepared[1], normal, weight, bias)


def norm_linear_backward(
    grad: Tensor, kept: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> Grads:
    """As `_register.Gradient` has it."""
    x, norm_weight, norm_bias, weight, bias, eps = args
    g, sums, _ = backward.pre_gradient(grad, weight.dtype)
    dx, dnorm_weight, dnorm_bias, normal = through_norm(
        g, x, norm_weight, norm_bias, eps, weight, needs[:3], wants_normal=needs[3]
    )
    wanted = (needs[3], needs[4], False)
    dw, db, _ = backward.parameter_gradients(g, normal, weight, bias, None, sums, wanted)
    return dx, dnorm_weight, dnorm_bias, dw, db


def through_norm(
    g: Tensor, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    weight: Tensor, needs: Sequence[bool], *, wants_normal: bool, add: Tensor | None = None,
) -> Grads:  # fmt: skip
    """Gradients of x, norm_weight and norm_bias, those that `needs` names, and LN(x) if wanted,
    from g [M, N], that of LN(x) W^T. `add` [..., K] is added to the gradient of x."""
    norm = (x, norm_weight, norm_bias)
    if not any(needs):
        h = None
        if wants_normal:
            h = prepare_and_run(layer_norm.prepare, run_to_output, norm, eps, dtype=weight.dtype)
        return None, None, None, h
    h = torch.empty(x.shape, dtype=weight.dtype, device=x.device) if wants_normal else None
    dh = backward.input_gradient(g, weight)
    return *layer_norm.norm_gradients(dh, *norm, eps, needs, add=add, normal=h), h
