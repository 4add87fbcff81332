"""Gradients of attention in two phases: queries, then keys and values. No atomics, so the same
input gives the same bits. A third kernel sums the gradient of a bias that is added to the scores.

With weights P = softmax(S), the output O = P V and its gradient G:

    dV = P^T G    dP = G V^T    dS = P * (dP - delta), delta = rowsum(G * O) = rowsum(P * dP)
    dQ = scale * dS K    dK = scale * dS^T Q    dbias = dS

P is computed again from the scores and from each query's maximum and norm = 1 / sum, which the
forward kept. (Their sum in one, `lse`, would cost float32 a digit.) A query that may look nowhere
has a maximum of infinity, hence weights of 0; so has a row past the last query. The weight of an
only key is 1 whatever its score: dS, which is rounding errors then, is multiplied by M > 1.

Source: FlashAttention-2 (arXiv:2307.08691), algorithm 2. Legend as in `kernel.py`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastvit.kernels._tiles import Matrix, Tile, store
from fastvit.kernels.attention.kernel import (
    SIZES,
    Place,
    Sizes,
    add_product,
    find_block,
    head_at,
    load_parts,
    load_turned,
    product,
    queries_at,
    rope_at,
    score,
    store_parts,
    store_turned_back,
    times,
    zeros_like,
)


@triton.jit
def _load_statistics(stat, rows, N, sizes, MASKED: tl.constexpr):
    """Maximum and norm of queries, such that weights are 0 past the last one."""
    if MASKED:
        peak = tl.load(stat + rows, mask=rows < N, other=float("inf"))
        norm = tl.load(stat + sizes.stride_stat + rows, mask=rows < N, other=0.0)
    else:
        peak = tl.load(stat + rows)
        norm = tl.load(stat + sizes.stride_stat + rows)
    return peak, norm


@triton.jit
def _dq_step(
    dq, q, g, peak, norm, delta, k, v, mask, rope, rows, start, N, M,
    FORM: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dq + dS K over keys [start, start + KEYS); only the TAIL step masks its keys."""
    keys = start + tl.arange(0, KEYS)
    turned = load_turned(k, keys, M, rope, TAIL, FORM)
    scores = score(q, turned, mask, rows, keys, N, M, FORM)
    if TAIL:
        scores = tl.where(keys[None, :] < M, scores, -float("inf"))
    values = load_parts(v, keys, M, TAIL, FORM)
    weights = tl.exp2(scores - peak[:, None]) * norm[:, None]
    ds = weights * (product(g, values, FORM) - delta[:, None])
    return add_product(dq, ds, turned, FORM)


