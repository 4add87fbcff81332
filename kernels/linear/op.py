"""`linear`: launcher, registration, public function."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_shape, check_tensors
from fastvit.kernels._device import architecture
from fastvit.kernels._library import define_op, launch, uses_triton
from fastvit.kernels._tuning import cdiv, lookup
from fastvit.kernels.linear.reference import ACTIVATIONS, linear_reference

GROUP_M = 8


def result_dtype(x: Tensor, *others: Tensor | None) -> torch.dtype:
    """What PyTorch's promotion gives for x and those of `others` that are there."""
    return functools.reduce(
        torch.promote_types, [other.dtype for other in others if other is not None], x.dtype
    )


def float32_precision(dtype: torch.dtype) -> str:
    """``ieee`` or ``tf32`` for a kernel's float32 products, as PyTorch is set."""
    highest = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if highest or dtype != torch.float32 else "tf32"


def launch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The Triton path; arguments as in `linear`, [..., K] to a contiguous [..., N]."""
    import triton.language as tl

    from fastvit.kernels.linear.kernel import linear_kernel

    n, k = weight.shape
    y = x.new_empty(*x.shape[:-1], n, dtype=result_dtype(x, scale, residual))
    if y.numel() == 0:
        return y
    x2 = x.reshape(-1, k)
    residual2 = None if residual is None else residual.reshape(-1, n)
    m = x2.shape[0]
    tile = lookup("linear", architecture(x.device), x.dtype, M=m, N=n, K=k)
    programs = cdiv(m, tile.BLOCK_M) * cdiv(n, tile.BLOCK_N)
    launch(
        linear_kernel,
        programs,
        tile,
        x_ptr=x2,
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.contiguous(),
        scale_ptr=None if scale is None else scale.contiguous(),
        residual_ptr=residual2,
        y_ptr=y,
        M=m,
        N=n,
        K=k,
        stride_xm=x2.stride(0),
        stride_xk=x2.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_rm=0 if residual2 is None else residual2.stride(0),
        stride_rn=0 if residual2 is None else residual2.stride(1),
        stride_ym=n,
        ACTIVATION=activation,
        PRECISION=float32_precision(x.dtype),
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        EVEN_K=k % tile.BLOCK_K == 0,
        GROUP_M=GROUP_M,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
    )
    return y


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape, dtype=result_dtype(x, scale, residual))


_linear = define_op(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? scale, Tensor? residual)",
    launch=launch_linear,
    eager=linear_reference,
    fake=_fake,
    flops=lambda x, weight, *rest: 2 * rows(x) * weight[0] * weight[1],
    autocast=("x", "weight", "bias"),
)


def rows(shape: tuple[int, ...]) -> int:
    """Product of all sizes but the last."""
    return functools.reduce(lambda a, b: a * b, shape[:-1], 1)


def check_activation(op: str, activation: str | None) -> str:
    """`activation`, ``none`` for None.

    Raises:
        ValueError: for a name that is not in `ACTIVATIONS`.
    """
    if activation is None:
        return "none"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return activation


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(x W^T + b) * scale + residual, in one kernel.

    The sum, the activation and the epilogue are in float32 (float64 for float64 input); one
    rounding at the store.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
        activation: ``gelu`` (exact erf), ``gelu_tanh``, ``quick_gelu``, ``silu``, ``relu``, None.
        scale: [N], LayerScale's gamma (arXiv:2103.17239, equation 4).
        residual: [..., N].

    Returns:
        [..., N], of x's dtype promoted with scale's and residual's.

    Raises:
        TypeError: a dtype that is not floating, or weight or bias of another dtype than x.
        ValueError: shapes or devices that do not fit, an unknown activation.

    Source: ViT paper (arXiv:2010.11929), equations 1 to 3.
    """
    activation = check_activation("linear", activation)
    check_tensors("linear", x, weight=weight, bias=bias, scale=scale, residual=residual)
    check_same_dtype("linear", x, weight=weight, bias=bias)
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x {list(x.shape)} and weight {list(weight.shape)} do not fit [..., K], [N, K]"
        )
    n = weight.shape[0]
    check_shape("linear", "bias", bias, n)
    check_shape("linear", "scale", scale, n)
    check_shape("linear", "residual", residual, *x.shape[:-1], n)
    op = _linear if uses_triton(x) else linear_reference
    return op(x, weight, bias, activation, scale, residual)
