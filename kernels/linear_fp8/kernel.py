"""What e4m3 operands add to `linear`'s kernel: an epilogue, and a kernel that quantises by itself.

Legend: N output features.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastvit.kernels._activations import activate, saturate
from fastvit.kernels._tiles import of_columns, store
from fastvit.kernels.linear.kernel import Finish, scale_and_add


class FinishFp8(NamedTuple):
    """Operands of `finish_fp8`."""

    finish: Finish
    factor: Any  # [N] float32: x's scale times that of each row of W
    inv_out_scale: Any  # None unless y is e4m3


@triton.jit
def finish_fp8(acc, tile, out, ACTIVATION: tl.constexpr):
    """y = act(acc * factor + b) * scale + residual, over out_scale where y is e4m3"""
    acc *= of_columns(out.factor, tile, acc)
    if out.finish.bias is not None:
        acc += of_columns(out.finish.bias, tile, acc)
    y = scale_and_add(activate(acc, ACTIVATION), tile, out.finish)
    if out.inv_out_scale is not None:
        y = saturate(y * out.inv_out_scale)
    store(out.finish.y, tile, y)


@triton.jit
def quantize_kernel(
    x_ptr,  # [SIZE]
    y_ptr,  # [SIZE] of e4m3
    SIZE, inv_out_scale, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < SIZE, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, saturate(x * inv_out_scale).to(tl.float8e4nv), mask=offsets < SIZE)
