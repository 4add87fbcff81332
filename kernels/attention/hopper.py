"""softmax(q k^T * scale) v on Hopper for up to 272 keys, in Gluon.

All the scores of 64 queries stay in registers: the keys are cut in up to three powers of two of
which the last alone is masked (197 = 128 + 64 + 5 of 16), so there is one maximum, no rescaling and
no loop over keys. Scores stay in base 2: exp(s * scale) = exp2(s * scale * log2 e).

roles: persistent. One warp brings the next heads, whole, while one or two consumers (warpgroups)
       work.
head:  for few heads. One block of threads per head or part of its queries: keys and values come
       once and stay, queries through a ring of two.

q, k and v are read through TMA descriptors of [B, tokens, heads, D] in boxes [1, rows, 1, WIDTH].
WIDTH is D or the next power of two: D is the tensor's last dimension, so that channels past a
head's last arrive as zeros although heads are neighbours in memory, and so do rows past an image's
last. Packed qkv is one tensor of 3 H heads, and k's descriptors are v's too.

Barriers of the roles, each with the parity of its use: full[s], the head in stage s has landed (one
arrival and its bytes); empty[s], every consumer is done with it.

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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

# what differs from call to call does not make another kernel
SIZES = ("N", "M", "H", "heads", "items")


# --------------------------------------------------------------------------- products


@gluon.jit
def _issue_scores(q, k0, k1, k2, P0: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr):
    """The products q k^T of all parts, in flight. Parts of size 0 are copies of part 0."""
    W: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = q.shape[0]
    L0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, P0, 16])
    s0 = warpgroup_mma(
        q, matrix_of(k0).permute((1, 0)), gl.zeros([ROWS, P0], gl.float32, L0),
        use_acc=False, is_async=True,
    )  # fmt: skip
    s1 = s0
    s2 = s0
    if P1 > 0:
        L1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, P1, 16])
        s1 = warpgroup_mma(
            q, matrix_of(k1).permute((1, 0)), gl.zeros([ROWS, P1], gl.float32, L1),
            use_acc=False, is_async=True,
        )  # fmt: skip
    if P2 > 0:
        L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, P2, 16])
        s2 = warpgroup_mma(
            q, matrix_of(k2).permute((1, 0)), gl.zeros([ROWS, P2], gl.float32, L2),
            use_acc=False, is_async=True,
        )  # fmt: skip
    return s0, s1, s2


@gluon.jit
def _settle_scores(s0, s1, s2, M, P0: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr):
    """Waits for the products and returns them with each row's maximum (per thread of 16 columns:
    the exchange between threads comes once, for all parts)."""
    NARROW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 16, 16])
    AFTER0: gl.constexpr = (1 if P1 > 0 else 0) + (1 if P2 > 0 else 0)
    AFTER1: gl.constexpr = 1 if P2 > 0 else 0
    t0 = warpgroup_mma_wait(AFTER0, deps=(s0,))
    if P1 == 0:
        t0 = hide(t0, M)
    high = narrow_max(t0, NARROW, 16)
    t1 = t0
    t2 = t0
    if P1 > 0:
        t1 = warpgroup_mma_wait(AFTER1, deps=(s1,))
        if P2 == 0:
            t1 = hide(t1, M - P0)
        high = gl.maximum(high, narrow_max(t1, NARROW, 16))
    if P2 > 0:
        t2 = warpgroup_mma_wait(0, deps=(s2,))
        t2 = hide(t2, M - P0 - P1)
        high = gl.maximum(high, narrow_max(t2, NARROW, 16))
    return t0, t1, t2, gl.max(high, axis=1)


@gluon.jit
def _issue_values(
    s0, s1, s2, high, scale, v0, v1, v2,
    P0: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Softmax weights and their product with the values, in flight: the product of one part runs
    under the exponentials of the next. Returns (product, the operands it still reads, the sums of
    the weights)."""
    W: gl.constexpr = gl.num_warps()
    WIDTH: gl.constexpr = v0.shape[3]
    ROWS: gl.constexpr = s0.shape[0]
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, WIDTH, 16])
    NARROW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, 16, 16])
    high = high * scale
    w0 = fast_exp2(s0 * scale - like_rows(high, s0))
    a0 = as_operand(w0, WIDTH, DTYPE)
    o = warpgroup_mma(
        a0, matrix_of(v0), gl.zeros([ROWS, WIDTH], gl.float32, OUT), use_acc=False, is_async=True
    )
    total = narrow_sum(w0, NARROW, 16)
    a1 = a0
    a2 = a0
    if P1 > 0:
        w1 = fast_exp2(s1 * scale - like_rows(high, s1))
        a1 = as_operand(w1, WIDTH, DTYPE)
        o = warpgroup_mma(a1, matrix_of(v1), o, is_async=True)
        total += narrow_sum(w1, NARROW, 16)
    if P2 > 0:
        w2 = fast_exp2(s2 * scale - like_rows(high, s2))
        a2 = as_operand(w2, WIDTH, DTYPE)
        o = warpgroup_mma(a2, matrix_of(v2), o, is_async=True)
        total += narrow_sum(w2, NARROW, 16)
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    return o, a0, a1, a2, gl.convert_layout(gl.sum(total, axis=1), ROW, assert_trivial=True)


