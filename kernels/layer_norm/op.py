"""`layer_norm` and `rms_norm`: launcher, registration, public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_shape, check_tensors
from fastvit.kernels._device import architecture
from fastvit.kernels._library import Gradient, define_op, launch, uses_triton
from fastvit.kernels._tuning import cdiv, lookup
from fastvit.kernels.layer_norm.reference import E4M3, layer_norm_reference, rms_norm_reference

MAX_WIDTH = 16384  # a row has to stay in registers


def launch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    out_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The Triton path of both norms; e4m3 of the result over `out_scale` where that is given, else
    the result in `dtype`, x's by default."""
    import triton.language as tl

    from fastvit.kernels.layer_norm.kernel import layer_norm_kernel

    d = x.shape[-1]
    y = x.new_empty(x.shape, dtype=dtype or x.dtype if out_scale is None else E4M3)
    if y.numel() == 0:
        return y
    x2 = x.reshape(-1, d)
    m = x2.shape[0]
    width = 1 << (d - 1).bit_length()
    tile = lookup("layer_norm", architecture(x.device), x.dtype, M=m, D_POW2=width)
    launch(
        layer_norm_kernel,
        cdiv(m, tile.BLOCK_M),
        tile,
        x_ptr=x2,
        weight_ptr=None if weight is None else weight.contiguous(),
        bias_ptr=None if bias is None else bias.contiguous(),
        y_ptr=y,
        inv_out_scale=None if out_scale is None else 1.0 / out_scale,
        M=m,
        D=d,
        stride_xm=x2.stride(0),
        stride_xd=x2.stride(1),
        stride_ym=d,
        EPS=eps,
        CENTER=center,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=width,
    )
    return y


def _launch_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return launch_norm(x, weight, bias, eps, center=True)


def _launch_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return launch_norm(x, weight, None, eps, center=False)


def _layer_norm_backward(*args: Any) -> list[Tensor]:
    from fastvit.kernels.layer_norm.backward import layer_norm_backward

    return layer_norm_backward(*args)


def _rms_norm_backward(*args: Any) -> list[Tensor]:
    from fastvit.kernels.layer_norm.backward import rms_norm_backward

    return rms_norm_backward(*args)


def _no_flops(*shapes: object) -> int:
    return 0  # no products of matrices, as PyTorch's own counter counts norms


_layer_norm = define_op(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps)",
    launch=_launch_layer_norm,
    eager=layer_norm_reference,
    fake=lambda x, *rest: x.new_empty(x.shape),
    flops=_no_flops,
    autocast=("x", "weight", "bias"),
    autocast_dtype=torch.float32,
    gradient=Gradient(_layer_norm_backward),
)

_rms_norm = define_op(
    "rms_norm",
    "(Tensor x, Tensor? weight, float eps)",
    launch=_launch_rms_norm,
    eager=rms_norm_reference,
    fake=lambda x, *rest: x.new_empty(x.shape),
    flops=_no_flops,
    autocast=("x", "weight"),
    autocast_dtype=torch.float32,
    gradient=Gradient(_rms_norm_backward),
)


def check_layer_norm(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """What `layer_norm` takes.

    Raises:
        TypeError, ValueError: as `layer_norm`.
    """
    _check(op, x, weight, bias)
    if weight is None or weight.dtype != torch.float32 or x.dtype == torch.float64:
        check_same_dtype(op, x, weight=weight, bias=bias)


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_tensors(op, x, weight=weight, bias=bias)
    if x.dim() < 1 or not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{op}: x {list(x.shape)} needs a last dimension from 1 to {MAX_WIDTH}")
    check_shape(op, "weight", weight, x.shape[-1])
    check_shape(op, "bias", bias, x.shape[-1])


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
    check_layer_norm("layer_norm", x, weight, bias)
    op = _layer_norm if uses_triton(x) else layer_norm_reference
    return op(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Arguments, result and errors as in `layer_norm`. Source: arXiv:1910.07467, equation 4.
    """
    _check("rms_norm", x, weight, None)
    check_same_dtype("rms_norm", x, weight=weight)
    op = _rms_norm if uses_triton(x) else rms_norm_reference
    return op(x, weight, eps)
