"""softmax(q k^T * scale + mask) v, one block of queries of one head per program.

The keys are read in blocks of BLOCK_N with no mask, then a peeled tail of TAIL keys (16, 32 or
BLOCK_N) that alone is masked: ViT's 197 = 3 * 64 + 5 costs 208 columns, not 256.

A head dimension that is no power of two is split in up to three parts D0 + D1 + D2 (80 = 64 + 16)
rather than padded to the next one. Scores stay in base 2: exp(s) = exp2(s * log2 e).

Legend: B batch, H heads, N queries, M keys, D head dimension.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_part(
    base, rows, stride_row, stride_d, limit, D,
    START: tl.constexpr, WIDTH: tl.constexpr, ROWS_MASKED: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """[rows, WIDTH]: the part of each row's head dimension that begins at START. Only the LAST
    part can reach past D; rows from `limit` on are zero where ROWS_MASKED."""
    cols = START + tl.arange(0, WIDTH)
    ptrs = base + rows[:, None] * stride_row + cols[None, :] * stride_d
    if ROWS_MASKED and LAST:
        return tl.load(ptrs, mask=(rows[:, None] < limit) & (cols[None, :] < D), other=0.0)
    elif ROWS_MASKED:
        return tl.load(ptrs, mask=rows[:, None] < limit, other=0.0)
    elif LAST:
        return tl.load(ptrs, mask=cols[None, :] < D, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _attend(
    acc0, acc1, acc2, row_sum, row_max, q0, q1, q2,
    k_base, v_base, mask_base, rows, start, N, M, D,
    stride_km, stride_kd, stride_vm, stride_vd, stride_mn, stride_mm,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, RAGGED: tl.constexpr,
    KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Online-softmax step over keys [start, start + KEYS); only the TAIL step masks its keys."""
    keys = start + tl.arange(0, KEYS)
    k0 = _load_part(k_base, keys, stride_km, stride_kd, M, D, 0, D0, TAIL, RAGGED and D1 == 0)
    scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION, out_dtype=ACC)
    if D1 > 0:
        k1 = _load_part(k_base, keys, stride_km, stride_kd, M, D, D0, D1, TAIL, RAGGED and D2 == 0)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION, out_dtype=ACC)
    if D2 > 0:
        k2 = _load_part(k_base, keys, stride_km, stride_kd, M, D, D0 + D1, D2, TAIL, RAGGED)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION, out_dtype=ACC)
    scores *= SCALE * LOG2E
    if HAS_MASK:
        mask_ptrs = mask_base + rows[:, None] * stride_mn + keys[None, :] * stride_mm
        inside = (rows[:, None] < N) & (keys[None, :] < M)
        scores += tl.load(mask_ptrs, mask=inside, other=0.0).to(ACC) * LOG2E
    if TAIL:
        scores = tl.where(keys[None, :] < M, scores, -float("inf"))

    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # where a query has seen nothing but -inf, subtract 0: exp2(-inf - 0) is 0, not NaN
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)

    v0 = _load_part(v_base, keys, stride_vm, stride_vd, M, D, 0, D0, TAIL, RAGGED and D1 == 0)
    w = weights.to(v0.dtype)
    acc0 = tl.dot(w, v0, acc0 * decay[:, None], input_precision=PRECISION, out_dtype=ACC)
    if D1 > 0:
        v1 = _load_part(v_base, keys, stride_vm, stride_vd, M, D, D0, D1, TAIL, RAGGED and D2 == 0)
        acc1 = tl.dot(w, v1, acc1 * decay[:, None], input_precision=PRECISION, out_dtype=ACC)
    if D2 > 0:
        v2 = _load_part(v_base, keys, stride_vm, stride_vd, M, D, D0 + D1, D2, TAIL, RAGGED)
        acc2 = tl.dot(w, v2, acc2 * decay[:, None], input_precision=PRECISION, out_dtype=ACC)
    return acc0, acc1, acc2, row_sum, new_max


