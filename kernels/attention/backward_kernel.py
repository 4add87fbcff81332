"""Gradients of attention in two phases: queries, then keys and values. No atomics, so the same
input gives the same bits. A third kernel sums the gradient of a bias that is added to the scores.

With weights P = softmax(S), the output O = P V and its gradient G:

    dV = P^T G    dP = G V^T    dS = P * (dP - delta), delta = rowsum(G * O) = rowsum(P * dP)
    dQ = scale * dS K    dK = scale * dS^T Q    dbias = dS

P is computed again from the scores and from each query's maximum and norm = 1 / sum, which the
forward kept. (Their sum in one, `lse`, would cost float32 a digit.) A query that may look nowhere
has a maximum of infinity, hence weights of 0; so has a row past the last query. The weight of an
only key is 1 whatever its score: dS, which is rounding errors then, is multiplied by M > 1.

Source: FlashAttention-2 (arXiv:2307.08691), algorithm 2. Legend as in `kernel_parts.py`.
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
    product,
    score,
    start_of,
    store_parts,
    store_turned_back,
    times,
    zero_parts,
    zero_turned,
)


@triton.jit
def _dq_step(
    dq, q, g, peak, norm, delta, k_base, v_base, mask_base, angles, rows, start, N, M,
    stride_km, stride_kd, stride_vm, stride_vd, stride_mn, stride_mm,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, D: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dq + dS K over keys [start, start + KEYS); only the TAIL step masks its keys."""
    keys = start + tl.arange(0, KEYS)
    k = load_turned(
        k_base, keys, stride_km, stride_kd, M, angles, TAIL, ROPE, ACC, D, Q0, Q1, Q2
    )  # fmt: skip
    scores = score(
        q, k, mask_base, rows, keys, N, M, stride_mn, stride_mm, SCALE, HAS_MASK, PRECISION, ACC
    )
    if TAIL:
        scores = tl.where(keys[None, :] < M, scores, -float("inf"))
    v = load_parts(v_base, keys, stride_vm, stride_vd, M, TAIL, D, D0, D1, D2)
    weights = tl.exp2(scores - peak[:, None]) * norm[:, None]
    ds = weights * (product(g, v, PRECISION, ACC) - delta[:, None])
    return add_product(dq, ds, k, PRECISION, ACC)


