"""`mlp`: two linears with fused epilogues; launcher, registration, public function.

There is no kernel of its own: at ViT's widths the hidden layer of one tile overflows registers or
shared memory, so one kernel would be slower than two.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_shape, check_tensors
from fastvit.kernels._library import define_op, uses_triton
from fastvit.kernels.linear.op import (
    check_activation,
    launch_linear,
    result_dtype,
)
from fastvit.kernels.mlp.reference import mlp_reference


def _launch(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    hidden = launch_linear(x, w1, b1, activation, None, None)
    return launch_linear(hidden, w2, b2, "none", scale, residual)


def _fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w2.shape[0]), dtype=result_dtype(x, scale, residual))


_mlp = define_op(
    "mlp",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, "
    "Tensor? scale, Tensor? residual)",
    launch=_launch,
    eager=mlp_reference,
    fake=_fake,
    flops=lambda x, w1, b1, w2, *rest: 2 * math.prod(x[:-1]) * w1[0] * (w1[1] + w2[0]),
    autocast=("x", "w1", "b1", "w2", "b2"),
)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str | None = "gelu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """(act(x W1^T + b1) W2^T + b2) * scale + residual.

    Args:
        x: [..., K].
        w1: [F, K], b1: [F] or None.
        w2: [N, F], b2: [N] or None.
        activation: as in `linear`.
        scale: [N], residual: [..., N], as in `linear`.

    Returns:
        [..., N], of x's dtype promoted with scale's and residual's. The hidden layer is rounded to
        x's dtype once, after the activation.

    Raises:
        TypeError, ValueError: as `linear`.

    Source: ViT paper (arXiv:2010.11929), equation 3.
    """
    activation = check_activation("mlp", activation)
    check_tensors("mlp", x, w1=w1, b1=b1, w2=w2, b2=b2, scale=scale, residual=residual)
    check_same_dtype("mlp", x, w1=w1, b1=b1, w2=w2, b2=b2)
    if (
        x.dim() < 1
        or w1.dim() != 2
        or w2.dim() != 2
        or x.shape[-1] != w1.shape[1]
        or w1.shape[0] != w2.shape[1]
    ):
        raise ValueError(
            f"mlp: x {list(x.shape)}, w1 {list(w1.shape)}, w2 {list(w2.shape)} do not fit "
            "[..., K], [F, K], [N, F]"
        )
    n = w2.shape[0]
    check_shape("mlp", "b1", b1, w1.shape[0])
    check_shape("mlp", "b2", b2, n)
    check_shape("mlp", "scale", scale, n)
    check_shape("mlp", "residual", residual, *x.shape[:-1], n)
    op = _mlp if uses_triton(x) else mlp_reference
    return op(x, w1, b1, w2, b2, activation, scale, residual)