@triton.jit
def _dkv_step(
    dk, dv, k, v, q, grad, stat, delta_ptr, mask, rope, keys, start, N, M, sizes,
    FORM: tl.constexpr, QUERIES: tl.constexpr, TAIL: tl.constexpr, HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
):  # fmt: skip
    """dk + dS^T Q and dv + P^T G, if wanted, over queries [start, start + QUERIES), transposed
    throughout, `mask` too; only the TAIL step masks its queries."""
    rows = start + tl.arange(0, QUERIES)
    turned = load_turned(q, rows, N, rope, TAIL, FORM)
    peak, norm = _load_statistics(stat, rows, N, sizes, TAIL)
    if TAIL:
        delta = tl.load(delta_ptr + rows, mask=rows < N, other=0.0)
    else:
        delta = tl.load(delta_ptr + rows)
    scores = score(k, turned, mask, keys, rows, M, N, FORM)  # (keys, queries)
    weights = tl.exp2(scores - peak[None, :]) * norm[None, :]
    g = load_parts(grad, rows, N, TAIL, FORM)
    if HAS_DV:
        dv = add_product(dv, weights, g, FORM)
    if HAS_DK:
        ds = weights * (product(v, g, FORM) - delta[None, :])
        dk = add_product(dk, ds, turned, FORM)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def attention_backward_q_kernel(
    q, k, v, mask, rope, cu_ptr, H, N, M, images, stride_stat,  # as in `attention_kernel`
    grad,  # Heads of N tokens: gradient of the output
    out,  # Heads of N tokens: the output
    stat_ptr,  # [2, B, H, N], as the forward wrote it
    delta_ptr,  # [B, H, N], written
    dq,  # Heads of N tokens, written, or None
    FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """delta and dQ of one block of queries."""
    sizes = Sizes(H, N, M, images, stride_stat)
    at = find_block(cu_ptr, sizes, N, BLOCK_M)
    N, M = at.N, at.M
    rows = at.block * BLOCK_M + tl.arange(0, BLOCK_M)
    k, v = head_at(k, at, FORM.align), head_at(v, at, FORM.align)
    if mask is not None:
        mask = head_at(mask, at, 1)
    if rope is not None:
        rope = rope_at(rope, at)

    g = load_parts(head_at(grad, at, FORM.align), rows, N, True, FORM)
    o = load_parts(head_at(out, at, FORM.align), rows, N, True, FORM)
    delta = tl.zeros((BLOCK_M,), dtype=FORM.acc)
    for i in tl.static_range(len(g)):
        delta += tl.sum(g[i].to(FORM.acc) * o[i].to(FORM.acc), axis=1)
    tl.store(queries_at(delta_ptr, at, sizes) + rows, delta, mask=rows < N)
    if dq is not None:
        peak, norm = _load_statistics(queries_at(stat_ptr, at, sizes), rows, N, sizes, True)
        queries = load_turned(head_at(q, at, FORM.align), rows, N, rope, True, FORM)
        sums = zeros_like(queries, FORM)
        full = tl.maximum(M - 1, 0) // BLOCK_N * BLOCK_N if TAIL > 0 else M
        for start in range(0, full, BLOCK_N):
            sums = _dq_step(
                sums, queries, g, peak, norm, delta, k, v, mask, rope, rows, start, N, M,
                FORM, BLOCK_N, False,
            )  # fmt: skip
        if TAIL > 0:
            sums = _dq_step(
                sums, queries, g, peak, norm, delta, k, v, mask, rope, rows, full, N, M,
                FORM, TAIL, True,
            )  # fmt: skip
        sums = times(sums, FORM.scale * (M > 1).to(FORM.acc))
        store_turned_back(head_at(dq, at, FORM.align), rows, N, rope, sums, FORM)


@triton.jit(do_not_specialize=SIZES)
def attention_backward_kv_kernel(
    q, k, v, mask, rope, cu_ptr, H, N, M, images, stride_stat,  # as in `attention_kernel`
    grad,  # Heads of N tokens: gradient of the output
    stat_ptr,  # [2, B, H, N], as the forward wrote it
    delta_ptr,  # [B, H, N]
    dk,  # Heads of M tokens, written, or None
    dv,  # Heads of M tokens, written, or None
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a step
    BLOCK_N: tl.constexpr,  # keys of the program
    TAIL: tl.constexpr,  # queries of the masked last step, 0 if BLOCK_M divides N
):  # fmt: skip
    """dK or dV or both of one block of keys."""
    sizes = Sizes(H, N, M, images, stride_stat)
    at = find_block(cu_ptr, sizes, M, BLOCK_N)
    N, M = at.N, at.M
    keys = at.block * BLOCK_N + tl.arange(0, BLOCK_N)
    q, grad = head_at(q, at, FORM.align), head_at(grad, at, FORM.align)
    stat, delta = queries_at(stat_ptr, at, sizes), queries_at(delta_ptr, at, sizes)
    if mask is not None:
        mask = head_at(mask, at, 1)
        mask = Matrix(mask.ptr, mask.stride_n, mask.stride_m)
    if rope is not None:
        rope = rope_at(rope, at)

    k = load_turned(head_at(k, at, FORM.align), keys, M, rope, True, FORM)
    v = load_parts(head_at(v, at, FORM.align), keys, M, True, FORM)
    dk_sums, dv_sums = zeros_like(k, FORM), zeros_like(v, FORM)
    full = tl.maximum(N - 1, 0) // BLOCK_M * BLOCK_M if TAIL > 0 else N
    for start in range(0, full, BLOCK_M):
        dk_sums, dv_sums = _dkv_step(
            dk_sums, dv_sums, k, v, q, grad, stat, delta, mask, rope, keys, start, N, M, sizes,
            FORM, BLOCK_M, False, dk is not None, dv is not None,
        )  # fmt: skip
    if TAIL > 0:
        dk_sums, dv_sums = _dkv_step(
            dk_sums, dv_sums, k, v, q, grad, stat, delta, mask, rope, keys, full, N, M, sizes,
            FORM, TAIL, True, dk is not None, dv is not None,
        )  # fmt: skip
    if dv is not None:
        store_parts(head_at(dv, at, FORM.align), keys, M, dv_sums, FORM)
    if dk is not None:
        dk_sums = times(dk_sums, FORM.scale * (M > 1).to(FORM.acc))
        store_turned_back(head_at(dk, at, FORM.align), keys, M, rope, dk_sums, FORM)


class Shared(NamedTuple):
    """How batches and heads share biases."""

    bias_heads: Any  # H or 1
    batches: Any  # how many share one bias: 1 or B
    heads: Any  # likewise: 1 or H


@triton.jit(do_not_specialize=SIZES)
def attention_backward_bias_kernel(
    q, k, v, mask, rope, cu_ptr, H, N, M, images, stride_stat,  # as in the others
    grad,  # Heads of N tokens: gradient of the output
    stat_ptr,  # [2, B, H, N], as the forward wrote it
    delta_ptr,  # [B, H, N]
    db_ptr,  # [B or 1, H or 1, N, M], written
    shared,  # Shared
    FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS of one block of queries and one of keys, summed over all batches and heads that share the
    bias, one after another."""
    sizes = Sizes(H, N, M, images, stride_stat)
    across = tl.cdiv(M, BLOCK_N)
    blocks = tl.cdiv(N, BLOCK_M) * across
    pid = tl.program_id(0)
    which = pid // blocks
    rows = pid % blocks // across * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = pid % across * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=FORM.acc)
    for i in range(shared.batches * shared.heads):
        batch = (which // shared.bias_heads + i // shared.heads).to(tl.int64)
        head = (which % shared.bias_heads + i % shared.heads).to(tl.int64)
        at = Place(batch, head, 0, 0, N, M)
        turn = rope
        if rope is not None:
            turn = rope_at(rope, at)
        queries = load_turned(head_at(q, at, FORM.align), rows, N, turn, True, FORM)
        turned = load_turned(head_at(k, at, FORM.align), keys, M, turn, True, FORM)
        scores = score(queries, turned, head_at(mask, at, 1), rows, keys, N, M, FORM)
        g = load_parts(head_at(grad, at, FORM.align), rows, N, True, FORM)
        values = load_parts(head_at(v, at, FORM.align), keys, M, True, FORM)
        peak, norm = _load_statistics(queries_at(stat_ptr, at, sizes), rows, N, sizes, True)
        delta = tl.load(queries_at(delta_ptr, at, sizes) + rows, mask=rows < N, other=0.0)
        weights = tl.exp2(scores - peak[:, None]) * norm[:, None]
        total += weights * (product(g, values, FORM) - delta[:, None])

    total *= (M > 1).to(FORM.acc)
    out = Matrix(db_ptr + which.to(tl.int64) * N * M, M, 1)
    store(out, Tile(pid % blocks // across * BLOCK_M, pid % across * BLOCK_N, N, M), total)
