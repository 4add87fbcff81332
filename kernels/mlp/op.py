"""`mlp`: two linears with fused epilogues; launcher, registration, public function.

There is no kernel of its own: at ViT's widths the hidden layer of one tile overflows registers or
shared memory, so one kernel would be slower than two.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_shape, check_tensors
from fastvit.kernels._library import Gradient, define_op, uses_triton
from fastvit.kernels.layer_norm.op import check_layer_norm, launch_norm
from fastvit.kernels.linear.op import (
    Extra,
    check_activation,
    check_row_scale,
    launch_linear,
    launch_with,
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
    row_scale: Tensor | None,
) -> Tensor:
    hidden = launch_linear(x, w1, b1, activation, None, None)
    return launch_linear(hidden, w2, b2, "none", scale, residual, row_scale)


def _launch_training(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`_launch`, and what goes into the activation, [..., F]."""
    hidden, pre = launch_with(Extra(wants_pre=True), x, w1, b1, activation, None, None)
    assert pre is not None
    return launch_linear(hidden, w2, b2, "none", scale, residual, row_scale), pre


def _fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w2.shape[0]), dtype=result_dtype(x, scale, residual))


def _flops(
    x: tuple[int, ...], w1: tuple[int, ...], b1: object, w2: tuple[int, ...], *_: Any
) -> int:
    return 2 * math.prod(x[:-1]) * w1[0] * (w1[1] + w2[0])


def _backward(*args: Any) -> list[Tensor]:
    from fastvit.kernels.mlp.backward import mlp_backward

    return mlp_backward(*args)


_mlp = define_op(
    "mlp",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, "
    "Tensor? scale, Tensor? residual, Tensor? row_scale)",
    launch=_launch,
    eager=mlp_reference,
    fake=_fake,
    flops=_flops,
    autocast=("x", "w1", "b1", "w2", "b2"),
    gradient=Gradient(
        _backward,
        _launch_training,
        kept=1,
        fake_kept=lambda x, w1, *rest: (x.new_empty(*x.shape[:-1], w1.shape[0]),),
        unsaved=("residual",),
    ),
)

# --------------------------------------------------------------------------- a norm in front


def _after_norm(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None,
    skip: bool,
) -> tuple[Any, ...]:
    """The arguments of `mlp` that stand for those of `norm_mlp`."""
    normal = launch_norm(x, norm_weight, norm_bias, eps, True, dtype=w1.dtype)
    residual = x if skip else residual
    return normal, w1, b1, w2, b2, activation, scale, residual, row_scale


def _eager_norm_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None,
    skip: bool,
) -> Tensor:
    residual = x if skip else residual
    return mlp_reference(
        x, w1, b1, w2, b2, activation, scale, residual, row_scale,
        norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
    )  # fmt: skip


def _fake_norm_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None,
    skip: bool,
) -> Tensor:
    dtype = result_dtype(w1, scale, x if skip else residual)
    return x.new_empty((*x.shape[:-1], w2.shape[0]), dtype=dtype)


def _fake_kept(x: Tensor, norm_weight: Any, norm_bias: Any, eps: float, w1: Tensor, *_: Any) -> Any:
    return (x.new_empty((*x.shape[:-1], w1.shape[0]), dtype=w1.dtype),)


def _norm_backward(*args: Any) -> list[Tensor]:
    from fastvit.kernels.mlp.backward import norm_mlp_backward

    return norm_mlp_backward(*args)


_norm_mlp = define_op(
    "norm_mlp",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor w1, Tensor? b1, "
    "Tensor w2, Tensor? b2, str activation, Tensor? scale, Tensor? residual, Tensor? row_scale, "
    "bool skip)",
    launch=lambda *args: _launch(*_after_norm(*args)),
    eager=_eager_norm_mlp,
    fake=_fake_norm_mlp,
    flops=lambda x, norm_weight, norm_bias, eps, *rest: _flops(x, *rest),
    autocast=("w1", "b1", "w2", "b2"),  # the norm reads x as it is
    gradient=Gradient(
        _norm_backward,
        lambda *args: _launch_training(*_after_norm(*args)),
        kept=1,
        fake_kept=_fake_kept,
        unsaved=("residual",),
    ),
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
    row_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """(act(h W1^T + b1) W2^T + b2) * scale * row_scale + residual, h = x or, with `norm_weight`,
    LN(x).

    The backward keeps x and what goes into the activation, and computes LN(x) and the activation
    again.

    Args:
        x: [..., K].
        w1: [F, K], b1: [F] or None.
        w2: [N, F], b2: [N] or None.
        activation: as in `linear`.
        scale: [N], residual: [..., N], row_scale: [...], as in `linear`. A residual that is x
            itself, behind a norm, spares the backward a sum of two gradients.
        norm_weight, norm_bias, eps: of a `layer_norm` of x first, [K] each.

    Returns:
        [..., N], of x's dtype (behind a norm and under autocast: of autocast's) promoted with
        scale's and residual's. The hidden layer is rounded to w1's dtype once, after the
        activation.

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
    check_row_scale("mlp", row_scale, x)
    if norm_weight is None:
        if norm_bias is not None:
            raise ValueError("mlp: norm_bias without norm_weight")
        op = _mlp if uses_triton(x) else mlp_reference
        return op(x, w1, b1, w2, b2, activation, scale, residual, row_scale)
    check_layer_norm("mlp", x, norm_weight, norm_bias)
    skip = residual is x
    op = _norm_mlp if uses_triton(x) else _eager_norm_mlp
    return op(
        x, norm_weight, norm_bias, eps, w1, b1, w2, b2, activation, scale,
        None if skip else residual, row_scale, skip,
    )  # fmt: skip
