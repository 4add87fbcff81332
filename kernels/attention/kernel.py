"""softmax(q k^T * scale + mask) v, one block of queries of one head per program; and what the
backward kernels share with it.

The keys are read in blocks of BLOCK_N with no mask, then a peeled tail of TAIL keys (16, 32 or
BLOCK_N) that alone is masked: ViT's 197 = 3 * 64 + 5 costs 208 columns, not 256. Scores stay in
base 2: exp(s) = exp2(s * log2 e).

A head dimension that is no power of two is split in parts (80 = 64 + 16) rather than padded to the
next one; a matrix in such parts is a tuple here. With a rotary embedding the parts of q and k hold
the first or the second members of the pairs of channels that turn together: a product does not
depend on the order of its channels.

Images of different sizes may lie packed in one sequence, one after another: `find_block`.

Legend: B batch, H heads, N queries, M keys, D head dimension, T tokens of all packed images.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastvit.kernels._activations import saturate
from fastvit.kernels._tiles import Matrix, multiply

LOG2E = tl.constexpr(1.4426950408889634)
IMAGES_AT_ONCE = tl.constexpr(128)
# `Sizes` as arguments of a kernel: other ones do not make another kernel, as they would in a tuple
SIZES = ("H", "N", "M", "images", "stride_stat")


class Heads(NamedTuple):
    """[B, H, tokens, D] in memory, from element `start` on."""

    ptr: Any
    start: Any
    stride_b: Any
    stride_h: Any
    stride_n: Any
    stride_d: Any


class Rope(NamedTuple):
    """A rotary embedding: tables [B, H, N - prefix, D // 2] of one entry a pair of channels, with
    the same strides. The first `prefix` tokens of an image do not turn."""

    cos: Any
    sin: Any
    stride_b: Any
    stride_h: Any
    stride_n: Any
    stride_d: Any
    prefix: Any


class Sizes(NamedTuple):
    """Sizes, which differ from call to call; of packed images N = M is T, and B is 1."""

    H: Any
    N: Any
    M: Any
    images: Any
    stride_stat: Any  # from each query's maximum to 1 / its sum


class Form(NamedTuple):
    """Constants that a kernel is compiled for; a tl.constexpr."""

    scale: float
    half: bool  # channel i turns with i + D/2, else 2 i with 2 i + 1
    precision: str  # of float32 products: "ieee" or "tf32"
    acc: Any  # dtype of scores, statistics and sums
    align: int  # divides every stride of q, k, v, the output and gradients but those along D
    d: int
    parts: tuple[tuple[int, int], ...]  # first channel and width of each
    pairs: tuple[tuple[int, int], ...]  # likewise of the pairs of channels that turn


class Place(NamedTuple):
    """Where a program's block of tokens lies."""

    batch: Any
    head: Any
    first: Any  # token of its image
    block: Any  # within the image
    N: Any  # queries and keys of the image
    M: Any


@triton.jit
def find_block(cu_ptr, sizes, tokens, BLOCK: tl.constexpr):
    """The place of a program, of those that do BLOCK of `tokens` (N or M) each. Blocks of one head
    run next to one another and share its keys and values in L2.

    Of packed images (cu_ptr [images + 1]: first token of each, then T) image i has the blocks from
    cu[i] // BLOCK + i on. BLOCK 4, images of 4, 5, 6 tokens: 0 1 | 2 3 | 4 5, and 1 has no tokens.
    """
    pid = tl.program_id(0)
    if cu_ptr is None:
        blocks = tl.cdiv(tokens, BLOCK)
        index = pid // blocks
        batch, head = (index // sizes.H).to(tl.int64), (index % sizes.H).to(tl.int64)
        return Place(batch, head, 0, pid % blocks, sizes.N, sizes.M)
    else:
        blocks = tokens // BLOCK + sizes.images
        block = pid % blocks
        image = -1
        for start in range(0, sizes.images, IMAGES_AT_ONCE):
            some = start + tl.arange(0, IMAGES_AT_ONCE)
            there = some < sizes.images
            first = tl.load(cu_ptr + some, mask=there, other=0) // BLOCK + some
            image += tl.sum(((first <= block) & there).to(tl.int32))
        begin = tl.load(cu_ptr + image)
        found = tl.load(cu_ptr + image + 1) - begin
        block -= begin // BLOCK + image
        found = tl.where(block * BLOCK < found, found, 0)
        batch, head = tl.zeros((), tl.int64), (pid // blocks).to(tl.int64)
        return Place(batch, head, begin.to(tl.int64), block, found, found)


@triton.jit
def _aligned(offset, ALIGN: tl.constexpr):
    """`offset`, a multiple of ALIGN: this shows the compiler how wide a load may be."""
    return offset // ALIGN * ALIGN


@triton.jit
def head_at(heads, at, ALIGN: tl.constexpr):
    """Matrix [tokens, D] of one head of one image; of a mask [N, M]."""
    stride_n = _aligned(heads.stride_n, ALIGN)
    offset = at.batch * heads.stride_b + at.head * heads.stride_h + at.first * stride_n
    return Matrix(heads.ptr + _aligned(offset + heads.start, ALIGN), stride_n, heads.stride_d)


@triton.jit
def rope_at(rope, at):
    """`rope` with the tables of one head of one image."""
    offset = at.batch * rope.stride_b + at.head * rope.stride_h + at.first * rope.stride_n
    cos, sin = rope.cos + offset, rope.sin + offset
    return Rope(cos, sin, 0, 0, rope.stride_n, rope.stride_d, rope.prefix)


@triton.jit
def queries_at(ptr, at, sizes):
    """Where one number for each query of one head of one image lies in [B, H, N]."""
    return ptr + ((at.batch * sizes.H + at.head) * sizes.N + at.first)


@triton.jit
def _load_part(
    x, rows, limit, MASKED: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    END: tl.constexpr,
):  # fmt: skip
    """[rows, WIDTH]: the channels of each row from START on, zero from END on; rows from `limit` on
    are zero where MASKED."""
    cols = START + tl.arange(0, WIDTH)
    ptrs = x.ptr + rows[:, None] * x.stride_m + cols[None, :] * x.stride_n
    if MASKED and START + WIDTH > END:
        return tl.load(ptrs, mask=(rows[:, None] < limit) & (cols[None, :] < END), other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=rows[:, None] < limit, other=0.0)
    elif START + WIDTH > END:
        return tl.load(ptrs, mask=cols[None, :] < END, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_parts(x, rows, limit, MASKED: tl.constexpr, FORM: tl.constexpr):
    """[rows, D] in parts."""
    parts = ()
    for i in tl.static_range(len(FORM.parts)):
        part = _load_part(x, rows, limit, MASKED, FORM.parts[i][0], FORM.parts[i][1], FORM.d)
        parts = parts + (part,)
    return parts


@triton.jit
def zero_parts(ROWS: tl.constexpr, FORM: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(FORM.parts)):
        parts = parts + (tl.full((ROWS, FORM.parts[i][1]), 0.0, dtype=FORM.acc),)
    return parts


@triton.jit
def zeros_like(parts, FORM: tl.constexpr):
    sums = ()
    for i in tl.static_range(len(parts)):
        sums = sums + (tl.zeros(parts[i].shape, dtype=FORM.acc),)
    return sums


@triton.jit
def _store_part(x, rows, limit, values, START: tl.constexpr, END: tl.constexpr):
    cols = START + tl.arange(0, values.shape[1])
    inside = (rows[:, None] < limit) & (cols[None, :] < END)
    ptrs = x.ptr + rows[:, None] * x.stride_m + cols[None, :] * x.stride_n
    if x.ptr.dtype.element_ty == tl.float8e4nv:
        values = saturate(values)
    tl.store(ptrs, values.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_parts(x, rows, limit, parts, FORM: tl.constexpr):
    """The inverse of `load_parts`."""
    for i in tl.static_range(len(FORM.parts)):
        _store_part(x, rows, limit, parts[i], FORM.parts[i][0], FORM.d)


@triton.jit
def _angles(rope, rows, limit, FORM: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Cosine and sine [rows, WIDTH] of the pairs of channels from START on."""
    pairs = START + tl.arange(0, WIDTH)
    at = rows - rope.prefix
    offsets = at[:, None] * rope.stride_n + pairs[None, :] * rope.stride_d
    inside = (at[:, None] >= 0) & (rows[:, None] < limit) & (pairs[None, :] < FORM.d // 2)
    cos = tl.load(rope.cos + offsets, mask=inside, other=1.0).to(FORM.acc)
    return cos, tl.load(rope.sin + offsets, mask=inside, other=0.0).to(FORM.acc)


@triton.jit
def _load_pairs(
    x, rows, limit, rope, MASKED: tl.constexpr, FORM: tl.constexpr, START: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The first and the second members of WIDTH pairs of channels, turned."""
    HALF: tl.constexpr = FORM.d // 2
    if FORM.half:
        a = _load_part(x, rows, limit, MASKED, START, WIDTH, HALF)
        b = _load_part(x, rows, limit, MASKED, HALF + START, WIDTH, FORM.d)
    else:
        both = _load_part(x, rows, limit, MASKED, 2 * START, 2 * WIDTH, FORM.d)
        a, b = tl.split(tl.reshape(both, (rows.shape[0], WIDTH, 2)))
    cos, sin = _angles(rope, rows, limit, FORM, START, WIDTH)
    y, z = a.to(FORM.acc), b.to(FORM.acc)
    return ((y * cos - z * sin).to(a.dtype), (z * cos + y * sin).to(a.dtype))


@triton.jit
def load_turned(x, rows, limit, rope, MASKED: tl.constexpr, FORM: tl.constexpr):
    """`load_parts` of queries or keys, turned where there is a rotary embedding: then each part of
    the pairs gives two."""
    if rope is None:
        return load_parts(x, rows, limit, MASKED, FORM)
    else:
        parts = ()
        for i in tl.static_range(len(FORM.pairs)):
            parts = parts + _load_pairs(
                x, rows, limit, rope, MASKED, FORM, FORM.pairs[i][0], FORM.pairs[i][1]
            )
        return parts


@triton.jit
def store_pairs(x, rows, limit, a, b, FORM: tl.constexpr, START: tl.constexpr):
    """The first and the second members of pairs of channels, from pair START on."""
    HALF: tl.constexpr = FORM.d // 2
    if FORM.half:
        _store_part(x, rows, limit, a, START, HALF)
        _store_part(x, rows, limit, b, HALF + START, FORM.d)
    else:
        both = tl.reshape(tl.join(a, b), (rows.shape[0], 2 * a.shape[1]))
        _store_part(x, rows, limit, both, 2 * START, FORM.d)


@triton.jit
def store_turned_back(x, rows, limit, rope, parts, FORM: tl.constexpr):
    """Store the gradient of what `load_turned` read, from that of what it gave."""
    if rope is None:
        store_parts(x, rows, limit, parts, FORM)
    else:
        for i in tl.static_range(len(FORM.pairs)):
            a, b = parts[2 * i], parts[2 * i + 1]
            cos, sin = _angles(rope, rows, limit, FORM, FORM.pairs[i][0], FORM.pairs[i][1])
            y, z = a * cos + b * sin, b * cos - a * sin
            store_pairs(x, rows, limit, y, z, FORM, FORM.pairs[i][0])


@triton.jit
def product(a, b, FORM: tl.constexpr):
    """a b^T of two matrices in the same parts."""
    PRECISION: tl.constexpr = FORM.precision
    total = tl.zeros((a[0].shape[0], b[0].shape[0]), dtype=FORM.acc)
    for i in tl.static_range(len(a)):
        total = multiply(a[i], tl.trans(b[i]), total, PRECISION)
    return total


@triton.jit
def add_product(acc, weights, values, FORM: tl.constexpr):
    """acc + weights @ values, part by part."""
    PRECISION: tl.constexpr = FORM.precision
    weights = weights.to(values[0].dtype)
    sums = ()
    for i in tl.static_range(len(values)):
        sums = sums + (multiply(weights, values[i], acc[i], PRECISION),)
    return sums


@triton.jit
def times(parts, factor):
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factor,)
    return scaled


@triton.jit
def score(a, b, mask, rows, cols, rows_limit, cols_limit, FORM: tl.constexpr):
    """log2(e) * (a b^T * scale + mask), [rows, cols]. Either of a and b may be the queries."""
    scores = product(a, b, FORM) * (FORM.scale * LOG2E)
    if mask is not None:
        # 64-bit: a mask of 46,341 queries and keys has 2^31 elements
        ptrs = mask.ptr + rows[:, None].to(tl.int64) * mask.stride_m
        ptrs += cols[None, :].to(tl.int64) * mask.stride_n
        inside = (rows[:, None] < rows_limit) & (cols[None, :] < cols_limit)
        if mask.ptr.dtype.element_ty == tl.int1:
            scores = tl.where(tl.load(ptrs, mask=inside, other=0), scores, -float("inf"))
        else:
            bias = tl.load(ptrs, mask=inside, other=0.0).to(FORM.acc)
            # the lowest float stands for "no key", but leaves a query without any a plain average
            bias = tl.where(bias > -float("inf"), tl.maximum(bias, -2e38), bias)
            scores += bias * LOG2E
    return scores


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k, v, mask, rope, rows, start, N, M,
    FORM: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Online-softmax step over keys [start, start + KEYS); only the TAIL step masks its keys."""
    keys = start + tl.arange(0, KEYS)
    scores = score(q, load_turned(k, keys, M, rope, TAIL, FORM), mask, rows, keys, N, M, FORM)
    if TAIL:
        scores = tl.where(keys[None, :] < M, scores, -float("inf"))

    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # where a query has seen nothing but -inf, subtract 0: exp2(-inf - 0) is 0, not NaN
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)

    values = load_parts(v, keys, M, TAIL, FORM)
    return add_product(times(acc, decay[:, None]), weights, values, FORM), row_sum, new_max


@triton.jit(do_not_specialize=SIZES)
def attention_kernel(
    q,  # Heads of N tokens
    k,  # Heads of M tokens
    v,  # Heads of M tokens
    mask,  # Heads [B, H, N, M], values to add to the scores or bool, or None
    rope,  # Rope or None
    cu_ptr,  # of packed images [images + 1] int32, or None
    H, N, M, images, stride_stat,  # `Sizes`
    out,  # Heads of N tokens
    stat_ptr,  # [2, B, H, N] each query's maximum and 1 / sum of its weights, or None
    inv_out_scale,  # multiplies `out` before it is stored as e4m3, or None
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
    TAIL: tl.constexpr,  # keys of the masked last step, 0 if BLOCK_N divides M
):  # fmt: skip
    sizes = Sizes(H, N, M, images, stride_stat)
    at = find_block(cu_ptr, sizes, N, BLOCK_M)
    N, M = at.N, at.M
    rows = at.block * BLOCK_M + tl.arange(0, BLOCK_M)
    k, v = head_at(k, at, FORM.align), head_at(v, at, FORM.align)
    if mask is not None:
        mask = head_at(mask, at, 1)
    if rope is not None:
        rope = rope_at(rope, at)

    queries = load_turned(head_at(q, at, FORM.align), rows, N, rope, True, FORM)
    acc = zero_parts(BLOCK_M, FORM)
    row_max = tl.full((BLOCK_M,), -float("inf"), dtype=FORM.acc)
    row_sum = tl.zeros((BLOCK_M,), dtype=FORM.acc)
    full = tl.maximum(M - 1, 0) // BLOCK_N * BLOCK_N if TAIL > 0 else M
    for start in range(0, full, BLOCK_N):
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, queries, k, v, mask, rope, rows, start, N, M,
            FORM, BLOCK_N, False,
        )  # fmt: skip
    if TAIL > 0:
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, queries, k, v, mask, rope, rows, full, N, M, FORM, TAIL, True
        )

    # a query that may look nowhere has a sum of 0 and gets zeros
    norm = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    factor = norm if inv_out_scale is None else norm * inv_out_scale
    store_parts(head_at(out, at, FORM.align), rows, N, times(acc, factor[:, None]), FORM)
    if stat_ptr is not None:
        # and an infinite maximum, with which the backward finds weights of 0
        row_max = tl.where(row_sum == 0.0, float("inf"), row_max)
        stat = queries_at(stat_ptr, at, sizes)
        tl.store(stat + rows, row_max, mask=rows < N)
        tl.store(stat + sizes.stride_stat + rows, norm, mask=rows < N)
