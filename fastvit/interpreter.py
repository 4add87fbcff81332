"""bfloat16 and float8 (e4m3) under Triton's interpreter.

The interpreter keeps bfloat16 as 16 raw bits and computes on those bits, so products and sums come
out as garbage and conversions truncate. Here bfloat16 values are widened to float32 for every
operation and rounded back to nearest even, which is what a GPU does. It truncates conversions to
e4m3 and reads its NaN as 480; here PyTorch converts. Tested bit by bit in
`tests/kernels/test_interpreter.py`; a launch in the interpreter installs it.
"""

import functools
import re
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest even bfloat16, as bits (uint16); NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def widen_e4m3(bits: np.ndarray) -> np.ndarray:
    """e4m3 bits (uint8) as float32."""
    bits = np.ascontiguousarray(bits)
    return torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()


def narrow_e4m3(values: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest even e4m3, as bits (uint8); kernels keep within +-448."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _is_bf16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _wide(value: Any) -> Any:
    if isinstance(value, TensorHandle) and value.dtype.scalar == tl.float8e4nv:
        return TensorHandle(widen_e4m3(value.data), tl.float32)
    return TensorHandle(widen(value.data), tl.float32) if _is_bf16(value) else value


def _through_float32(method: Any) -> Any:
    """`method` on float32 copies of its bfloat16 operands; a bfloat16 result if all floats were."""

    @functools.wraps(method)
    def wrapped(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
        if not any(_is_bf16(arg) for arg in args):
            return method(self, *args, **kwargs)
        result = method(self, *map(_wide, args), **kwargs)
        if isinstance(result, TensorHandle) and result.data.dtype == np.float32:
            return TensorHandle(narrow(result.data), tl.bfloat16)
        return result

    return wrapped


def _cast(original: Any) -> Any:
    @functools.wraps(original)
    def cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return TensorHandle(src.data, target)
        if source in (tl.bfloat16, tl.float8e4nv):
            return cast_impl(self, _wide(src), dst_type)
        if target == tl.bfloat16:
            return TensorHandle(narrow(src.data.astype(np.float32)), tl.bfloat16)
        if target == tl.float8e4nv:
            return TensorHandle(narrow_e4m3(src.data), tl.float8e4nv)
        return original(self, src, dst_type)

    return cast_impl


def _fp_to_fp(original: Any, cast_impl: Any) -> Any:
    @functools.wraps(original)
    def create_fp_to_fp(
        self: InterpreterBuilder, src: TensorHandle, dst_type: Any, mode: Any
    ) -> TensorHandle:
        if {tl.bfloat16, tl.float8e4nv} & {src.dtype.scalar, dst_type.scalar}:
            return cast_impl(self, src, dst_type)
        return original(self, src, dst_type, mode)

    return create_fp_to_fp


def _chain(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + a b by multiply-adds of float32 one after another, as GPUs take exact ones: then a
    product of other tiles, or transposed, has the same bits. BLAS gives it others."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[1]):
        total = (total + a[:, k, None] * b[k]).astype(np.float32)
    return total


def _dot(original: Any) -> Any:
    @functools.wraps(original)
    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle,
        input_precision: Any, max_num_imprecise_acc: Any,
    ) -> TensorHandle:  # fmt: skip
        if a.dtype.scalar == tl.float32:
            return TensorHandle(_chain(a.data, b.data, d.data), d.dtype.scalar)
        # products of bfloat16 and e4m3 are exact in float32, which also holds the sum
        return original(self, _wide(a), _wide(b), d, input_precision, max_num_imprecise_acc)

    return create_dot


@functools.cache
def install_bfloat16() -> None:
    """Teach this process's interpreter bfloat16. Does nothing the second time."""
    builder: Any = InterpreterBuilder
    cast_impl = _cast(builder.cast_impl)
    builder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast_impl)
    builder.create_fp_to_fp = _fp_to_fp(builder.create_fp_to_fp, cast_impl)
    builder.get_bf16 = lambda self, value: TensorHandle(
        narrow(np.array([value], dtype=np.float32)), tl.bfloat16
    )
    builder.create_dot = _dot(builder.create_dot)
    floats = "f(add|sub|mul|div|rem|neg|ma|abs|cmp.*)|m(in|ax)(imum|num)f|exp2?|log2?|r?sqrt|erf"
    for name in filter(re.compile(f"create_({floats})").fullmatch, dir(builder)):
        setattr(builder, name, _through_float32(getattr(builder, name)))
