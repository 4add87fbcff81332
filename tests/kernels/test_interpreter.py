"""The interpreter's bfloat16: every operation our kernels use rounds as PyTorch rounds."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastvit import interpreter

interpreter.install_bfloat16()


def bf16_bits(x: torch.Tensor) -> np.ndarray:
    return x.to(torch.bfloat16).view(torch.uint16).numpy()


def test_narrow_rounds_to_nearest_even():
    """All float32 near a bfloat16 boundary: ties, just below, just above; and special values."""
    high = np.arange(0, 1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = (high[:, None] | low[None, :]).reshape(-1).view(np.float32)
    ours = interpreter.narrow(values)
    truth = bf16_bits(torch.from_numpy(values))
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], truth[~nan])
    assert np.isnan(interpreter.widen(ours[nan])).all()


@triton.jit
def _arithmetic(a_ptr, b_ptr, out_ptr, OP: tl.constexpr):
    i = tl.arange(0, 4096)
    a = tl.load(a_ptr + i)
    b = tl.load(b_ptr + i)
    y = a
    if OP == "add":
        y = a + b
    elif OP == "sub":
        y = a - b
    elif OP == "mul":
        y = a * b
    elif OP == "div":
        y = a / b
    elif OP == "max":
        y = tl.maximum(a, b)
    elif OP == "where":
        y = tl.where(a > b, a, b)
    elif OP == "scale":
        y = a * 0.1
    elif OP == "through float32":
        y = (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16)
    elif OP == "through float16":
        y = a.to(tl.float16).to(tl.bfloat16)
    elif OP == "from int":
        y = i.to(tl.bfloat16)
    tl.store(out_ptr + i, y.to(tl.bfloat16))


TRUTH = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": torch.maximum,
    "where": torch.maximum,
    "scale": lambda a, b: a * torch.tensor(0.1).to(torch.bfloat16),
    "through float32": lambda a, b: (a.float() * b.float()).bfloat16(),
    "through float16": lambda a, b: a.half().bfloat16(),
    "from int": lambda a, b: torch.arange(4096).bfloat16(),
}


@pytest.mark.parametrize("op", TRUTH)
def test_elementwise_is_bitwise_pytorch(op):
    a = torch.randn(4096).bfloat16()
    b = torch.randn(4096).bfloat16()
    out = torch.empty_like(a)
    _arithmetic[(1,)](a, b, out, OP=op)
    np.testing.assert_array_equal(bf16_bits(out), bf16_bits(TRUTH[op](a, b)))


@triton.jit
def _dot_twice(a_ptr, b_ptr, out_ptr):
    i = tl.arange(0, 64)
    at = i[:, None] * 64 + i[None, :]
    a = tl.load(a_ptr + at)
    b = tl.load(b_ptr + at)
    first = (tl.dot(a, b) * 0.125).to(tl.bfloat16)
    tl.store(out_ptr + at, tl.dot(first, b).to(tl.bfloat16))


def test_dot_scale_cast_dot():
    """Both products are exact sums of float32, so only a tie may round apart: none should."""
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    out = torch.empty_like(a)
    _dot_twice[(1,)](a, b, out)
    first = (a.float() @ b.float() * 0.125).bfloat16()
    truth = (first.float() @ b.float()).bfloat16()
    assert (out != truth).sum() <= 1  # a float32 sum in another order may cross one tie


def test_masked_load_pads_with_zero():
    @triton.jit
    def kernel(x_ptr, out_ptr, n):
        i = tl.arange(0, 16)
        x = tl.load(x_ptr + i, mask=i < n, other=0.0)
        tl.store(out_ptr + i, x)

    x, out = torch.randn(16).bfloat16(), torch.empty(16, dtype=torch.bfloat16)
    kernel[(1,)](x, out, 5)
    assert torch.equal(out[:5], x[:5])
    assert not out[5:].any()


@triton.jit
def _to_e4m3_and_back(x_ptr, q_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(q_ptr + i, tl.load(x_ptr + i).to(tl.float8e4nv))
    tl.store(y_ptr + i, tl.load(q_ptr + i).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_e4m3_rounds_to_nearest_even(dtype):
    """Every bfloat16 within +-448 (with it all ties between neighbouring e4m3), and NaN."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    x = torch.zeros(1 << 16, dtype=dtype)
    kept = bits[bits.abs() <= 448]
    x[: len(kept)] = kept.to(dtype)
    x[-1] = float("nan")
    q, y = torch.empty(1 << 16, dtype=torch.float8_e4m3fn), torch.empty(1 << 16)
    _to_e4m3_and_back[(1,)](x, q, y, SIZE=1 << 16)  # pyright: ignore
    truth = x.to(torch.float8_e4m3fn)
    assert torch.equal(q.view(torch.uint8)[:-1], truth.view(torch.uint8)[:-1])
    assert torch.equal(y[:-1], truth.float()[:-1])
    assert y[-1].isnan()