@triton.jit
def _dkv_step(
    dk, dv, k, v, q_base, g_base, stat_base, stride_stat, delta_base, mask_base, angles, keys,
    start, N, M, stride_qn, stride_qd, stride_gn, stride_gd, stride_mn, stride_mm,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, D: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, QUERIES: tl.constexpr,
    TAIL: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
):  # fmt: skip
    """dk + dS^T Q and dv + P^T G, if wanted, over queries [start, start + QUERIES), transposed
    throughout; only the TAIL step masks its queries."""
    rows = start + tl.arange(0, QUERIES)
    q = load_turned(
        q_base, rows, stride_qn, stride_qd, N, angles, TAIL, ROPE, ACC, D, Q0, Q1, Q2
    )  # fmt: skip
    if TAIL:
        peak = tl.load(stat_base + rows, mask=rows < N, other=float("inf"))
        norm = tl.load(stat_base + stride_stat + rows, mask=rows < N, other=0.0)
        delta = tl.load(delta_base + rows, mask=rows < N, other=0.0)
    else:
        peak = tl.load(stat_base + rows)
        norm = tl.load(stat_base + stride_stat + rows)
        delta = tl.load(delta_base + rows)
    scores = score(
        k, q, mask_base, keys, rows, M, N, stride_mm, stride_mn, SCALE, HAS_MASK, PRECISION, ACC
    )  # (keys, queries)
    weights = tl.exp2(scores - peak[None, :]) * norm[None, :]
    g = load_parts(g_base, rows, stride_gn, stride_gd, N, TAIL, D, D0, D1, D2)
    if HAS_DV:
        dv = add_product(dv, weights, g, PRECISION, ACC)
    if HAS_DK:
        ds = weights * (product(v, g, PRECISION, ACC) - delta[None, :])
        dk = add_product(dk, ds, q, PRECISION, ACC)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def attention_backward_q_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cos_ptr, sin_ptr, cu_ptr,  # as in `attention_kernel`
    H, N, M, images, prefix,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_mb, stride_mh, stride_mn, stride_mm,
    stride_ab, stride_ah, stride_an, stride_ad,
    SCALE: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    g_ptr,  # [B, H, N, D] gradient of the output
    stat_ptr,  # [2, B, H, N], as the forward wrote it
    stride_gb, stride_gh, stride_gn, stride_gd, stride_stat,
    o_ptr,  # [B, H, N, D] the output
    stride_ob, stride_oh, stride_on,
    delta_ptr,  # [B, H, N], written
    dq_ptr,  # [B, H, N, D], written, or None
    stride_dqb, stride_dqh, stride_dqn,
):  # fmt: skip
    """delta and dQ of one block of queries."""
    batch, head, first, tokens, block = find_block(cu_ptr, images, H, N, BLOCK_M)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    HAS_MASK: tl.constexpr = mask_ptr is not None

    stride_qn, stride_km = aligned(stride_qn, ALIGN), aligned(stride_km, ALIGN)
    stride_vm, stride_gn = aligned(stride_vm, ALIGN), aligned(stride_gn, ALIGN)
    stride_on, stride_dqn = aligned(stride_on, ALIGN), aligned(stride_dqn, ALIGN)
    q_base = start_of(q_ptr, batch, head, first, stride_qb, stride_qh, stride_qn, ALIGN)
    k_base = start_of(k_ptr, batch, head, first, stride_kb, stride_kh, stride_km, ALIGN)
    v_base = start_of(v_ptr, batch, head, first, stride_vb, stride_vh, stride_vm, ALIGN)
    g_base = start_of(g_ptr, batch, head, first, stride_gb, stride_gh, stride_gn, ALIGN)
    o_base = start_of(o_ptr, batch, head, first, stride_ob, stride_oh, stride_on, ALIGN)
    stat_base = start_of(stat_ptr, batch, head, first, H * N, N, 1, 1)
    delta_base = start_of(delta_ptr, batch, head, first, H * N, N, 1, 1)
    mask_base = start_of(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)
    cos_base = start_of(cos_ptr, batch, head, first, stride_ab, stride_ah, stride_an, 1)
    sin_base = start_of(sin_ptr, batch, head, first, stride_ab, stride_ah, stride_an, 1)
    angles = (cos_base, sin_base, stride_an, stride_ad, prefix)
    if cu_ptr is not None:
        N, M = tokens, tokens

    g = load_parts(g_base, rows, stride_gn, stride_gd, N, True, D, D0, D1, D2)
    o = load_parts(o_base, rows, stride_on, 1, N, True, D, D0, D1, D2)
    delta = tl.zeros((BLOCK_M,), dtype=ACC)
    for i in tl.static_range(len(g)):
        delta += tl.sum(g[i].to(ACC) * o[i].to(ACC), axis=1)
    tl.store(delta_base + rows, delta, mask=rows < N)
    if dq_ptr is not None:
        dq_base = start_of(dq_ptr, batch, head, first, stride_dqb, stride_dqh, stride_dqn, ALIGN)
        peak = tl.load(stat_base + rows, mask=rows < N, other=float("inf"))
        norm = tl.load(stat_base + stride_stat + rows, mask=rows < N, other=0.0)
        q = load_turned(
            q_base, rows, stride_qn, stride_qd, N, angles, True, ROPE, ACC, D, Q0, Q1, Q2
        )  # fmt: skip
        dq = zero_turned(BLOCK_M, ROPE, ACC, Q0, Q1, Q2)
        full = tl.maximum(M - 1, 0) // BLOCK_N * BLOCK_N if TAIL > 0 else M
        for start in range(0, full, BLOCK_N):
            dq = _dq_step(
                dq, q, g, peak, norm, delta, k_base, v_base, mask_base, angles, rows, start, N, M,
                stride_km, stride_kd, stride_vm, stride_vd, stride_mn, stride_mm,
                SCALE, HAS_MASK, ROPE, PRECISION, ACC, D, Q0, Q1, Q2, D0, D1, D2, BLOCK_N, False,
            )  # fmt: skip
        if TAIL > 0:
            dq = _dq_step(
                dq, q, g, peak, norm, delta, k_base, v_base, mask_base, angles, rows, full, N, M,
                stride_km, stride_kd, stride_vm, stride_vd, stride_mn, stride_mm,
                SCALE, HAS_MASK, ROPE, PRECISION, ACC, D, Q0, Q1, Q2, D0, D1, D2, TAIL, True,
            )  # fmt: skip
        dq = times(dq, SCALE * (M > 1).to(ACC))
        store_turned_back(dq_base, rows, stride_dqn, dq, N, angles, ROPE, ACC, D, Q0, Q1, Q2)


