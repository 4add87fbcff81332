"""The ops that read or write e4m3: registration, public functions."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels._checks import check_floats, check_out_scale, check_shapes
from fastvit.kernels._launch import run_to_output
from fastvit.kernels._register import define_op
from fastvit.kernels.attention import op as attention
from fastvit.kernels.layer_norm.op import check_layer_norm
from fastvit.kernels.linear.op import check_epilogue, product_flops
from fastvit.kernels.linear_fp8 import launch, reference
from fastvit.kernels.linear_fp8.reference import E4M3


def _check_linear(
    x: Any, weight: Any, factor: Any, bias: Any, scale: Any, residual: Any, activation: str,
    out_scale: float | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    op = "fp8_linear"
    check_epilogue(op, activation, None)
    wanted = {"x": (x, E4M3), "weight": (weight, E4M3), "factor": (factor, torch.float32)}
    for name, (tensor, expected) in wanted.items():
        if tensor.dtype != expected:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {expected}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: dtype is {dtype}; results are bfloat16 or float16")
    check_floats(op, bias=bias, scale=scale, residual=residual)
    check_out_scale(op, out_scale)
    check_shapes(
        op, x=(x, "... K"), weight=(weight, "N K"), factor=(factor, "N"), bias=(bias, "N"),
        scale=(scale, "N"), residual=(residual, "... N"),
    )  # fmt: skip


def _check_scaled(op: str, check: Callable[..., None], *args: Any) -> None:
    """`check` of all but the last argument, which is `out_scale`."""
    check(op, *args[:-1])
    check_out_scale(op, args[-1])


_fp8_linear = define_op(
    "fp8_linear",
    "Tensor x, Tensor weight, Tensor factor, Tensor? bias, Tensor? scale, Tensor? residual, "
    "str activation, float? out_scale, ScalarType dtype",
    _check_linear, launch.prepare, run_to_output, flops=product_flops,
    eager=reference.fp8_linear_reference,
    fake=lambda x, weight, *rest: x.new_empty(
        (*x.shape[:-1], weight.shape[0]), dtype=rest[-1] if rest[-2] is None else E4M3
    ),
)  # fmt: skip
_fp8_layer_norm = define_op(
    "fp8_layer_norm", "Tensor x, Tensor? weight, Tensor? bias, float eps, float out_scale",
    functools.partial(_check_scaled, "fp8_layer_norm", lambda *args: check_layer_norm(*args[:4])),
    launch.prepare_norm, run_to_output, eager=reference.fp8_layer_norm_reference,
    fake=lambda x, *rest: x.new_empty(x.shape, dtype=E4M3),
)  # fmt: skip
_fp8_attention = define_op(
    "fp8_attention", f"{attention.ARGUMENTS}, float out_scale",
    functools.partial(_check_scaled, "fp8_attention", attention.check_attention),
    attention.prepare, attention.run, flops=attention.attention_flops,
    eager=lambda *a: reference.fp8_quantize_reference(attention.eager_attention(*a[:-1]), a[-1]),
    fake=lambda *args: torch.empty_like(attention.fake_attention(*args), dtype=E4M3),
)  # fmt: skip
_fp8_quantize = define_op(
    "fp8_quantize", "Tensor x, float out_scale",
    functools.partial(_check_scaled, "fp8_quantize", lambda op, x: check_floats(op, x=x)),
    launch.prepare_quantize, run_to_output, eager=reference.fp8_quantize_reference,
    fake=lambda x, *rest: x.new_empty(x.shape, dtype=E4M3),
)  # fmt: skip


def fp8_linear(
    x: Tensor, weight: Tensor, factor: Tensor, bias: Tensor | None = None, *,
    activation: str | None = None, scale: Tensor | None = None, residual: Tensor | None = None,
    out_scale: float | None = None, dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """`linear` of e4m3 operands: act((x W^T) * factor + b) * scale + residual.

    Args:
        x: [..., K] of torch.float8_e4m3fn.
        weight: [N, K] of torch.float8_e4m3fn.
        factor: float32 [N], x's scale times that of each row of weight.
        bias, activation, scale, residual: as in `linear`, of any floating dtypes.
        out_scale: divide the result by it and store it as e4m3, beyond +-448 as +-448.
        dtype: of the result without `out_scale`, bfloat16 or float16. A float32 result would
            promise digits that the sums do not have: on sm_90 the tensor core adds e4m3 products
            in about 14 bits.

    Returns:
        [..., N] of `dtype`, or of torch.float8_e4m3fn with `out_scale`.

    Raises:
        TypeError: operands that are not e4m3, a factor that is not float32, another `dtype`.
        ValueError: shapes or devices that do not fit, an unknown activation.
        RuntimeError: a GPU without this e4m3 (before sm_89, AMD's).

    Source: FP8 Formats for Deep Learning (arXiv:2209.05433).
    """
    tensors = (x, weight, factor, bias, scale, residual)
    name = "none" if activation is None else activation
    return _fp8_linear.apply(tensors, name, out_scale, dtype)


def fp8_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, *, out_scale: float
) -> Tensor:
    """`layer_norm` over `out_scale`, stored as e4m3; beyond +-448 as +-448, NaN as NaN.

    Args:
        x, weight, bias, eps: as in `layer_norm`.
        out_scale: what the result is to be multiplied by later, positive.

    Returns:
        Contiguous [..., D] of torch.float8_e4m3fn.

    Raises:
        TypeError, ValueError: as `layer_norm`, and an `out_scale` that is not positive.
        RuntimeError: a GPU without this e4m3 (before sm_89, AMD's).
    """
    return _fp8_layer_norm.apply((x, weight, bias), eps, out_scale)


def fp8_attention(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, attn_mask: Tensor | None = None, *,
    num_heads: int = 0, scale: float | None = None, rope: tuple[Tensor, Tensor] | None = None,
    rotate_half: bool = False, out_scale: float,
) -> Tensor:  # fmt: skip
    """`attention` of q, k and v, or `attention_qkv` of q alone, [B, N, 3*H*d], over `out_scale`,
    stored as e4m3: contiguous [B, N, H*d]. Values and errors as of `fp8_layer_norm` too."""
    tensors = (q, k, v, attn_mask, *(rope or (None, None)), None)
    out = _fp8_attention.apply(tensors, num_heads, 0, scale, rotate_half, out_scale)
    return out if k is None else out.flatten(2)


def fp8_quantize(x: Tensor, *, out_scale: float) -> Tensor:
    """x [..., D] over `out_scale` as e4m3, contiguous; values and errors as `fp8_layer_norm`'s."""
    return _fp8_quantize.apply((x,), out_scale)
