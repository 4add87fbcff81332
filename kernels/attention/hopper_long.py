"""softmax(q k^T * scale + bias) v on Hopper for any number of keys from 64 on, in Gluon.

A persistent kernel of three roles: one warp brings keys and values, block after block, through a
ring that two consumers (warpgroups) of 64 queries each share. Within a consumer the product q k^T
of the next block is issued together with that of these weights and values, and the softmax of the
one runs under the other (FlashAttention-3, arXiv:2407.08608); with TURNS the consumers also take
turns at issuing.

An item is CHUNK blocks of queries of one head. Its keys go through the ring once:

streaming: CHUNK is 2; keys are read again, from the L2 cache, for the next item of a head;
staying:   CHUNK is all of a head, and the ring holds a whole head; a slot is refilled with the next
           head's keys as soon as both consumers used it for the last time.

The keys are full blocks, then up to two smaller powers of two, of which the last alone is masked:
577 = 4 * 128 + 64 + 1 of 16. Channels are one or two boxes, 72 = 64 + 8 of 16. Boxes are [1, rows,
1, channels] of [B, tokens, heads, D], where D is the last dimension: what is past a head's last
channel or an image's last token arrives as zeros. Packed qkv is one tensor of 3 H heads, and k's
descriptors are v's too.

Barriers, each with the parity of its use:

k_full[s], v_full[s]   a block of keys or values has landed in slot s
k_empty[s], v_empty[s] both consumers are done with it
t_full[s], t_empty[s]  likewise of the smaller blocks, keys and values together
q_full[c, s]           queries of consumer c, which brings them itself, a block ahead
turn[c]                TURNS: consumer c may issue

Legend: B batch, H heads, N queries, M keys, D head dimension.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastvit.kernels.attention.hopper_parts import (
    as_operand,
    barrier,
    fast_exp2,
    head_of,
    hide,
    like_rows,
    matrix_of,
    narrow_max,
    narrow_sum,
    put_rows,
)

CONSUMERS = gl.constexpr(2)
LOG2E = gl.constexpr(1.4426950408889634)
# what differs from call to call does not make another kernel
SIZES = ("N", "M", "H", "items", "chunks", "full_blocks", "blocks", "bias_b", "bias_h", "bias_n")


# --------------------------------------------------------------------------- one step


@gluon.jit
def _fence(N):
    """ptxas moves a wait for products to before arithmetic that should run under them; not across a
    branch. This one is never taken (N is not negative), and all threads are known to agree."""
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        setp.lt.s32 p, $1, 0;
        AGAIN:
        @!p bra.uni ON;
        nanosleep.u32 1000;
        bra.uni AGAIN;
        ON:
        mov.b32 $0, $1;
        }
        """,
        "=r,r", [N], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _bring(desc0, desc1, b0, b1, bar, image, row, matrix, D1: gl.constexpr):
    """Rows of one matrix of one head. Rows past the image's last and channels past the head's last
    arrive as zeros, and their bytes count."""
    tma.async_copy_global_to_shared(desc0, [image, row, matrix, 0], bar, b0)
    if D1 > 0:
        tma.async_copy_global_to_shared(
            desc1, [image, row, matrix, desc0.block_type.shape[3]], bar, b1
        )


@gluon.jit
def _issue_scores(q0, q1, k0, k1, D1: gl.constexpr):
    """q k^T, in flight."""
    ROWS: gl.constexpr = q0.shape[1]
    PART: gl.constexpr = k0.shape[1]
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, PART, 16])
    s = warpgroup_mma(
        matrix_of(q0), matrix_of(k0).permute((1, 0)), gl.zeros([ROWS, PART], gl.float32, L),
        use_acc=False, is_async=True,
    )  # fmt: skip
    if D1 > 0:
        s = warpgroup_mma(matrix_of(q1), matrix_of(k1).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _issue_values(a, v0, v1, o0, o1, D1: gl.constexpr):
    """o + a v, in flight."""
    o0 = warpgroup_mma(a, matrix_of(v0), o0, is_async=True)
    if D1 > 0:
        # a layout names the width of the product it is for, though the registers are the same
        NARROW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D1, 16])
        b = gl.convert_layout(a, gl.DotOperandLayout(0, NARROW, 2), assert_trivial=True)
        o1 = warpgroup_mma(b, matrix_of(v1), o1, is_async=True)
    return o0, o1