@triton.jit
def _store_part(
    base, rows, stride_row, values, N, D, START: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    cols = START + tl.arange(0, WIDTH)
    inside = (rows[:, None] < N) & (cols[None, :] < D)
    ptrs = base + rows[:, None] * stride_row + cols[None, :]
    tl.store(ptrs, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def attention_kernel(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, H, M, D]
    v_ptr,  # [B, H, M, D]
    mask_ptr,  # [B, H, N, M] added to the scores, or None
    o_ptr,  # [B, N, H, D]
    H,
    N,
    M,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_mb, stride_mh, stride_mn, stride_mm,
    stride_ob, stride_on, stride_oh,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    ACC: tl.constexpr,  # dtype of scores, statistics and sums
    ALIGN: tl.constexpr,  # divides every stride but those along D
    D: tl.constexpr,
    D0: tl.constexpr,  # the parts of D; D1 and D2 may be 0
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
    TAIL: tl.constexpr,  # keys of the masked last step, 0 if BLOCK_N divides M
):  # fmt: skip
    # query blocks of one head run next to one another and share its keys and values in L2
    blocks = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    head_index = pid // blocks
    batch = (head_index // H).to(tl.int64)
    head = (head_index % H).to(tl.int64)
    rows = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    RAGGED: tl.constexpr = D0 + D1 + D2 != D
    HAS_MASK: tl.constexpr = mask_ptr is not None

    # // ALIGN * ALIGN changes no value: it shows the compiler how wide a load may be
    q_base = q_ptr + (batch * stride_qb + head * stride_qh) // ALIGN * ALIGN
    k_base = k_ptr + (batch * stride_kb + head * stride_kh) // ALIGN * ALIGN
    v_base = v_ptr + (batch * stride_vb + head * stride_vh) // ALIGN * ALIGN
    o_base = o_ptr + (batch * stride_ob + head * stride_oh) // ALIGN * ALIGN
    stride_qn = stride_qn // ALIGN * ALIGN
    stride_km = stride_km // ALIGN * ALIGN
    stride_vm = stride_vm // ALIGN * ALIGN
    stride_on = stride_on // ALIGN * ALIGN
    mask_base = mask_ptr
    if HAS_MASK:
        mask_base = mask_ptr + batch * stride_mb + head * stride_mh

    q0 = _load_part(q_base, rows, stride_qn, stride_qd, N, D, 0, D0, True, RAGGED and D1 == 0)
    acc0 = tl.zeros((BLOCK_M, D0), dtype=ACC)
    q1, q2, acc1, acc2 = q0, q0, 0.0, 0.0  # unused where the part is not there
    if D1 > 0:
        q1 = _load_part(q_base, rows, stride_qn, stride_qd, N, D, D0, D1, True, RAGGED and D2 == 0)
        acc1 = tl.zeros((BLOCK_M, D1), dtype=ACC)
    if D2 > 0:
        q2 = _load_part(q_base, rows, stride_qn, stride_qd, N, D, D0 + D1, D2, True, RAGGED)
        acc2 = tl.zeros((BLOCK_M, D2), dtype=ACC)
    row_max = tl.full((BLOCK_M,), -float("inf"), dtype=ACC)
    row_sum = tl.zeros((BLOCK_M,), dtype=ACC)

    full = M // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        acc0, acc1, acc2, row_sum, row_max = _attend(
            acc0, acc1, acc2, row_sum, row_max, q0, q1, q2,
            k_base, v_base, mask_base, rows, start, N, M, D,
            stride_km, stride_kd, stride_vm, stride_vd, stride_mn, stride_mm,
            SCALE, HAS_MASK, PRECISION, ACC, D0, D1, D2, RAGGED, BLOCK_N, False,
        )  # fmt: skip
    if TAIL > 0:
        acc0, acc1, acc2, row_sum, row_max = _attend(
            acc0, acc1, acc2, row_sum, row_max, q0, q1, q2,
            k_base, v_base, mask_base, rows, full, N, M, D,
            stride_km, stride_kd, stride_vm, stride_vd, stride_mn, stride_mm,
            SCALE, HAS_MASK, PRECISION, ACC, D0, D1, D2, RAGGED, TAIL, True,
        )  # fmt: skip

    # a query that may look nowhere has a sum of 0 and gets zeros
    norm = (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    _store_part(o_base, rows, stride_on, acc0 * norm, N, D, 0, D0)
    if D1 > 0:
        _store_part(o_base, rows, stride_on, acc1 * norm, N, D, D0, D1)
    if D2 > 0:
        _store_part(o_base, rows, stride_on, acc2 * norm, N, D, D0 + D1, D2)
