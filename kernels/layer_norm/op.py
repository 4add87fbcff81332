"""`layer_norm` and `rms_norm`: registration, public functions."""

from typing import Any

import torch
from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_tensors
from fastvit.kernels._launch import run_to_output
from fastvit.kernels._register import Gradient, define_op
from fastvit.kernels.layer_norm.launch import norm_gradients, prepare
from fastvit.kernels.layer_norm.reference import layer_norm_reference, rms_norm_reference

MAX_WIDTH = 16384  # a row has to stay in registers


def check_layer_norm(op: str, x: Any, weight: Any, bias: Any) -> None:
    """What `layer_norm` takes."""
    _check_norm(op, x, weight, bias)
    if weight is None or weight.dtype != torch.float32 or x.dtype == torch.float64:
        check_same_dtype(op, x, weight=weight, bias=bias)


def _check_norm(op: str, x: Any, weight: Any, bias: Any) -> None:
    check_tensors(op, x=(x, "... D"), weight=(weight, "D"), bias=(bias, "D"))
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{op}: x {list(x.shape)} needs a last dimension from 1 to {MAX_WIDTH}")


def _check_rms_norm(x: Any, weight: Any, eps: float) -> None:
    _check_norm("rms_norm", x, weight, None)
    check_same_dtype("rms_norm", x, weight=weight)


_layer_norm = define_op(
    "layer_norm", "Tensor x, Tensor? weight, Tensor? bias, float eps",
    lambda x, weight, bias, eps: check_layer_norm("layer_norm", x, weight, bias),
    prepare, run_to_output, eager=layer_norm_reference,
    fake=lambda x, *rest: x.new_empty(x.shape), autocast=("x", "weight", "bias"),
    autocast_dtype=torch.float32,
    gradient=Gradient(lambda grad, _, args, needs: norm_gradients(grad, *args, needs=needs)),
)  # fmt: skip
_rms_norm = define_op(
    "rms_norm", "Tensor x, Tensor? weight, float eps", _check_rms_norm,
    lambda x, weight, *rest: prepare(x, weight, None, *rest, center=False), run_to_output,
    eager=rms_norm_reference, fake=lambda x, *rest: x.new_empty(x.shape),
    autocast=("x", "weight"), autocast_dtype=torch.float32,
    gradient=Gradient(
        lambda grad, _, args, needs: norm_gradients(
            grad, args[0], args[1], None, args[2], (*needs[:2], False), center=False
        )
    ),
)  # fmt: skip


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    Statistics are in float32 (float64 for float64 input), from centred values.

    Args:
        x: [..., D], D up to 16384.
        weight: [D] or None for ones; of x's dtype or float32.
        bias: [D] or None for zeros; of weight's dtype.
        eps: added to the variance.

    Returns:
        Contiguous [..., D] of x's dtype; float32 under autocast.

    Raises:
        TypeError: a dtype that is not floating, or weight or bias of another dtype than x.
        ValueError: shapes or devices that do not fit.

    Source: arXiv:1607.06450, equation 4.
    """
    return _layer_norm.apply((x, weight, bias), eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Arguments, result and errors as in `layer_norm`. Source: arXiv:1910.07467, equation 4.
    """
    return _rms_norm.apply((x, weight), eps)
