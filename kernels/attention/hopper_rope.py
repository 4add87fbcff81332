"""q and k turned by a rotary embedding, for Hopper's attention, which reads them as they are: its
queries and keys go from memory to the tensor cores with no register between. In plain Triton.

Legend: B batch, H heads, N queries and keys, D head dimension.
"""

import triton
import triton.language as tl

from fastvit.kernels.attention.kernel import (
    SIZES,
    Sizes,
    find_block,
    head_at,
    load_turned,
    rope_at,
    store_pairs,
)


@triton.jit
def _turn(x, y, at, rows, rope, FORM: tl.constexpr):
    parts = load_turned(head_at(x, at, FORM.align), rows, at.N, rope, True, FORM)
    y = head_at(y, at, FORM.align)
    for i in tl.static_range(len(FORM.pairs)):
        store_pairs(y, rows, at.N, parts[2 * i], parts[2 * i + 1], FORM, FORM.pairs[i][0])


@triton.jit(do_not_specialize=SIZES)
def turn_kernel(
    q, k, v,  # Heads of N tokens; v is not read
    mask,  # not read
    rope,  # Rope
    cu_ptr,  # None: no packed images
    H, N, M, images, stride_stat,  # `Sizes`
    turned_q, turned_k,  # Heads of N tokens
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens of one head
):  # fmt: skip
    """The rotation is in float32 and rounded once, as the portable kernel's."""
    at = find_block(cu_ptr, Sizes(H, N, M, images, stride_stat), N, BLOCK)
    rows = at.block * BLOCK + tl.arange(0, BLOCK)
    rope = rope_at(rope, at)
    _turn(q, turned_q, at, rows, rope, FORM)
    _turn(k, turned_k, at, rows, rope, FORM)
