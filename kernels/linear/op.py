"""`linear`: registration, public function."""

import math
from typing import Any

from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_tensors
from fastvit.kernels._register import Gradient, define_op
from fastvit.kernels.linear.launch import launch_training, prepare, result_dtype, run
from fastvit.kernels.linear.launch_backward import linear_backward
from fastvit.kernels.linear.reference import ACTIVATIONS, linear_reference


def check_epilogue(op: str, activation: str, row_scale: Any) -> None:
    """The name of an activation, and a row_scale that is a constant."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if getattr(row_scale, "requires_grad", False):
        raise ValueError(f"{op}: row_scale has no gradient, but requires one")


def _check(
    x: Any, weight: Any, bias: Any, scale: Any, residual: Any, row_scale: Any, activation: str
) -> None:
    check_epilogue("linear", activation, row_scale)
    check_tensors(
        "linear", x=(x, "... K"), weight=(weight, "N K"), bias=(bias, "N"), scale=(scale, "N"),
        residual=(residual, "... N"), row_scale=(row_scale, "..."),
    )  # fmt: skip
    check_same_dtype("linear", x, weight=weight, bias=bias)


def product_flops(x: Tensor, weight: Tensor, *_: object) -> int:
    """Of x W^T."""
    return 2 * math.prod(x.shape[:-1]) * math.prod(weight.shape)


def _fake(x: Tensor, weight: Tensor, bias: Any, scale: Any, residual: Any, *_: object) -> Tensor:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape, dtype=result_dtype(x, scale, residual))


def _fake_kept(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor]:
    return (x.new_empty((0,) if rest[-1] == "none" else (*x.shape[:-1], weight.shape[0])),)


_linear = define_op(
    "linear",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, Tensor? row_scale, "
    "str activation",
    _check, prepare, run, eager=linear_reference, fake=_fake, flops=product_flops,
    autocast=("x", "weight", "bias"), gradient=Gradient(
        linear_backward, launch_training, kept=1, fake_kept=_fake_kept, unsaved=("residual",)
    ),
)  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None,
    scale: Tensor | None = None, residual: Tensor | None = None, row_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(x W^T + b) * scale * row_scale + residual, in one kernel.

    The sum, the activation and the epilogue are in float32 (float64 for float64 input); one
    rounding at the store.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
        activation: ``gelu`` (exact erf; where the result is bfloat16, a polynomial within 4e-5 of
            it, see `kernels/_activations.py`), ``gelu_tanh``, ``quick_gelu``, ``silu``, ``relu`` or
            None.
        scale: [N], LayerScale's gamma (arXiv:2103.17239, equation 4).
        residual: [..., N].
        row_scale: [...], stochastic depth's factor of each row (arXiv:1603.09382); no gradient.

    Returns:
        [..., N], of x's dtype promoted with scale's and residual's.

    Raises:
        TypeError: a dtype that is not floating, or weight or bias of another dtype than x.
        ValueError: shapes or devices that do not fit, an unknown activation, a row_scale that
            requires a gradient.

    Source: ViT paper (arXiv:2010.11929), equations 1 to 3.
    """
    tensors = (x, weight, bias, scale, residual, row_scale)
    return _linear.apply(tensors, "none" if activation is None else activation)
