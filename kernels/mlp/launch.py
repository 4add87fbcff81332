"""`mlp`'s launcher: two linears', behind a layer norm's where there is one.

There is no kernel of its own: at ViT's widths the hidden layer of one tile overflows registers or
shared memory, so one kernel would be slower than two.

Gradients, with pre = h W1^T + b1, hidden = act(pre) and G the gradient of hidden W2^T + b2:

    dpre = (G W2) * act'(pre)    dh = dpre W1    dW1 = dpre^T h    dW2 = G^T hidden

The product G W2 gives dpre and hidden again in its epilogue, so the hidden layer is kept once, not
twice; Hopper's gives db1 too. Where a norm stands in front, h is computed again too, beside the
gradient of the norm.

Shape legend: M rows (batch x tokens), K input features, F hidden features.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastvit.kernels._backend import Grads, Meta, packed
from fastvit.kernels._device import cached
from fastvit.kernels._launch import Output, run_to_output
from fastvit.kernels.layer_norm import launch as layer_norm
from fastvit.kernels.linear import launch as linear
from fastvit.kernels.linear import launch_backward as backward
from fastvit.kernels.norm_linear.launch import through_norm

Mlp = tuple[Output | None, linear.Linear, linear.Linear, bool]  # the norm, two linears, and `skip`


@cached
def prepare(
    x: Meta, norm_weight: Meta | None, norm_bias: Meta | None, w1: Meta, b1: Meta | None,
    w2: Meta, b2: Meta | None, scale: Meta | None, residual: Meta | None, row_scale: Meta | None,
    activation: str, eps: float | None, skip: bool, precision: str, *, keep: bool = False,
) -> Mlp:  # fmt: skip
    """Arguments as in `fastvit.ops.mlp`; eps is None without a norm. With `skip` x itself is the
    residual; with `keep` what goes into the activation is wanted too."""
    norm, residual = None, x if skip else residual
    if eps is not None:
        norm = layer_norm.prepare(x, norm_weight, norm_bias, eps, dtype=w1.dtype)
        x = packed(norm.dtype, norm.shape, x.device)
    first = linear.prepare(x, w1, b1, None, None, None, activation, precision, keep=keep)
    hidden = packed(first.dtype, first.shape, x.device)
    second = linear.prepare(hidden, w2, b2, scale, residual, row_scale, "none", precision)
    return norm, first, second, skip


def run(
    prepared: Mlp, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, w1: Tensor,
    b1: Tensor | None, w2: Tensor, b2: Tensor | None, scale: Tensor | None,
    residual: Tensor | None, row_scale: Tensor | None,
) -> Any:  # fmt: skip
    """[..., N], contiguous; with `keep` also what goes into the activation, [..., F]."""
    norm, first, second, skip = prepared
    residual = x if skip else residual
    if norm is not None:
        x = run_to_output(norm, x, norm_weight, norm_bias)
    hidden, pre = linear.run(first, x, w1, b1), None
    if first.keep:
        hidden, pre = hidden
    y = linear.run(second, hidden, w2, b2, scale, residual, row_scale)
    return (y, pre) if first.keep else y


def mlp_backward(
    grad: Tensor, kept: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> Grads:
    """As `_register.Gradient` has it; what is kept is pre."""
    x, norm_weight, norm_bias, w1, b1, w2, b2, scale, _, row_scale, activation, eps, skip = args
    g, sums, _ = backward.pre_gradient(grad, w2.dtype, row_scale=row_scale)
    dpre, hidden, of_columns = backward.hidden_gradient(
        g, w2, scale, kept[0], activation, wants_hidden=needs[5] or needs[7]
    )
    of_second = backward.parameter_gradients(g, hidden, w2, b2, scale, sums, needs[5:8])
    del g, hidden  # memory for what follows
    dnorm, h = (None, None), x
    if eps is None:
        dx = backward.input_gradient(dpre, w1).view(x.shape) if needs[0] else None
    else:
        dx, *dnorm, h = through_norm(
            dpre, x, norm_weight, norm_bias, eps, w1, needs[:3], add=grad if skip else None,
            wants_normal=needs[3],
        )  # fmt: skip
    wanted = (needs[3], needs[4], False)
    dw1, db1, _ = backward.parameter_gradients(dpre, h, w1, b1, None, of_columns, wanted)
    return dx, *dnorm, dw1, db1, *of_second
