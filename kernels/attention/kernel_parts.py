"""What the forward and the backward kernels share: which tokens a program does, how it loads and
stores them, and the scores.

A head dimension that is no power of two is split in up to three parts D0 + D1 + D2 (80 = 64 + 16)
rather than padded to the next one; a matrix in such parts is a tuple here.

With a rotary embedding the parts of q and k hold the first or the second members of the pairs of
channels that turn together: a product does not depend on the order of its channels.

Images of different sizes may lie packed in one sequence, one after another: `find_block`.

Legend: B batch, H heads, N queries, M keys, D head dimension, T tokens of all packed images.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
IMAGES_AT_ONCE = tl.constexpr(128)
# what differs from image to image does not make another kernel
SIZES = ("N", "M", "images", "prefix", "stride_stat")


@triton.jit
def find_block(cu_ptr, images, H, N, BLOCK: tl.constexpr):
    """Where a program's block of tokens lies: (batch, head, first token of its image, tokens of its
    image, block within the image). Blocks of one head run next to one another and share its keys
    and values in L2.

    Of packed images (cu_ptr [images + 1]: where each begins, then N) image i gets the blocks from
    cu[i] // BLOCK + i on: enough for its tokens, and at most one more, which finds 0 tokens.
    """
    pid = tl.program_id(0)
    if cu_ptr is None:
        blocks = tl.cdiv(N, BLOCK)
        index = pid // blocks
        return (index // H).to(tl.int64), (index % H).to(tl.int64), 0, N, pid % blocks
    else:
        blocks = N // BLOCK + images
        block = pid % blocks
        image = -1
        for start in range(0, images, IMAGES_AT_ONCE):
            some = start + tl.arange(0, IMAGES_AT_ONCE)
            first = tl.load(cu_ptr + some, mask=some < images, other=0) // BLOCK + some
            image += tl.sum(((first <= block) & (some < images)).to(tl.int32))
        begin = tl.load(cu_ptr + image)
        tokens = tl.load(cu_ptr + image + 1) - begin
        block -= begin // BLOCK + image
        tokens = tl.where(block * BLOCK < tokens, tokens, 0)
        head = (pid // blocks).to(tl.int64)
        return tl.zeros((), tl.int64), head, begin.to(tl.int64), tokens, block


@triton.jit
def aligned(offset, ALIGN: tl.constexpr):
    """`offset`, a multiple of ALIGN: this shows the compiler how wide a load may be."""
    return offset // ALIGN * ALIGN


@triton.jit
def start_of(
    ptr, batch, head, first, stride_b, stride_h, stride_n, ALIGN: tl.constexpr
):  # fmt: skip
    """Where the tokens of one head of one image begin; 0 where there are none."""
    if ptr is None:
        return 0
    else:
        return ptr + aligned(batch * stride_b + head * stride_h + first * stride_n, ALIGN)


# --------------------------------------------------------------------------- parts


@triton.jit
def _load_part(
    base, rows, stride_row, stride_d, limit,
    START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, ROWS_MASKED: tl.constexpr,
):  # fmt: skip
    """[rows, WIDTH]: the channels of each row from START on, zero from END on; rows from `limit` on
    are zero where ROWS_MASKED."""
    cols = START + tl.arange(0, WIDTH)
    ptrs = base + rows[:, None] * stride_row + cols[None, :] * stride_d
    if ROWS_MASKED and START + WIDTH > END:
        return tl.load(ptrs, mask=(rows[:, None] < limit) & (cols[None, :] < END), other=0.0)
    elif ROWS_MASKED:
        return tl.load(ptrs, mask=rows[:, None] < limit, other=0.0)
    elif START + WIDTH > END:
        return tl.load(ptrs, mask=cols[None, :] < END, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_parts(
    base, rows, stride_row, stride_d, limit, ROWS_MASKED: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """[rows, D] in parts."""
    parts = (_load_part(base, rows, stride_row, stride_d, limit, 0, D0, D, ROWS_MASKED),)
    if D1 > 0:
        part = _load_part(base, rows, stride_row, stride_d, limit, D0, D1, D, ROWS_MASKED)
        parts = parts + (part,)
    if D2 > 0:
        part = _load_part(base, rows, stride_row, stride_d, limit, D0 + D1, D2, D, ROWS_MASKED)
        parts = parts + (part,)
    return parts


@triton.jit
def zero_parts(
    ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr
):
    parts = (tl.zeros((ROWS, D0), dtype=ACC),)
    if D1 > 0:
        parts = parts + (tl.zeros((ROWS, D1), dtype=ACC),)
    if D2 > 0:
        parts = parts + (tl.zeros((ROWS, D2), dtype=ACC),)
    return parts


@triton.jit
def _store_part(base, rows, stride_row, values, limit, START: tl.constexpr, END: tl.constexpr):
    cols = START + tl.arange(0, values.shape[1])
    inside = (rows[:, None] < limit) & (cols[None, :] < END)
    ptrs = base + rows[:, None] * stride_row + cols[None, :]
    tl.store(ptrs, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_parts(base, rows, stride_row, parts, limit, D: tl.constexpr):
    """The inverse of `load_parts`, to channels that are next to one another in memory."""
    _store_part(base, rows, stride_row, parts[0], limit, 0, D)
    if len(parts) > 1:
        _store_part(base, rows, stride_row, parts[1], limit, parts[0].shape[1], D)
    if len(parts) > 2:
        start: tl.constexpr = parts[0].shape[1] + parts[1].shape[1]
        _store_part(base, rows, stride_row, parts[2], limit, start, D)


# --------------------------------------------------------------------------- rotary


@triton.jit
def _angles(
    angles, rows, limit, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Cosine and sine [rows, WIDTH] of the pairs of channels from START on; the first `prefix`
    tokens of an image do not turn."""
    cos_base, sin_base, stride_n, stride_d, prefix = angles
    pairs = START + tl.arange(0, WIDTH)
    at = rows - prefix
    offsets = at[:, None] * stride_n + pairs[None, :] * stride_d
    inside = (at[:, None] >= 0) & (rows[:, None] < limit) & (pairs[None, :] < D // 2)
    cos = tl.load(cos_base + offsets, mask=inside, other=1.0).to(ACC)
    return cos, tl.load(sin_base + offsets, mask=inside, other=0.0).to(ACC)


@triton.jit
def _load_turned_part(
    base, rows, stride_row, stride_d, limit, angles, ROWS_MASKED: tl.constexpr, ROPE: tl.constexpr,
    ACC: tl.constexpr, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The first and the second members of WIDTH pairs of channels, turned."""
    if ROPE == "half":
        a = _load_part(base, rows, stride_row, stride_d, limit, START, WIDTH, D // 2, ROWS_MASKED)
        b = _load_part(
            base, rows, stride_row, stride_d, limit, D // 2 + START, WIDTH, D, ROWS_MASKED
        )
    else:
        x = _load_part(
            base, rows, stride_row, stride_d, limit, 2 * START, 2 * WIDTH, D, ROWS_MASKED
        )
        a, b = tl.split(tl.reshape(x, (rows.shape[0], WIDTH, 2)))
    cos, sin = _angles(angles, rows, limit, D, START, WIDTH, ACC)
    x, y = a.to(ACC), b.to(ACC)
    return ((x * cos - y * sin).to(a.dtype), (y * cos + x * sin).to(a.dtype))


@triton.jit
def load_turned(
    base, rows, stride_row, stride_d, limit, angles, ROWS_MASKED: tl.constexpr, ROPE: tl.constexpr,
    ACC: tl.constexpr, D: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
):  # fmt: skip
    """`load_parts` of queries or keys, turned where there is a rotary embedding: then Q0 + Q1 + Q2
    covers the pairs, and each gives two parts."""
    if ROPE == "none":
        return load_parts(base, rows, stride_row, stride_d, limit, ROWS_MASKED, D, Q0, Q1, Q2)
    else:
        parts = _load_turned_part(
            base, rows, stride_row, stride_d, limit, angles, ROWS_MASKED, ROPE, ACC, D, 0, Q0
        )  # fmt: skip
        if Q1 > 0:
            parts = parts + _load_turned_part(
                base, rows, stride_row, stride_d, limit, angles, ROWS_MASKED, ROPE, ACC, D, Q0, Q1
            )  # fmt: skip
        if Q2 > 0:
            parts = parts + _load_turned_part(
                base, rows, stride_row, stride_d, limit, angles, ROWS_MASKED, ROPE, ACC, D,
                Q0 + Q1, Q2,
            )  # fmt: skip
        return parts


@triton.jit
def zero_turned(
    ROWS: tl.constexpr, ROPE: tl.constexpr, ACC: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
):  # fmt: skip
    """Zeros in the parts of `load_turned`."""
    if ROPE == "none":
        return zero_parts(ROWS, Q0, Q1, Q2, ACC)
    else:
        parts = (tl.zeros((ROWS, Q0), dtype=ACC), tl.zeros((ROWS, Q0), dtype=ACC))
        if Q1 > 0:
            parts = parts + (tl.zeros((ROWS, Q1), dtype=ACC), tl.zeros((ROWS, Q1), dtype=ACC))
        if Q2 > 0:
            parts = parts + (tl.zeros((ROWS, Q2), dtype=ACC), tl.zeros((ROWS, Q2), dtype=ACC))
        return parts


@triton.jit
def _store_turned_back_part(
    base, rows, stride_row, a, b, limit, angles,
    ROPE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = a.shape[1]
    cos, sin = _angles(angles, rows, limit, D, START, WIDTH, ACC)
    x, y = a * cos + b * sin, b * cos - a * sin
    if ROPE == "half":
        _store_part(base, rows, stride_row, x, limit, START, D // 2)
        _store_part(base, rows, stride_row, y, limit, D // 2 + START, D)
    else:
        both = tl.reshape(tl.join(x, y), (rows.shape[0], 2 * WIDTH))
        _store_part(base, rows, stride_row, both, limit, 2 * START, D)


@triton.jit
def store_turned_back(
    base, rows, stride_row, parts, limit, angles, ROPE: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
):  # fmt: skip
    """Store the gradient of what `load_turned` read, from that of what it gave."""
    if ROPE == "none":
        store_parts(base, rows, stride_row, parts, limit, D)
    else:
        _store_turned_back_part(
            base, rows, stride_row, parts[0], parts[1], limit, angles, ROPE, ACC, D, 0
        )  # fmt: skip
        if Q1 > 0:
            _store_turned_back_part(
                base, rows, stride_row, parts[2], parts[3], limit, angles, ROPE, ACC, D, Q0
            )  # fmt: skip
        if Q2 > 0:
            _store_turned_back_part(
                base, rows, stride_row, parts[4], parts[5], limit, angles, ROPE, ACC, D, Q0 + Q1
            )  # fmt: skip


# --------------------------------------------------------------------------- products


@triton.jit
def product(a, b, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a b^T of two matrices in the same parts."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION, out_dtype=ACC)
    for i in tl.static_range(1, len(a)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def score(
    a, b, mask_base, rows, cols, rows_limit, cols_limit, stride_row, stride_col,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """log2(e) * (a b^T * scale + mask), [rows, cols]. Either of a and b may be the queries."""
    scores = product(a, b, PRECISION, ACC) * (SCALE * LOG2E)
    if HAS_MASK:
        mask_ptrs = mask_base + rows[:, None] * stride_row + cols[None, :] * stride_col
        inside = (rows[:, None] < rows_limit) & (cols[None, :] < cols_limit)
        bias = tl.load(mask_ptrs, mask=inside, other=0.0).to(ACC)
        # the lowest float stands for "no key", but leaves a query without any a plain average
        scores += tl.where(bias > -float("inf"), tl.maximum(bias, -2e38), bias) * LOG2E
    return scores


@triton.jit
def add_product(acc, weights, values, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """acc + weights @ values, part by part."""
    w = weights.to(values[0].dtype)
    sums = ()
    for i in tl.static_range(len(values)):
        part = tl.dot(w, values[i], acc[i], input_precision=PRECISION, out_dtype=ACC)
        sums = sums + (part,)
    return sums


@triton.jit
def times(parts, factor):
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factor,)
    return scaled
