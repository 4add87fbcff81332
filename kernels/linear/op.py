"""`linear`: launcher, registration, public function."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_shape, check_tensors
from fastvit.kernels._device import architecture, multiprocessors
from fastvit.kernels._library import define_op, launch, uses_triton
from fastvit.kernels._tuning import TileConfig, cdiv, lookup
from fastvit.kernels.linear.reference import ACTIVATIONS, linear_reference

GROUP_M = 8
PORTABLE = TileConfig(64, 64, BLOCK_K=32)  # for operands that a table's ``tma`` cannot read


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
    """The Triton path; arguments as in `linear`, [..., K] to a contiguous [..., N].

    The tuning table chooses a backend with the tile: ``cublas`` is PyTorch's own product with its
    epilogue in separate passes, ``tma`` and the portable ``""`` are ours.
    """
    import triton.language as tl

    from fastvit.kernels.linear.kernel import linear_kernel, linear_tma_kernel

    n, k = weight.shape
    m = math.prod(x.shape[:-1])
    tile = lookup("linear", architecture(x.device), x.dtype, M=m, N=n, K=k)
    if tile.backend == "cublas":
        return linear_reference(x, weight, bias, activation, scale, residual).contiguous()
    y = x.new_empty(*x.shape[:-1], n, dtype=result_dtype(x, scale, residual))
    if y.numel() == 0:
        return y
    x2 = x.reshape(-1, k)
    if activation == "gelu" and y.dtype == torch.bfloat16:
        activation = "gelu_polynomial"
    residual2 = None if residual is None else residual.reshape(-1, n)
    if tile.backend == "tma" and not (_fits_tma(x2) and _fits_tma(weight)):
        tile = PORTABLE
    programs = cdiv(m, tile.BLOCK_M) * cdiv(n, tile.BLOCK_N)
    common: dict[str, Any] = {
        "bias_ptr": None if bias is None else bias.contiguous(),
        "scale_ptr": None if scale is None else scale.contiguous(),
        "residual_ptr": residual2,
        "y_ptr": y,
        "M": m,
        "N": n,
        "K": k,
        "stride_rm": 0 if residual2 is None else residual2.stride(0),
        "stride_rn": 0 if residual2 is None else residual2.stride(1),
        "stride_ym": n,
        "ACTIVATION": activation,
        "GROUP_M": GROUP_M,
        "SUBTILES": tile.subtiles,
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": tile.BLOCK_K,
    }
    if tile.backend == "tma":
        from triton.tools.tensor_descriptor import TensorDescriptor

        if tile.persistent:
            programs = min(programs, tile.persistent * multiprocessors(x.device))
        launch(
            linear_tma_kernel,
            programs,
            tile,
            PERSISTENT=tile.persistent > 0,
            x_desc=TensorDescriptor.from_tensor(x2, [tile.BLOCK_M, tile.BLOCK_K]),
            weight_desc=TensorDescriptor.from_tensor(weight, [tile.BLOCK_N, tile.BLOCK_K]),
            **common,
        )
        return y
    launch(
        linear_kernel,
        programs,
        tile,
        x_ptr=x2,
        weight_ptr=weight,
        stride_xm=x2.stride(0),
        stride_xk=x2.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        PRECISION=float32_precision(x.dtype),
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        EVEN_K=k % tile.BLOCK_K == 0,
        **common,
    )
    return y


def _fits_tma(matrix: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it: 16-byte rows, last dimension packed."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return (
        matrix.numel() > 0
        and matrix.stride(1) == 1
        and row_bytes % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


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
    flops=lambda x, weight, *rest: 2 * math.prod(x[:-1]) * weight[0] * weight[1],
    autocast=("x", "weight", "bias"),
)


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
        activation: ``gelu`` (exact erf; where the result is bfloat16, a polynomial within 4e-5 of
            it, see `kernels/_epilogue.py`), ``gelu_tanh``, ``quick_gelu``, ``silu``, ``relu`` or
            None.
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
