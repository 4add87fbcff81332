"""softmax(q k^T * scale + mask) v, one block of queries of one head per program.

The keys are read in blocks of BLOCK_N with no mask, then a peeled tail of TAIL keys (16, 32 or
BLOCK_N) that alone is masked: ViT's 197 = 3 * 64 + 5 costs 208 columns, not 256. Scores stay in
base 2: exp(s) = exp2(s * log2 e).

Legend as in `kernel_parts.py`, where matrices in parts and the rotary embedding are.
"""

import triton
import triton.language as tl

from fastvit.kernels.attention.kernel_parts import (
    SIZES,
    add_product,
    aligned,
    find_block,
    load_parts,
    load_turned,
    score,
    start_of,
    store_parts,
    times,
    zero_parts,
)


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_base, v_base, mask_base, angles, rows, start, N, M,
    stride_km, stride_kd, stride_vm, stride_vd, stride_mn, stride_mm,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, D: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Online-softmax step over keys [start, start + KEYS); only the TAIL step masks its keys."""
    keys = start + tl.arange(0, KEYS)
    k = load_turned(
        k_base, keys, stride_km, stride_kd, M, angles, TAIL, ROPE, ACC, D, Q0, Q1, Q2
    )  # fmt: skip
    scores = score(
        q, k, mask_base, rows, keys, N, M, stride_mn, stride_mm, SCALE, HAS_MASK, PRECISION, ACC
    )
    if TAIL:
        scores = tl.where(keys[None, :] < M, scores, -float("inf"))

    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # where a query has seen nothing but -inf, subtract 0: exp2(-inf - 0) is 0, not NaN
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)

    v = load_parts(v_base, keys, stride_vm, stride_vd, M, TAIL, D, D0, D1, D2)
    acc = add_product(times(acc, decay[:, None]), weights, v, PRECISION, ACC)
    return acc, row_sum, new_max


@triton.jit(do_not_specialize=SIZES)
def attention_kernel(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, H, M, D]
    v_ptr,  # [B, H, M, D]
    mask_ptr,  # [B, H, N, M] added to the scores, or None
    cos_ptr,  # [B, H, N - prefix, D // 2], one entry a pair of channels, or None
    sin_ptr,
    cu_ptr,  # [images + 1] int32, or None; then B is 1 and N = M is T
    H, N, M, images, prefix,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_mb, stride_mh, stride_mn, stride_mm,
    stride_ab, stride_ah, stride_an, stride_ad,
    SCALE: tl.constexpr,
    ROPE: tl.constexpr,  # "none", or which channels are pairs: "interleaved", "half"
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    ACC: tl.constexpr,  # dtype of scores, statistics and sums
    ALIGN: tl.constexpr,  # divides every stride of q, k, v and the output but those along D
    D: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,  # the parts of q and k
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,  # the parts of v
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
    TAIL: tl.constexpr,  # keys of the masked last step, 0 if BLOCK_N divides M
    o_ptr,  # [B, H, N, D]
    stat_ptr,  # [2, B, H, N] each query's maximum and 1 / sum of its weights, or None
    stride_ob, stride_oh, stride_on, stride_stat,
):  # fmt: skip
    batch, head, first, tokens, block = find_block(cu_ptr, images, H, N, BLOCK_M)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    HAS_MASK: tl.constexpr = mask_ptr is not None

    stride_qn, stride_km = aligned(stride_qn, ALIGN), aligned(stride_km, ALIGN)
    stride_vm, stride_on = aligned(stride_vm, ALIGN), aligned(stride_on, ALIGN)
    q_base = start_of(q_ptr, batch, head, first, stride_qb, stride_qh, stride_qn, ALIGN)
    k_base = start_of(k_ptr, batch, head, first, stride_kb, stride_kh, stride_km, ALIGN)
    v_base = start_of(v_ptr, batch, head, first, stride_vb, stride_vh, stride_vm, ALIGN)
    o_base = start_of(o_ptr, batch, head, first, stride_ob, stride_oh, stride_on, ALIGN)
    mask_base = start_of(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)
    cos_base = start_of(cos_ptr, batch, head, first, stride_ab, stride_ah, stride_an, 1)
    sin_base = start_of(sin_ptr, batch, head, first, stride_ab, stride_ah, stride_an, 1)
    angles = (cos_base, sin_base, stride_an, stride_ad, prefix)
    stat_base = start_of(stat_ptr, batch, head, first, H * N, N, 1, 1)
    if cu_ptr is not None:
        N, M = tokens, tokens

    q = load_turned(
        q_base, rows, stride_qn, stride_qd, N, angles, True, ROPE, ACC, D, Q0, Q1, Q2
    )  # fmt: skip
    acc = zero_parts(BLOCK_M, D0, D1, D2, ACC)
    row_max = tl.full((BLOCK_M,), -float("inf"), dtype=ACC)
    row_sum = tl.zeros((BLOCK_M,), dtype=ACC)
    full = tl.maximum(M - 1, 0) // BLOCK_N * BLOCK_N if TAIL > 0 else M
    for start in range(0, full, BLOCK_N):
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, k_base, v_base, mask_base, angles, rows, start, N, M,
            stride_km, stride_kd, stride_vm, stride_vd, stride_mn, stride_mm,
            SCALE, HAS_MASK, ROPE, PRECISION, ACC, D, Q0, Q1, Q2, D0, D1, D2, BLOCK_N, False,
        )  # fmt: skip
    if TAIL > 0:
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, k_base, v_base, mask_base, angles, rows, full, N, M,
            stride_km, stride_kd, stride_vm, stride_vd, stride_mn, stride_mm,
            SCALE, HAS_MASK, ROPE, PRECISION, ACC, D, Q0, Q1, Q2, D0, D1, D2, TAIL, True,
        )  # fmt: skip

    # a query that may look nowhere has a sum of 0 and gets zeros
    norm = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    store_parts(o_base, rows, stride_on, times(acc, norm[:, None]), N, D)
    if stat_ptr is not None:
        # and an infinite maximum, with which the backward finds weights of 0
        row_max = tl.where(row_sum == 0.0, float("inf"), row_max)
        tl.store(stat_base + rows, row_max, mask=rows < N)
        tl.store(stat_base + stride_stat + rows, norm, mask=rows < N)