@triton.jit(do_not_specialize=SIZES)
def attention_backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cos_ptr, sin_ptr, cu_ptr,  # as in `attention_kernel`
    H, N, M, images, prefix,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_mb, stride_mh, stride_mn, stride_mm,
    stride_ab, stride_ah, stride_an, stride_ad,
    SCALE: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a step
    BLOCK_N: tl.constexpr,  # keys of the program
    TAIL: tl.constexpr,  # queries of the masked last step, 0 if BLOCK_M divides N
    g_ptr,  # [B, H, N, D] gradient of the output
    stat_ptr,  # [2, B, H, N], as the forward wrote it
    stride_gb, stride_gh, stride_gn, stride_gd, stride_stat,
    delta_ptr,  # [B, H, N]
    dk_ptr,  # [B, H, M, D], written, or None
    dv_ptr,  # [B, H, M, D], written, or None
    stride_dkb, stride_dkh, stride_dkm,
    stride_dvb, stride_dvh, stride_dvm,
):  # fmt: skip
    """dK or dV or both of one block of keys."""
    batch, head, first, tokens, block = find_block(cu_ptr, images, H, M, BLOCK_N)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    HAS_MASK: tl.constexpr = mask_ptr is not None

    stride_qn, stride_km = aligned(stride_qn, ALIGN), aligned(stride_km, ALIGN)
    stride_vm, stride_gn = aligned(stride_vm, ALIGN), aligned(stride_gn, ALIGN)
    stride_dkm, stride_dvm = aligned(stride_dkm, ALIGN), aligned(stride_dvm, ALIGN)
    q_base = start_of(q_ptr, batch, head, first, stride_qb, stride_qh, stride_qn, ALIGN)
    k_base = start_of(k_ptr, batch, head, first, stride_kb, stride_kh, stride_km, ALIGN)
    v_base = start_of(v_ptr, batch, head, first, stride_vb, stride_vh, stride_vm, ALIGN)
    g_base = start_of(g_ptr, batch, head, first, stride_gb, stride_gh, stride_gn, ALIGN)
    dk_base = start_of(dk_ptr, batch, head, first, stride_dkb, stride_dkh, stride_dkm, ALIGN)
    dv_base = start_of(dv_ptr, batch, head, first, stride_dvb, stride_dvh, stride_dvm, ALIGN)
    stat_base = start_of(stat_ptr, batch, head, first, H * N, N, 1, 1)
    delta_base = start_of(delta_ptr, batch, head, first, H * N, N, 1, 1)
    mask_base = start_of(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)
    cos_base = start_of(cos_ptr, batch, head, first, stride_ab, stride_ah, stride_an, 1)
    sin_base = start_of(sin_ptr, batch, head, first, stride_ab, stride_ah, stride_an, 1)
    angles = (cos_base, sin_base, stride_an, stride_ad, prefix)
    if cu_ptr is not None:
        N, M = tokens, tokens

    k = load_turned(
        k_base, keys, stride_km, stride_kd, M, angles, True, ROPE, ACC, D, Q0, Q1, Q2
    )  # fmt: skip
    v = load_parts(v_base, keys, stride_vm, stride_vd, M, True, D, D0, D1, D2)
    dk = zero_turned(BLOCK_N, ROPE, ACC, Q0, Q1, Q2)
    dv = zero_parts(BLOCK_N, D0, D1, D2, ACC)
    full = tl.maximum(N - 1, 0) // BLOCK_M * BLOCK_M if TAIL > 0 else N
    for start in range(0, full, BLOCK_M):
        dk, dv = _dkv_step(
            dk, dv, k, v, q_base, g_base, stat_base, stride_stat, delta_base, mask_base, angles,
            keys, start, N, M, stride_qn, stride_qd, stride_gn, stride_gd, stride_mn, stride_mm,
            SCALE, HAS_MASK, ROPE, PRECISION, ACC, D, Q0, Q1, Q2, D0, D1, D2, BLOCK_M, False,
            dk_ptr is not None, dv_ptr is not None,
        )  # fmt: skip
    if TAIL > 0:
        dk, dv = _dkv_step(
            dk, dv, k, v, q_base, g_base, stat_base, stride_stat, delta_base, mask_base, angles,
            keys, full, N, M, stride_qn, stride_qd, stride_gn, stride_gd, stride_mn, stride_mm,
            SCALE, HAS_MASK, ROPE, PRECISION, ACC, D, Q0, Q1, Q2, D0, D1, D2, TAIL, True,
            dk_ptr is not None, dv_ptr is not None,
        )  # fmt: skip
    if dv_ptr is not None:
        store_parts(dv_base, keys, stride_dvm, dv, M, D)
    if dk_ptr is not None:
        dk = times(dk, SCALE * (M > 1).to(ACC))
        store_turned_back(dk_base, keys, stride_dkm, dk, M, angles, ROPE, ACC, D, Q0, Q1, Q2)