@gluon.jit
def _settle_values(o0, o1, a, D1: gl.constexpr):
    """Waits for all products. The operand is registers that they read: it lives until here."""
    if D1 > 0:
        o0, o1, a = warpgroup_mma_wait(0, deps=(o0, o1, a))
    else:
        o0, a = warpgroup_mma_wait(0, deps=(o0, a))
    return o0, o1


@gluon.jit
def _bias_of(bias_ptr, row, col, N, M, bias_n, ROWS: gl.constexpr, PART: gl.constexpr):
    """log2(e) * bias [ROWS, PART] as the scores lie; of a bool, 0 or -inf."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, PART, 16])
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    cols = col + gl.arange(0, PART, layout=gl.SliceLayout(0, L))
    ptrs = bias_ptr + rows[:, None] * bias_n + cols[None, :]
    inside = (rows < N)[:, None] & (cols < M)[None, :]
    if bias_ptr.dtype.element_ty == gl.int1:
        seen = gl.load(ptrs, mask=inside, other=0).to(gl.float32)
        return gl.where(seen > 0.0, 0.0, float("-inf"))
    else:
        bias = gl.load(ptrs, mask=inside, other=0.0).to(gl.float32)
        # the lowest float stands for "no key", but leaves a query without any a plain average
        low = gl.maximum(bias, -2e38)
        return gl.where(bias > float("-inf"), low, bias) * LOG2E


@gluon.jit
def _soften(s, bias, high, total, scale, left, MASKED: gl.constexpr, BIASED: gl.constexpr):
    """A step of the online softmax: (weights, what the past shrinks by, maximum, sum). The maximum
    is in base 2; the sum is per thread, over the columns with the same remainder by 8."""
    NARROW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 8, 16])
    if BIASED:
        s = s * scale + bias
    if MASKED:
        s = hide(s, left)
    top = gl.max(narrow_max(s, NARROW, 8), axis=1)
    if BIASED:
        new = gl.maximum(high, top)
        # where a query has seen nothing but -inf, subtract 0: exp2(-inf - 0) is 0, not NaN
        shift = gl.where(new == float("-inf"), 0.0, new)
        w = fast_exp2(s - like_rows(shift, s))
    else:
        new = gl.maximum(high, top * scale)
        shift = new
        w = fast_exp2(s * scale - like_rows(shift, s))
    decay = fast_exp2(high - shift)
    total = total * like_rows(decay, total) + narrow_sum(w, NARROW, 8)
    return w, decay, new, total


# --------------------------------------------------------------------------- roles


@gluon.jit
def _bring_keys(
    k_descs, v_descs, rings, bars, sizes,
    D1: gl.constexpr, T1: gl.constexpr, T2: gl.constexpr,
    STAGES: gl.constexpr, TAILS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One warp: brings block after block, as far ahead as there are free slots."""
    k_desc0, k_desc1, mk_desc0, mk_desc1, ek_desc0, ek_desc1 = k_descs
    v_desc0, v_desc1, mv_desc0, mv_desc1, ev_desc0, ev_desc1 = v_descs
    k0, k1, v0, v1, mk0, mk1, mv0, mv1, ek0, ek1, ev0, ev1 = rings
    k_full, v_full, k_empty, v_empty, t_full, t_empty, _, _ = bars
    items, chunks, full_blocks, _, H, _, _ = sizes
    BLOCK: gl.constexpr = k_desc0.block_type.shape[1]
    D0: gl.constexpr = k_desc0.block_type.shape[3]
    BYTES: gl.constexpr = BLOCK * (D0 + D1) * 2
    TAIL_BYTES: gl.constexpr = 2 * (T1 + T2) * (D0 + D1) * 2
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        image = item // chunks // H
        head = item // chunks % H
        for j in range(full_blocks):
            slot = step % STAGES
            # a barrier that nothing completed yet counts as past the phase before: the first passes
            free = step // STAGES & 1 ^ 1
            mbarrier.wait(k_empty.index(slot), free)
            mbarrier.expect(k_full.index(slot), BYTES)
            _bring(
                k_desc0, k_desc1, k0.index(slot), k1.index(slot), k_full.index(slot),
                image, j * BLOCK, head_of(head, H, 1, PACKED), D1,
            )  # fmt: skip
            mbarrier.wait(v_empty.index(slot), free)
            mbarrier.expect(v_full.index(slot), BYTES)
            _bring(
                v_desc0, v_desc1, v0.index(slot), v1.index(slot), v_full.index(slot),
                image, j * BLOCK, head_of(head, H, 2, PACKED), D1,
            )  # fmt: skip
            step += 1
        if T1 > 0:
            slot = turn % TAILS
            bar = t_full.index(slot)
            row = full_blocks * BLOCK
            mbarrier.wait(t_empty.index(slot), turn // TAILS & 1 ^ 1)
            mbarrier.expect(bar, TAIL_BYTES)
            _bring(
                mk_desc0, mk_desc1, mk0.index(slot), mk1.index(slot), bar,
                image, row, head_of(head, H, 1, PACKED), D1,
            )  # fmt: skip
            if T2 > 0:
                _bring(
                    ek_desc0, ek_desc1, ek0.index(slot), ek1.index(slot), bar,
                    image, row + T1, head_of(head, H, 1, PACKED), D1,
                )  # fmt: skip
            _bring(
                mv_desc0, mv_desc1, mv0.index(slot), mv1.index(slot), bar,
                image, row, head_of(head, H, 2, PACKED), D1,
            )  # fmt: skip
            if T2 > 0:
                _bring(
                    ev_desc0, ev_desc1, ev0.index(slot), ev1.index(slot), bar,
                    image, row + T1, head_of(head, H, 2, PACKED), D1,
                )  # fmt: skip
        turn += 1


@gluon.jit
def _ask_queries(
    q_desc0, q_desc1, q0, q1, q_full, sizes, t, total, slot, D1: gl.constexpr, CHUNK: gl.constexpr
):  # fmt: skip
    """A consumer's block of queries number t, if there is one."""
    _, chunks, _, _, H, _, _ = sizes
    ROWS: gl.constexpr = q_desc0.block_type.shape[1]
    D0: gl.constexpr = q_desc0.block_type.shape[3]
    if t < total:
        item = gl.program_id(0) + t // CHUNK * gl.num_programs(0)
        block = item % chunks * CHUNK + t % CHUNK
        bar = q_full.index(slot)
        mbarrier.expect(bar, ROWS * (D0 + D1) * 2)
        _bring(
            q_desc0, q_desc1, q0.index(slot), q1.index(slot), bar,
            item // chunks // H, block * ROWS, item // chunks % H, D1,
        )  # fmt: skip


@gluon.jit
def _step(
    q0, q1, k0, k1, v0, v1, a, o0, o1, high, total, scale, left, bias_ptr, row, col, N, M, bias_n,
    turn_bars, beat,
    WHO: gl.constexpr, TURNS: gl.constexpr, D1: gl.constexpr, MASKED: gl.constexpr,
    BIASED: gl.constexpr,
):  # fmt: skip
    """The scores of one block under the product of the last block's weights and values."""
    PENDING: gl.constexpr = 2 if D1 > 0 else 1
    D0: gl.constexpr = v0.shape[3]
    if TURNS:
        # the first consumer's first turn is free
        mbarrier.wait(turn_bars.index(WHO), beat & 1 ^ (1 if WHO == 0 else 0))
    f = _issue_scores(q0, q1, k0, k1, D1)
    o0, o1 = _issue_values(a, v0, v1, o0, o1, D1)
    if TURNS:
        barrier()  # no warp may still wait for this turn when the next one comes
        mbarrier.arrive(turn_bars.index((WHO + 1) % CONSUMERS), count=1)
    bias = high
    if BIASED:
        bias = _bias_of(bias_ptr, row, col, N, M, bias_n, q0.shape[1], k0.shape[1])
    s = warpgroup_mma_wait(PENDING, deps=(f,))
    w, decay, high, total = _soften(s, bias, high, total, scale, left, MASKED, BIASED)
    # the weights go through the wait packed, in half the registers
    _fence(N)
    new = as_operand(w, D0, q0.dtype)
    if D1 > 0:
        o0, o1, a, new, total = warpgroup_mma_wait(0, deps=(o0, o1, a, new, total))
    else:
        o0, a, new, total = warpgroup_mma_wait(0, deps=(o0, a, new, total))
    o0 = o0 * like_rows(decay, o0)
    if D1 > 0:
        o1 = o1 * like_rows(decay, o1)
    return new, o0, o1, high, total


@gluon.jit
def _take_blocks(
    out, stat_ptr, bias_ptr, q_descs, queries, rings, bars, sizes, bias_strides, scale, inverse,
    WHO: gl.constexpr, D: gl.constexpr, D1: gl.constexpr, T1: gl.constexpr, T2: gl.constexpr,
    CHUNK: gl.constexpr, STAGES: gl.constexpr, TAILS: gl.constexpr, QUERIES: gl.constexpr,
    TURNS: gl.constexpr, STATS: gl.constexpr, BIASED: gl.constexpr,
):  # fmt: skip
    """A consumer: of this program's blocks of queries, in order, every second. It brings its own
    queries, one block ahead."""
    q_desc0, q_desc1 = q_descs
    q0s, q1s = queries
    k0, k1, v0, v1, mk0, mk1, mv0, mv1, ek0, ek1, ev0, ev1 = rings
    k_full, v_full, k_empty, v_empty, t_full, t_empty, q_full, turn_bars = bars
    items, chunks, full_blocks, blocks, H, N, M = sizes
    bias_b, bias_h, bias_n = bias_strides
    W: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = q_desc0.block_type.shape[1]
    D0: gl.constexpr = q_desc0.block_type.shape[3]
    DTYPE: gl.constexpr = q0s.dtype
    BLOCK: gl.constexpr = k0.shape[2]
    NARROW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, 8, 16])
    OUT0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, D0, 16])
    # every consumer has to see every item, and in turns they need the same work
    gl.static_assert(CHUNK >= CONSUMERS)
    gl.static_assert(CHUNK % CONSUMERS == 0 or not TURNS)
    programs = gl.num_programs(0)
    many = (items - gl.program_id(0) + programs - 1) // programs * CHUNK
    done = gl.to_tensor(0)
    beat = gl.to_tensor(0)
    _ask_queries(
        q_desc0, q_desc1, q0s, q1s, q_full, sizes, gl.to_tensor(WHO), many,
        gl.to_tensor(WHO * QUERIES), D1, CHUNK,
    )  # fmt: skip
    for t in range(WHO, many, CONSUMERS):
        turn = t // CHUNK
        item = gl.program_id(0) + turn * programs
        block = item % chunks * CHUNK + t % CHUNK
        image = item // chunks // H
        head = item // chunks % H
        # after this block nobody here needs the item's keys
        last = (t + CONSUMERS) // CHUNK != turn  # always, when streaming
        step = turn * full_blocks
        tail = turn % TAILS
        q_slot = WHO * QUERIES + done % QUERIES
        if QUERIES == 2:
            barrier()  # all warps are done with the block before
            _ask_queries(
                q_desc0, q_desc1, q0s, q1s, q_full, sizes, t + CONSUMERS, many,
                WHO * 2 + (done + 1) % 2, D1, CHUNK,
            )  # fmt: skip
        mbarrier.wait(q_full.index(q_slot), done // QUERIES & 1)
        if block < blocks:
            bias_row = block * ROWS
            base = bias_ptr
            if BIASED:
                base = bias_ptr + image.to(gl.int64) * bias_b + head.to(gl.int64) * bias_h
            q0 = q0s.index(q_slot)
            q1 = q1s.index(q_slot)
            slot = step % STAGES
            mbarrier.wait(k_full.index(slot), step // STAGES & 1)
            f = _issue_scores(q0, q1, k0.index(slot), k1.index(slot), D1)
            high = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, NARROW))
            bias = high
            if BIASED:
                bias = _bias_of(base, bias_row, 0, N, M, bias_n, ROWS, BLOCK)
            s = warpgroup_mma_wait(0, deps=(f,))
            barrier()  # all warps are done with these keys
            mbarrier.arrive(k_empty.index(slot), count=1, pred=last)
            total = gl.zeros([ROWS, 8], gl.float32, NARROW)
            w, _, high, total = _soften(s, bias, high, total, scale, M, False, BIASED)
            a = as_operand(w, D0, DTYPE)
            o0 = gl.zeros([ROWS, D0], gl.float32, OUT0)
            o1 = o0
            if D1 > 0:
                OUT1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, D1, 16])
                o1 = gl.zeros([ROWS, D1], gl.float32, OUT1)

            for j in range(1, full_blocks):
                old = (step + j - 1) % STAGES
                slot = (step + j) % STAGES
                mbarrier.wait(k_full.index(slot), (step + j) // STAGES & 1)
                mbarrier.wait(v_full.index(old), (step + j - 1) // STAGES & 1)
                a, o0, o1, high, total = _step(
                    q0, q1, k0.index(slot), k1.index(slot), v0.index(old), v1.index(old),
                    a, o0, o1, high, total, scale, M, base, bias_row, j * BLOCK, N, M, bias_n,
                    turn_bars, beat, WHO, TURNS, D1, False, BIASED,
                )  # fmt: skip
                beat += 1
                barrier()  # all warps are done with both
                mbarrier.arrive(k_empty.index(slot), count=1, pred=last)
                mbarrier.arrive(v_empty.index(old), count=1, pred=last)

            old = (step + full_blocks - 1) % STAGES
            mbarrier.wait(v_full.index(old), (step + full_blocks - 1) // STAGES & 1)
            if T1 == 0:
                if QUERIES == 1:
                    barrier()
                    _ask_queries(
                        q_desc0, q_desc1, q0s, q1s, q_full, sizes, t + CONSUMERS, many,
                        gl.to_tensor(WHO), D1, CHUNK,
                    )  # fmt: skip
                o0, o1 = _issue_values(a, v0.index(old), v1.index(old), o0, o1, D1)
                o0, o1 = _settle_values(o0, o1, a, D1)
                barrier()
                mbarrier.arrive(v_empty.index(old), count=1, pred=last)
            else:
                col = full_blocks * BLOCK
                mbarrier.wait(t_full.index(tail), turn // TAILS & 1)
                a, o0, o1, high, total = _step(
                    q0, q1, mk0.index(tail), mk1.index(tail), v0.index(old), v1.index(old),
                    a, o0, o1, high, total, scale, M - col, base, bias_row, col, N, M, bias_n,
                    turn_bars, beat, WHO, TURNS, D1, T2 == 0, BIASED,
                )  # fmt: skip
                beat += 1
                barrier()
                mbarrier.arrive(v_empty.index(old), count=1, pred=last)
                last_v0 = mv0.index(tail)
                last_v1 = mv1.index(tail)
                if T2 > 0:
                    a, o0, o1, high, total = _step(
                        q0, q1, ek0.index(tail), ek1.index(tail), last_v0, last_v1,
                        a, o0, o1, high, total, scale, M - col - T1, base, bias_row, col + T1,
                        N, M, bias_n, turn_bars, beat, WHO, TURNS, D1, True, BIASED,
                    )  # fmt: skip
                    beat += 1
                    last_v0 = ev0.index(tail)
                    last_v1 = ev1.index(tail)
                if QUERIES == 1:
                    barrier()
                    _ask_queries(
                        q_desc0, q_desc1, q0s, q1s, q_full, sizes, t + CONSUMERS, many,
                        gl.to_tensor(WHO), D1, CHUNK,
                    )  # fmt: skip
                o0, o1 = _issue_values(a, last_v0, last_v1, o0, o1, D1)
                o0, o1 = _settle_values(o0, o1, a, D1)
                barrier()
                mbarrier.arrive(t_empty.index(tail), count=1, pred=last)

            weight = gl.sum(total, axis=1)
            if BIASED:
                # a query that may look nowhere has a sum of 0 and gets zeros
                norm = 1.0 / gl.where(weight == 0.0, 1.0, weight)
                high = gl.where(weight == 0.0, float("inf"), high)
            else:
                norm = 1.0 / weight
            out_head = out + image.to(gl.int64) * N * H * D + head * D
            first = block * ROWS
            factor = norm if inverse is None else norm * inverse
            put_rows(out_head, first, H * D, o0 * like_rows(factor, o0), N, D, DTYPE)
            if D1 > 0:
                put_rows(out_head + D0, first, H * D, o1 * like_rows(factor, o1), N, D - D0, DTYPE)
            if STATS:
                rows = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, NARROW))
                heads = items // chunks
                stat = stat_ptr + (image * H + head).to(gl.int64) * N
                gl.store(stat + rows, high, mask=rows < N)
                gl.store(stat + heads.to(gl.int64) * N + rows, norm, mask=rows < N)
        else:
            # no such block of queries (the last item of a head): let the keys pass
            if QUERIES == 1:
                barrier()
                _ask_queries(
                    q_desc0, q_desc1, q0s, q1s, q_full, sizes, t + CONSUMERS, many,
                    gl.to_tensor(WHO), D1, CHUNK,
                )  # fmt: skip
            for j in range(full_blocks):
                slot = (step + j) % STAGES
                mbarrier.wait(k_full.index(slot), (step + j) // STAGES & 1)
                mbarrier.wait(v_full.index(slot), (step + j) // STAGES & 1)
                if TURNS:  # noqa: SIM102 - with `and` the constant would be a tensor
                    if j > 0:
                        mbarrier.wait(turn_bars.index(WHO), beat & 1 ^ (1 if WHO == 0 else 0))
                        barrier()
                        mbarrier.arrive(turn_bars.index((WHO + 1) % CONSUMERS), count=1)
                        beat += 1
                barrier()
                mbarrier.arrive(k_empty.index(slot), count=1, pred=last)
                mbarrier.arrive(v_empty.index(slot), count=1, pred=last)
            if T1 > 0:
                mbarrier.wait(t_full.index(tail), turn // TAILS & 1)
                if TURNS:
                    for _ in gl.static_range(2 if T2 > 0 else 1):
                        mbarrier.wait(turn_bars.index(WHO), beat & 1 ^ (1 if WHO == 0 else 0))
                        barrier()
                        mbarrier.arrive(turn_bars.index((WHO + 1) % CONSUMERS), count=1)
                        beat += 1
                barrier()
                mbarrier.arrive(t_empty.index(tail), count=1, pred=last)
        done += 1


@gluon.jit(do_not_specialize=SIZES)
def attention_long_kernel(
    q_desc0,  # TMA descriptors with layouts: queries in boxes of 64 rows, D0 channels
    q_desc1,  # the D1 channels after those; here and below any where D1 is 0
    k_desc0,  # keys in boxes of BLOCK rows
    k_desc1,
    mk_desc0,  # of T1 rows; any where that is 0
    mk_desc1,
    ek_desc0,  # of T2 rows
    ek_desc1,
    v_desc0,  # values likewise; None for packed qkv
    v_desc1,
    mv_desc0,
    mv_desc1,
    ev_desc0,
    ev_desc1,
    out,  # [B, N, H, D]
    stat_ptr,  # STATS: [2, B, H, N] each query's maximum and 1 / sum of its weights; else any
    bias_ptr,  # BIASED: values to add to the scores or bool, [N, M] of each head; else any
    N,
    H,
    items,  # B * H * chunks
    chunks,  # of queries in a head, CHUNK blocks each
    full_blocks,  # of keys, at least 1
    blocks,  # of queries in a head
    bias_b,  # strides along B, H and N; that along M is 1
    bias_h,
    bias_n,
    scale,  # of the scores, times log2 e; above 0
    M,  # None for N
    inverse,  # of the scale of `out`, which is e4m3 then; or None
    D: gl.constexpr,
    D1: gl.constexpr,
    T1: gl.constexpr,
    T2: gl.constexpr,
    CHUNK: gl.constexpr,
    STAGES: gl.constexpr,  # slots of the ring
    TAILS: gl.constexpr,  # slots for the smaller blocks
    QUERIES: gl.constexpr,  # blocks of queries that a consumer has room for, 1 or 2
    TURNS: gl.constexpr,
    STATS: gl.constexpr,
    BIASED: gl.constexpr,
    REGISTERS: gl.constexpr,  # a thread of consumer 1
    LOAD_REGISTERS: gl.constexpr,  # a thread of the loading warp
):
    ROWS: gl.constexpr = q_desc0.block_type.shape[1]
    BLOCK: gl.constexpr = k_desc0.block_type.shape[1]
    D0: gl.constexpr = k_desc0.block_type.shape[3]
    DTYPE: gl.constexpr = q_desc0.block_type.element_ty
    PACKED: gl.constexpr = v_desc0 is None
    gl.static_assert(STAGES >= 2)
    if PACKED:
        v_desc0 = k_desc0
        v_desc1 = k_desc1
        mv_desc0 = mk_desc0
        mv_desc1 = mk_desc1
        ev_desc0 = ek_desc0
        ev_desc1 = ek_desc1
    if M is None:
        M = N
    q0s = gl.allocate_shared_memory(DTYPE, [CONSUMERS * QUERIES, 1, ROWS, 1, D0], q_desc0.layout)
    k0 = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK, 1, D0], k_desc0.layout)
    v0 = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK, 1, D0], k_desc0.layout)
    q1s = q0s
    k1 = k0
    v1 = v0
    mk0 = k0
    mv0 = k0
    ek0 = k0
    ev0 = k0
    if D1 > 0:
        q1s = gl.allocate_shared_memory(
            DTYPE, [CONSUMERS * QUERIES, 1, ROWS, 1, D1], q_desc1.layout
        )
        k1 = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK, 1, D1], k_desc1.layout)
        v1 = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK, 1, D1], k_desc1.layout)
    if T1 > 0:
        mk0 = gl.allocate_shared_memory(DTYPE, [TAILS, 1, T1, 1, D0], mk_desc0.layout)
        mv0 = gl.allocate_shared_memory(DTYPE, [TAILS, 1, T1, 1, D0], mk_desc0.layout)
    if T2 > 0:
        ek0 = gl.allocate_shared_memory(DTYPE, [TAILS, 1, T2, 1, D0], ek_desc0.layout)
        ev0 = gl.allocate_shared_memory(DTYPE, [TAILS, 1, T2, 1, D0], ek_desc0.layout)
    mk1 = mk0
    mv1 = mv0
    ek1 = ek0
    ev1 = ev0
    if D1 > 0 and T1 > 0:
        mk1 = gl.allocate_shared_memory(DTYPE, [TAILS, 1, T1, 1, D1], mk_desc1.layout)
        mv1 = gl.allocate_shared_memory(DTYPE, [TAILS, 1, T1, 1, D1], mk_desc1.layout)
    if D1 > 0 and T2 > 0:
        ek1 = gl.allocate_shared_memory(DTYPE, [TAILS, 1, T2, 1, D1], ek_desc1.layout)
        ev1 = gl.allocate_shared_memory(DTYPE, [TAILS, 1, T2, 1, D1], ek_desc1.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    t_full = gl.allocate_shared_memory(gl.int64, [TAILS, 1], mbarrier.MBarrierLayout())
    t_empty = gl.allocate_shared_memory(gl.int64, [TAILS, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(
        gl.int64, [CONSUMERS * QUERIES, 1], mbarrier.MBarrierLayout()
    )
    turn_bars = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(TAILS):
        mbarrier.init(t_full.index(i), count=1)
        mbarrier.init(t_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(CONSUMERS * QUERIES):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turn_bars.index(i), count=1)
    fence_async_shared()
    barrier()

    q_descs = (q_desc0, q_desc1)
    k_descs = (k_desc0, k_desc1, mk_desc0, mk_desc1, ek_desc0, ek_desc1)
    v_descs = (v_desc0, v_desc1, mv_desc0, mv_desc1, ev_desc0, ev_desc1)
    queries = (q0s, q1s)
    rings = (k0, k1, v0, v1, mk0, mk1, mv0, mv1, ek0, ek1, ev0, ev1)
    bars = (k_full, v_full, k_empty, v_empty, t_full, t_empty, q_full, turn_bars)
    sizes = (items, chunks, full_blocks, blocks, H, N, M)
    bias_strides = (bias_b, bias_h, bias_n)
    # a tuple with a name would turn constants into tensors, so each call spells them out
    gl.warp_specialize(
        [
            (_take_blocks, (
                out, stat_ptr, bias_ptr, q_descs, queries, rings, bars, sizes, bias_strides,
                scale, inverse, 0, D, D1, T1, T2, CHUNK, STAGES, TAILS, QUERIES, TURNS, STATS,
                BIASED,
            )),
            (_take_blocks, (
                out, stat_ptr, bias_ptr, q_descs, queries, rings, bars, sizes, bias_strides,
                scale, inverse, 1, D, D1, T1, T2, CHUNK, STAGES, TAILS, QUERIES, TURNS, STATS,
                BIASED,
            )),
            (_bring_keys, (
                k_descs, v_descs, rings, bars, sizes, D1, T1, T2, STAGES, TAILS, PACKED,
            )),
        ],
        [4, 1], [REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
