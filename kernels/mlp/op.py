"""`mlp`: two linears with fused epilogues, behind a layer norm or not; registration, public
function."""

import math
from typing import Any

from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_tensors
from fastvit.kernels._register import Gradient, define_op
from fastvit.kernels.layer_norm.op import check_layer_norm
from fastvit.kernels.linear.launch import result_dtype
from fastvit.kernels.linear.op import check_epilogue
from fastvit.kernels.mlp.launch import mlp_backward, prepare, run
from fastvit.kernels.mlp.reference import mlp_reference


def _check(
    x: Any, norm_weight: Any, norm_bias: Any, w1: Any, b1: Any, w2: Any, b2: Any, scale: Any,
    residual: Any, row_scale: Any, activation: str, eps: float | None, skip: bool,
) -> None:  # fmt: skip
    check_epilogue("mlp", activation, row_scale)
    check_tensors(
        "mlp", x=(x, "... K"), w1=(w1, "F K"), b1=(b1, "F"), w2=(w2, "N F"), b2=(b2, "N"),
        scale=(scale, "N"), residual=(residual, "... N"), row_scale=(row_scale, "..."),
    )  # fmt: skip
    check_same_dtype("mlp", x, w1=w1, b1=b1, w2=w2, b2=b2)
    if norm_weight is not None:
        check_layer_norm("mlp", x, norm_weight, norm_bias)
    elif norm_bias is not None:
        raise ValueError("mlp: norm_bias without norm_weight")


def _eager(*args: Any) -> Tensor:
    x, *norm, w1, b1, w2, b2, scale, residual, row_scale, activation, eps, skip = args
    summands = (scale, x if skip else residual, row_scale)
    norm = dict(zip(("norm_weight", "norm_bias", "eps"), (*norm, eps), strict=True))
    return mlp_reference(x, w1, b1, w2, b2, activation, *summands, **norm)


def _fake(*args: Any) -> Tensor:
    x, _, _, w1, _, w2, _, scale, residual, *_, skip = args
    dtype = result_dtype(w1, scale, x if skip else residual)
    return x.new_empty((*x.shape[:-1], w2.shape[0]), dtype=dtype)


def _fake_kept(x: Tensor, norm_weight: Any, norm_bias: Any, w1: Tensor, *_: Any) -> tuple[Tensor]:
    return (x.new_empty((*x.shape[:-1], w1.shape[0]), dtype=w1.dtype),)


def _flops(*args: Any) -> int:
    x, _, _, w1, _, w2, *_ = args
    return 2 * math.prod(x.shape[:-1]) * w1.shape[0] * (w1.shape[1] + w2.shape[0])


# two ops, for autocast: a norm reads x as it is
_mlp, _norm_mlp = (
    define_op(
        name,
        "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor w1, Tensor? b1, Tensor w2, "
        "Tensor? b2, Tensor? scale, Tensor? residual, Tensor? row_scale, str activation, "
        "float? eps, bool skip",
        _check, prepare, run, eager=_eager, fake=_fake, flops=_flops,
        autocast=(*cast, "w1", "b1", "w2", "b2"),
        gradient=Gradient(mlp_backward, kept=1, fake_kept=_fake_kept, unsaved=("residual",)),
    )
    for name, cast in (("mlp", ("x",)), ("norm_mlp", ()))
)  # fmt: skip


def mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *,
    activation: str | None = "gelu", scale: Tensor | None = None, residual: Tensor | None = None,
    row_scale: Tensor | None = None, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
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
    has_norm = norm_weight is not None
    skip = has_norm and residual is x
    rest = (scale, None if skip else residual, row_scale)
    return (_norm_mlp if has_norm else _mlp).apply(
        (x, norm_weight, norm_bias, w1, b1, w2, b2, *rest),
        "none" if activation is None else activation, eps if has_norm else None, skip,
    )  # fmt: skip