@triton.jit(do_not_specialize=SIZES)
def attention_backward_bias_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cos_ptr, sin_ptr, cu_ptr,  # as in `attention_kernel`
    H, N, M, images, prefix,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd,
    stride_mb, stride_mh, stride_mn, stride_mm,
    stride_ab, stride_ah, stride_an, stride_ad,
    SCALE: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    g_ptr,  # [B, H, N, D] gradient of the output
    stat_ptr,  # [2, B, H, N], as the forward wrote it
    stride_gb, stride_gh, stride_gn, stride_gd, stride_stat,
    delta_ptr,  # [B, H, N]
    db_ptr,  # [B or 1, H or 1, N, M], written
    bias_heads,  # H or 1
    batches,  # how many of them share one bias: 1 or B
    heads,  # likewise: 1 or H
):  # fmt: skip
    """dS of one block of queries and one of keys, summed over all batches and heads that share the
    bias, one after another."""
    across = tl.cdiv(M, BLOCK_N)
    blocks = tl.cdiv(N, BLOCK_M) * across
    pid = tl.program_id(0)
    which = pid // blocks
    rows = pid % blocks // across * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = pid % across * BLOCK_N + tl.arange(0, BLOCK_N)

    stride_qn, stride_km = aligned(stride_qn, ALIGN), aligned(stride_km, ALIGN)
    stride_vm, stride_gn = aligned(stride_vm, ALIGN), aligned(stride_gn, ALIGN)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for i in range(batches * heads):
        batch = (which // bias_heads + i // heads).to(tl.int64)
        head = (which % bias_heads + i % heads).to(tl.int64)
        q_base = start_of(q_ptr, batch, head, 0, stride_qb, stride_qh, 0, ALIGN)
        k_base = start_of(k_ptr, batch, head, 0, stride_kb, stride_kh, 0, ALIGN)
        v_base = start_of(v_ptr, batch, head, 0, stride_vb, stride_vh, 0, ALIGN)
        g_base = start_of(g_ptr, batch, head, 0, stride_gb, stride_gh, 0, ALIGN)
        mask_base = start_of(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)
        stat_base = start_of(stat_ptr, batch, head, 0, H * N, N, 1, 1)
        delta_base = start_of(delta_ptr, batch, head, 0, H * N, N, 1, 1)
        cos_base = start_of(cos_ptr, batch, head, 0, stride_ab, stride_ah, 0, 1)
        sin_base = start_of(sin_ptr, batch, head, 0, stride_ab, stride_ah, 0, 1)
        angles = (cos_base, sin_base, stride_an, stride_ad, prefix)

        q = load_turned(
            q_base, rows, stride_qn, stride_qd, N, angles, True, ROPE, ACC, D, Q0, Q1, Q2
        )  # fmt: skip
        k = load_turned(
            k_base, keys, stride_km, stride_kd, M, angles, True, ROPE, ACC, D, Q0, Q1, Q2
        )  # fmt: skip
        scores = score(
            q, k, mask_base, rows, keys, N, M, stride_mn, stride_mm, SCALE, True, PRECISION, ACC
        )
        g = load_parts(g_base, rows, stride_gn, stride_gd, N, True, D, D0, D1, D2)
        v = load_parts(v_base, keys, stride_vm, stride_vd, M, True, D, D0, D1, D2)
        peak = tl.load(stat_base + rows, mask=rows < N, other=float("inf"))
        norm = tl.load(stat_base + stride_stat + rows, mask=rows < N, other=0.0)
        delta = tl.load(delta_base + rows, mask=rows < N, other=0.0)
        weights = tl.exp2(scores - peak[:, None]) * norm[:, None]
        total += weights * (product(g, v, PRECISION, ACC) - delta[:, None])

    at = which.to(tl.int64) * N * M
    ptrs = db_ptr + at + rows[:, None] * M + keys[None, :]
    inside = (rows[:, None] < N) & (keys[None, :] < M)
    total *= (M > 1).to(ACC)
    tl.store(ptrs, total.to(db_ptr.dtype.element_ty), mask=inside)