@gluon.jit
def _settle_values(o, a0, a1, a2, PENDING: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr):
    """Waits for the product, with PENDING later ones still in flight. The operands are registers
    that it reads: they have to live until here."""
    if P2 > 0:
        o, a0, a1, a2 = warpgroup_mma_wait(PENDING, deps=(o, a0, a1, a2))
    elif P1 > 0:
        o, a0, a1 = warpgroup_mma_wait(PENDING, deps=(o, a0, a1))
    else:
        o, a0 = warpgroup_mma_wait(PENDING, deps=(o, a0))
    return o


@gluon.jit
def _put_block(
    out, stat_ptr, inverse, o, weight, high, scale, head, heads, first, stride, N, D: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """The output of one block of queries of head number `head` of all `heads`, and what the
    backward reads, if that is wanted."""
    norm = (1.0 if inverse is None else inverse) / weight
    put_rows(out, first, stride, o * norm[:, None], N, D, DTYPE)
    if stat_ptr is not None:
        OUT: gl.constexpr = o.type.layout
        ROW: gl.constexpr = gl.SliceLayout(1, OUT)
        base2 = gl.convert_layout(high * scale, ROW, assert_trivial=True)
        rows = first + gl.arange(0, o.shape[0], layout=ROW)
        stat = stat_ptr + head.to(gl.int64) * N
        gl.store(stat + rows, base2, mask=rows < N)
        gl.store(stat + heads.to(gl.int64) * N + rows, norm, mask=rows < N)


@gluon.jit
def _load_parts(
    desc0, desc1, desc2, b0, b1, b2, bar, image, head,
    P0: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr,
):  # fmt: skip
    """The keys or values of one head in their parts; `bar` expects the bytes already."""
    tma.async_copy_global_to_shared(desc0, [image, 0, head, 0], bar, b0)
    if P1 > 0:
        tma.async_copy_global_to_shared(desc1, [image, P0, head, 0], bar, b1)
    if P2 > 0:
        tma.async_copy_global_to_shared(desc2, [image, P0 + P1, head, 0], bar, b2)


# --------------------------------------------------------------------------- few heads


@gluon.jit
def _load_queries(
    desc, bufs, bars, step, programs, items, H, BLOCKS: gl.constexpr, SPLIT: gl.constexpr
):  # fmt: skip
    """The queries of this program's block number `step`, if there is one, into slot step % 2."""
    ROWS: gl.constexpr = bufs.shape[2]
    WIDTH: gl.constexpr = bufs.shape[4]
    item = gl.program_id(0) + step // BLOCKS * programs
    block = item % SPLIT * BLOCKS + step % BLOCKS
    head = item // SPLIT
    if item < items:
        bar = bars.index(step % 2)
        mbarrier.expect(bar, ROWS * WIDTH * 2)
        tma.async_copy_global_to_shared(
            desc, [head // H, block * ROWS, head % H, 0], bar, bufs.index(step % 2)
        )


@gluon.jit(do_not_specialize=SIZES)
def attention_head_kernel(
    q,  # TMA descriptors with layouts: queries in boxes of 64 rows
    k0,  # keys in boxes of P0 rows
    k1,  # of P1, of P2; any where that is 0
    k2,
    v0,  # values likewise; None for packed qkv
    v1,
    v2,
    out,  # [B, N, H, D]
    N,
    H,
    items,
    scale,  # of the scores, times log2 e; above 0
    M,  # None for N
    stat_ptr,  # [2, B, H, N] each query's maximum and 1 / sum of its weights, or None
    inverse,  # of the scale of `out`, which is e4m3 then, without statistics; or None
    D: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
    P2: gl.constexpr,
    BLOCKS: gl.constexpr,  # of queries per item
    SPLIT: gl.constexpr,  # items per head
    EARLY: gl.constexpr,  # launched before the launch ahead has ended
):
    """An item is BLOCKS blocks of queries of one head. Loads are issued by all of the program, so
    a buffer is free for the next one once all warps passed the barrier that follows the product
    that read it; the barriers in shared memory only count the bytes that arrive."""
    ROWS: gl.constexpr = q.block_type.shape[1]
    WIDTH: gl.constexpr = q.block_type.shape[3]
    DTYPE: gl.constexpr = q.block_type.element_ty
    BYTES: gl.constexpr = (P0 + P1 + P2) * WIDTH * 2
    PACKED: gl.constexpr = v0 is None
    if PACKED:
        v0 = k0
        v1 = k1
        v2 = k2
    if M is None:
        M = N

    q_bufs = gl.allocate_shared_memory(DTYPE, [2, 1, ROWS, 1, WIDTH], q.layout)
    k0_buf = gl.allocate_shared_memory(DTYPE, [1, 1, P0, 1, WIDTH], k0.layout).index(0)
    v0_buf = gl.allocate_shared_memory(DTYPE, [1, 1, P0, 1, WIDTH], k0.layout).index(0)
    k1_buf = k0_buf
    v1_buf = v0_buf
    k2_buf = k0_buf
    v2_buf = v0_buf
    if P1 > 0:
        k1_buf = gl.allocate_shared_memory(DTYPE, [1, 1, P1, 1, WIDTH], k1.layout).index(0)
        v1_buf = gl.allocate_shared_memory(DTYPE, [1, 1, P1, 1, WIDTH], k1.layout).index(0)
    if P2 > 0:
        k2_buf = gl.allocate_shared_memory(DTYPE, [1, 1, P2, 1, WIDTH], k2.layout).index(0)
        v2_buf = gl.allocate_shared_memory(DTYPE, [1, 1, P2, 1, WIDTH], k2.layout).index(0)
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kv_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_bars.index(i), count=1)
        mbarrier.init(kv_bars.index(i), count=1)
    fence_async_shared()
    barrier()
    k_bar = kv_bars.index(0)
    v_bar = kv_bars.index(1)

    programs = gl.num_programs(0)
    head = gl.program_id(0) // SPLIT
    mbarrier.expect(k_bar, BYTES)
    mbarrier.expect(v_bar, BYTES)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    _load_queries(q, q_bufs, q_bars, gl.to_tensor(0), programs, items, H, BLOCKS, SPLIT)
    _load_parts(
        k0, k1, k2, k0_buf, k1_buf, k2_buf, k_bar,
        head // H, head_of(head % H, H, 1, PACKED), P0, P1, P2,
    )  # fmt: skip
    _load_parts(
        v0, v1, v2, v0_buf, v1_buf, v2_buf, v_bar,
        head // H, head_of(head % H, H, 2, PACKED), P0, P1, P2,
    )  # fmt: skip
    _load_queries(q, q_bufs, q_bars, gl.to_tensor(1), programs, items, H, BLOCKS, SPLIT)

    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    for item in range(gl.program_id(0), items, programs):
        head = item // SPLIT
        out_head = out + (head // H).to(gl.int64) * N * H * D + head % H * D
        coming = (item + programs) // SPLIT  # the next item's head
        more = item + programs < items
        for block in range(BLOCKS):
            moving = more & (block == BLOCKS - 1)
            mbarrier.wait(q_bars.index(step % 2), step // 2 & 1)
            mbarrier.wait(k_bar, turn & 1)
            s0, s1, s2 = _issue_scores(
                matrix_of(q_bufs.index(step % 2)), k0_buf, k1_buf, k2_buf, P0, P1, P2
            )
            s0, s1, s2, high = _settle_scores(s0, s1, s2, M, P0, P1, P2)

            barrier()  # all warps are done with these queries, and after the last keys
            _load_queries(q, q_bufs, q_bars, step + 2, programs, items, H, BLOCKS, SPLIT)
            if moving:
                mbarrier.expect(k_bar, BYTES)
                _load_parts(
                    k0, k1, k2, k0_buf, k1_buf, k2_buf, k_bar,
                    coming // H, head_of(coming % H, H, 1, PACKED), P0, P1, P2,
                )  # fmt: skip

            mbarrier.wait(v_bar, turn & 1)
            o, a0, a1, a2, weight = _issue_values(
                s0, s1, s2, high, scale, v0_buf, v1_buf, v2_buf, P0, P1, P2, DTYPE
            )
            o = _settle_values(o, a0, a1, a2, 0, P1, P2)
            if moving:
                barrier()  # all warps are done with the values
                mbarrier.expect(v_bar, BYTES)
                _load_parts(
                    v0, v1, v2, v0_buf, v1_buf, v2_buf, v_bar,
                    coming // H, head_of(coming % H, H, 2, PACKED), P0, P1, P2,
                )  # fmt: skip
            first = (item % SPLIT * BLOCKS + block) * ROWS
            _put_block(
                out_head, stat_ptr, inverse, o, weight, high, scale, head, items // SPLIT, first,
                H * D, N, D, DTYPE,
            )  # fmt: skip
            step += 1
        turn += 1


# --------------------------------------------------------------------------- roles by warp


@gluon.jit
def _bring_heads(
    descs, buffers, full, empty, sizes,
    P0: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One warp: brings head after head, as far ahead as there are free stages."""
    q, k0, k1, k2, v0, v1, v2 = descs
    q_bufs, k0_bufs, k1_bufs, k2_bufs, v0_bufs, v1_bufs, v2_bufs = buffers
    heads, H, _, _ = sizes
    ROWS: gl.constexpr = q.block_type.shape[1]
    WIDTH: gl.constexpr = q.block_type.shape[3]
    BYTES: gl.constexpr = (BLOCKS * ROWS + 2 * (P0 + P1 + P2)) * WIDTH * 2
    turn = gl.to_tensor(0)
    for item in range(gl.program_id(0), heads, gl.num_programs(0)):
        stage = turn % STAGES
        image = item // H
        head = item % H
        bar = full.index(stage)
        # a barrier that nothing completed yet counts as past the phase before: the first use passes
        mbarrier.wait(empty.index(stage), turn // STAGES & 1 ^ 1)
        mbarrier.expect(bar, BYTES)
        _load_parts(
            k0, k1, k2, k0_bufs.index(stage), k1_bufs.index(stage), k2_bufs.index(stage), bar,
            image, head_of(head, H, 1, PACKED), P0, P1, P2,
        )  # fmt: skip
        for block in gl.static_range(BLOCKS):
            tma.async_copy_global_to_shared(
                q, [image, block * ROWS, head, 0], bar, q_bufs.index(stage * BLOCKS + block)
            )
        _load_parts(
            v0, v1, v2, v0_bufs.index(stage), v1_bufs.index(stage), v2_bufs.index(stage), bar,
            image, head_of(head, H, 2, PACKED), P0, P1, P2,
        )  # fmt: skip
        turn += 1


@gluon.jit
def _take_blocks(
    out, stat_ptr, inverse, buffers, full, empty, sizes, scale,
    WHO: gl.constexpr, CONSUMERS: gl.constexpr, D: gl.constexpr,
    P0: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """A consumer: of this program's blocks of queries, in order, every CONSUMERS-th."""
    q_bufs, k0_bufs, k1_bufs, k2_bufs, v0_bufs, v1_bufs, v2_bufs = buffers
    heads, H, N, M = sizes
    ROWS: gl.constexpr = q_bufs.shape[2]
    DTYPE: gl.constexpr = q_bufs.dtype
    PARTS: gl.constexpr = 1 + (1 if P1 > 0 else 0) + (1 if P2 > 0 else 0)
    # every consumer has to see every head
    gl.static_assert(CONSUMERS <= BLOCKS)
    gl.static_assert(STAGES >= 2)
    programs = gl.num_programs(0)
    total = (heads - gl.program_id(0) + programs - 1) // programs * BLOCKS

    if AHEAD:
        mbarrier.wait(full.index(0), 0)
        f0, f1, f2 = _issue_scores(
            matrix_of(q_bufs.index(WHO)), k0_bufs.index(0), k1_bufs.index(0), k2_bufs.index(0),
            P0, P1, P2,
        )  # fmt: skip
        s0, s1, s2, high = _settle_scores(f0, f1, f2, M, P0, P1, P2)
        for t in range(WHO, total, CONSUMERS):
            turn = t // BLOCKS
            stage = turn % STAGES
            # past the last block: this one again, whose scores nobody reads
            coming = gl.where(t + CONSUMERS < total, t + CONSUMERS, t)
            coming_turn = coming // BLOCKS
            coming_stage = coming_turn % STAGES
            o, a0, a1, a2, weight = _issue_values(
                s0, s1, s2, high, scale,
                v0_bufs.index(stage), v1_bufs.index(stage), v2_bufs.index(stage),
                P0, P1, P2, DTYPE,
            )  # fmt: skip
            mbarrier.wait(full.index(coming_stage), coming_turn // STAGES & 1)
            f0, f1, f2 = _issue_scores(
                matrix_of(q_bufs.index(coming_stage * BLOCKS + coming % BLOCKS)),
                k0_bufs.index(coming_stage), k1_bufs.index(coming_stage),
                k2_bufs.index(coming_stage), P0, P1, P2,
            )  # fmt: skip
            o = _settle_values(o, a0, a1, a2, PARTS, P1, P2)
            if coming_turn != turn:
                barrier()  # all warps are done with this head
                mbarrier.arrive(empty.index(stage), count=1)
            index = gl.program_id(0) + turn * programs
            out_head = out + (index // H).to(gl.int64) * N * H * D + index % H * D
            _put_block(
                out_head, stat_ptr, inverse, o, weight, high, scale, index, heads,
                t % BLOCKS * ROWS, H * D, N, D, DTYPE,
            )  # fmt: skip
            # products in flight must not cross the loop's end: their registers would be moved
            s0, s1, s2, high = _settle_scores(f0, f1, f2, M, P0, P1, P2)
    else:
        for t in range(WHO, total, CONSUMERS):
            turn = t // BLOCKS
            stage = turn % STAGES
            mbarrier.wait(full.index(stage), turn // STAGES & 1)
            s0, s1, s2 = _issue_scores(
                matrix_of(q_bufs.index(stage * BLOCKS + t % BLOCKS)),
                k0_bufs.index(stage), k1_bufs.index(stage), k2_bufs.index(stage), P0, P1, P2,
            )  # fmt: skip
            s0, s1, s2, high = _settle_scores(s0, s1, s2, M, P0, P1, P2)
            o, a0, a1, a2, weight = _issue_values(
                s0, s1, s2, high, scale,
                v0_bufs.index(stage), v1_bufs.index(stage), v2_bufs.index(stage),
                P0, P1, P2, DTYPE,
            )  # fmt: skip
            o = _settle_values(o, a0, a1, a2, 0, P1, P2)
            if (t + CONSUMERS) // BLOCKS != turn:
                barrier()  # all warps are done with this head
                mbarrier.arrive(empty.index(stage), count=1)
            index = gl.program_id(0) + turn * programs
            out_head = out + (index // H).to(gl.int64) * N * H * D + index % H * D
            _put_block(
                out_head, stat_ptr, inverse, o, weight, high, scale, index, heads,
                t % BLOCKS * ROWS, H * D, N, D, DTYPE,
            )  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def attention_roles_kernel(
    q,  # as of `attention_head_kernel`, to `inverse`
    k0,
    k1,
    k2,
    v0,
    v1,
    v2,
    out,
    N,
    H,
    heads,  # B * H
    scale,
    M,
    stat_ptr,
    inverse,
    D: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
    P2: gl.constexpr,
    BLOCKS: gl.constexpr,  # of queries in a head
    STAGES: gl.constexpr,  # heads in shared memory
    CONSUMERS: gl.constexpr,  # 1 or 2
    AHEAD: gl.constexpr,  # scores of the next block are made while this one's output is stored
    REGISTERS: gl.constexpr,  # a thread of consumer 1
    LOAD_REGISTERS: gl.constexpr,  # a thread of the loading warp
):
    ROWS: gl.constexpr = q.block_type.shape[1]
    WIDTH: gl.constexpr = q.block_type.shape[3]
    DTYPE: gl.constexpr = q.block_type.element_ty
    PACKED: gl.constexpr = v0 is None
    if PACKED:
        v0 = k0
        v1 = k1
        v2 = k2
    if M is None:
        M = N
    q_bufs = gl.allocate_shared_memory(DTYPE, [STAGES * BLOCKS, 1, ROWS, 1, WIDTH], q.layout)
    k0_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, 1, P0, 1, WIDTH], k0.layout)
    v0_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, 1, P0, 1, WIDTH], k0.layout)
    k1_bufs = k0_bufs
    v1_bufs = v0_bufs
    k2_bufs = k0_bufs
    v2_bufs = v0_bufs
    if P1 > 0:
        k1_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, 1, P1, 1, WIDTH], k1.layout)
        v1_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, 1, P1, 1, WIDTH], k1.layout)
    if P2 > 0:
        k2_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, 1, P2, 1, WIDTH], k2.layout)
        v2_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, 1, P2, 1, WIDTH], k2.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    barrier()

    descs = (q, k0, k1, k2, v0, v1, v2)
    buffers = (q_bufs, k0_bufs, k1_bufs, k2_bufs, v0_bufs, v1_bufs, v2_bufs)
    sizes = (heads, H, N, M)
    # a tuple with a name would turn constants into tensors, so each call spells them out
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_take_blocks, (
                    out, stat_ptr, inverse, buffers, full, empty, sizes, scale, 0, CONSUMERS, D,
                    P0, P1, P2, BLOCKS, STAGES, AHEAD,
                )),
                (_bring_heads, (
                    descs, buffers, full, empty, sizes, P0, P1, P2, BLOCKS, STAGES, PACKED,
                )),
            ],
            [1], [LOAD_REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 2)
        gl.warp_specialize(
            [
                (_take_blocks, (
                    out, stat_ptr, inverse, buffers, full, empty, sizes, scale, 0, CONSUMERS, D,
                    P0, P1, P2, BLOCKS, STAGES, AHEAD,
                )),
                (_take_blocks, (
                    out, stat_ptr, inverse, buffers, full, empty, sizes, scale, 1, CONSUMERS, D,
                    P0, P1, P2, BLOCKS, STAGES, AHEAD,
                )),
                (_bring_heads, (
                    descs, buffers, full, empty, sizes, P0, P1, P2, BLOCKS, STAGES, PACKED,
                )),
            ],
            [4, 1], [REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
