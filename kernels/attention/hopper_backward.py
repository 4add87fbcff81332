"""Gradients of attention on Hopper for up to 208 queries, 256 keys and 64 channels, in Gluon.

Persistent: one program of 8 warps for each multiprocessor, head after head. A head's q, k, v and
the gradient G of its output are in shared memory at once, so nothing is split over programs: there
are no atomics and no second pass.

Transposed throughout, (keys, queries): with S^T = K Q^T and dP^T = V G^T in registers, P^T and dS^T
are left operands of dV = P^T G and dK = dS^T Q where they are. dS^T goes to shared memory once, for
dQ^T = K^T dS^T. Keys come in halves of 128, queries in parts of 64 and perhaps a last one of 16.
Rows past the last token arrive as zeros: those of K let nothing of their weights through, those of
q have an infinite log-sum-exp. Results leave from buffers whose content is used up: dV from V's, dQ
from G's, dK from K's.

Operands and results are TMA descriptors as those of `hopper.py`, in boxes 64 channels wide. One
barrier each counts the bytes of G, q, K and V that arrive, with the parity of the program's turn. A
buffer that threads wrote, or that they are done with, is given to a copy after a fence and a
`barrier` of all warps.

Source: FlashAttention-2 (arXiv:2307.08691), algorithm 2; the formulas are `kernel_backward.py`'s.
Legend: B batch, H heads, N queries, D head dimension.
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
    matrix_of,
)


@gluon.jit
def _load_queries(
    desc, desc_last, bufs, last, bar, image, head, PARTS: gl.constexpr, LAST: gl.constexpr
):
    """Rows of one head of q or G."""
    PART: gl.constexpr = bufs.shape[2]
    mbarrier.expect(bar, (PARTS * PART + LAST) * bufs.shape[4] * 2)
    for part in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(desc, [image, part * PART, head, 0], bar, bufs.index(part))
    if LAST > 0:
        tma.async_copy_global_to_shared(
            desc_last, [image, PARTS * PART, head, 0], bar, last.index(0)
        )


@gluon.jit
def _load_keys(desc, bufs, bar, image, head, HALVES: gl.constexpr):
    """Rows of one head of k or v."""
    HALF: gl.constexpr = bufs.shape[2]
    mbarrier.expect(bar, HALVES * HALF * bufs.shape[4] * 2)
    for half in gl.static_range(HALVES):
        tma.async_copy_global_to_shared(desc, [image, half * HALF, head, 0], bar, bufs.index(half))


@gluon.jit
def _fast_log2(x):
    """In one instruction, with an error of 2^-22 about."""
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _put_statistics(g_buf, delta_buf, lse_buf, out, stat, stride, norms, first, N, D: gl.constexpr):
    """delta = rowsum(G * O) and log2(sum(exp2(scores))) of some queries, to shared memory. The
    latter is the forward's maximum and 1 / sum in one, of which the difference to a score loses a
    digit of float32; weights are rounded to a half dtype."""
    ROWS: gl.constexpr = delta_buf.shape[0]
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    cols = gl.arange(0, g_buf.shape[3], layout=gl.SliceLayout(0, WIDE))
    ptrs = out + rows[:, None] * stride + cols[None, :]
    o = gl.load(ptrs, mask=(rows < N)[:, None] & (cols < D)[None, :], other=0.0).to(gl.float32)
    delta_buf.store(gl.sum(o * matrix_of(g_buf).load(WIDE).to(gl.float32), axis=1))
    peak = gl.load(stat + rows, mask=rows < N, other=float("inf"))
    norm = gl.load(stat + norms + rows, mask=rows < N, other=1.0)
    lse_buf.store(peak - _fast_log2(norm))


@gluon.jit
def _issue(k, v, q_buf, g_buf):
    """S^T and dP^T of one part of the queries, in flight."""
    KEYS: gl.constexpr = k.shape[0]
    COLS: gl.constexpr = q_buf.shape[1]
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLS, 16])
    zeros = gl.zeros([KEYS, COLS], gl.float32, TILE)
    s = warpgroup_mma(k, matrix_of(q_buf).permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, matrix_of(g_buf).permute((1, 0)), zeros, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _weigh(s, lse_buf, scale, PADDED: gl.constexpr):
    """P^T, from S^T. PADDED: some keys are past the last token; their score is 0, and a very
    negative log-sum-exp would make them infinite."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    x = s * scale - lse_buf.load(COLUMN)[None, :]
    if PADDED:
        x = gl.minimum(x, 0.0)
    return fast_exp2(x)


@gluon.jit
def _slope(p, dp, delta_buf, DTYPE: gl.constexpr):
    """dS^T."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, dp.type.layout)
    return (p * (dp - delta_buf.load(COLUMN)[None, :])).to(DTYPE)


@gluon.jit
def _half(
    k_bufs, v_bufs, q, q_last, g, g_last, ds, ds_last, delta, delta_last, lse, lse_last, scale,
    zero, WHICH: gl.constexpr, HALVES: gl.constexpr, PARTS: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """dV and dK of one half of the keys, and its dS^T in shared memory. The products of one part
    run under the exponentials of the next."""
    DTYPE: gl.constexpr = q.dtype
    HALF: gl.constexpr = k_bufs.shape[2]
    WIDTH: gl.constexpr = k_bufs.shape[4]
    COUNT: gl.constexpr = PARTS + (1 if LAST > 0 else 0)
    PADDED: gl.constexpr = WHICH == HALVES - 1
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    k = matrix_of(k_bufs.index(WHICH + zero))
    v = matrix_of(v_bufs.index(WHICH + zero))
    dv = gl.zeros([HALF, WIDTH], gl.float32, OUT)
    dk = gl.zeros([HALF, WIDTH], gl.float32, OUT)
    s, dp = _issue(k, v, q.index(zero), g.index(zero))
    a = s  # no operand of a product yet
    b = s
    for part in gl.static_range(COUNT):
        if part == 0:
            s = warpgroup_mma_wait(1, deps=(s,))
        else:
            s, dv, dk, a, b = warpgroup_mma_wait(1, deps=(s, dv, dk, a, b))
        if part < PARTS:
            p = _weigh(s, lse.index(part + zero), scale, PADDED)
            a = as_operand(p, WIDTH, DTYPE)
            dv = warpgroup_mma(a, matrix_of(g.index(part + zero)), dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            slope = _slope(p, dp, delta.index(part + zero), DTYPE)
            ds.index(WHICH * PARTS + part + zero).store(slope)
            b = as_operand(slope, WIDTH, DTYPE)
            dk = warpgroup_mma(b, matrix_of(q.index(part + zero)), dk, is_async=True)
            if part + 1 < PARTS:
                s, dp = _issue(k, v, q.index(part + 1 + zero), g.index(part + 1 + zero))
            elif LAST > 0:
                s, dp = _issue(k, v, q_last.index(zero), g_last.index(zero))
        else:
            p = _weigh(s, lse_last.index(zero), scale, PADDED)
            a = as_operand(p, WIDTH, DTYPE)
            dv = warpgroup_mma(a, matrix_of(g_last.index(zero)), dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            slope = _slope(p, dp, delta_last.index(zero), DTYPE)
            ds_last.index(WHICH + zero).store(slope)
            b = as_operand(slope, WIDTH, DTYPE)
            dk = warpgroup_mma(b, matrix_of(q_last.index(zero)), dk, is_async=True)
    dv, dk, a, b = warpgroup_mma_wait(0, deps=(dv, dk, a, b))
    return dv, dk


@gluon.jit
def _issue_dq(k, ds, first, zero, HALVES: gl.constexpr, STEP: gl.constexpr):
    """dQ^T of one part of the queries, in flight: K^T dS^T over the halves of the keys, whose dS^T
    are STEP buffers apart."""
    WIDTH: gl.constexpr = k.shape[4]
    COLS: gl.constexpr = ds.shape[2]
    TILE: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, gl.num_warps() // 4], [16, COLS * 4 // gl.num_warps(), 16]
    )
    dq = gl.zeros([WIDTH, COLS], gl.float32, TILE)
    for half in gl.static_range(HALVES):
        dq = warpgroup_mma(
            matrix_of(k.index(half + zero)).permute((1, 0)), ds.index(half * STEP + first + zero),
            dq, use_acc=half > 0, is_async=True,
        )  # fmt: skip
    return dq


@gluon.jit(do_not_specialize=["N", "H", "heads"])
def attention_backward_kernel(
    q,  # TMA descriptors with layouts: queries in boxes of 64 rows
    q_last,  # of 16 rows
    g,  # gradient of the output, likewise
    g_last,
    dq,  # written
    dq_last,
    k,  # keys in boxes of 128 rows
    v,  # values likewise; None for packed qkv
    dk,  # written
    dv,  # written; None for packed qkv
    out_ptr,  # [B, N, H, D]
    stat_ptr,  # [2, B, H, N], as the forward wrote it
    N,
    H,
    heads,  # B * H
    scale,  # of the scores, times log2 e; above 0
    slope,  # of the scores; 0 for an only key, whose weight is 1 whatever its score
    D: gl.constexpr,
    HALVES: gl.constexpr,  # of 128 keys
    PARTS: gl.constexpr,  # of 64 queries, at least one
    LAST: gl.constexpr,  # queries after those: 16 or 0
):
    PART: gl.constexpr = q.block_type.shape[1]
    HALF: gl.constexpr = k.block_type.shape[1]
    WIDTH: gl.constexpr = k.block_type.shape[3]
    DTYPE: gl.constexpr = k.block_type.element_ty
    COUNT: gl.constexpr = PARTS + (1 if LAST > 0 else 0)
    PACKED: gl.constexpr = v is None
    if PACKED:
        v = k
        dv = dk
    S: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, PART], DTYPE)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_bufs = gl.allocate_shared_memory(DTYPE, [PARTS, 1, PART, 1, WIDTH], q.layout)
    g_bufs = gl.allocate_shared_memory(DTYPE, [PARTS, 1, PART, 1, WIDTH], q.layout)
    k_bufs = gl.allocate_shared_memory(DTYPE, [HALVES, 1, HALF, 1, WIDTH], k.layout)
    v_bufs = gl.allocate_shared_memory(DTYPE, [HALVES, 1, HALF, 1, WIDTH], k.layout)
    ds = gl.allocate_shared_memory(DTYPE, [HALVES * PARTS, HALF, PART], S)
    delta = gl.allocate_shared_memory(gl.float32, [PARTS, PART], LINE)
    lse = gl.allocate_shared_memory(gl.float32, [PARTS, PART], LINE)
    q_rest = q_bufs
    g_rest = g_bufs
    ds_rest = ds
    delta_rest = delta
    lse_rest = lse
    if LAST > 0:
        S_LAST: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, LAST], DTYPE)
        q_rest = gl.allocate_shared_memory(DTYPE, [1, 1, LAST, 1, WIDTH], q_last.layout)
        g_rest = gl.allocate_shared_memory(DTYPE, [1, 1, LAST, 1, WIDTH], q_last.layout)
        ds_rest = gl.allocate_shared_memory(DTYPE, [HALVES, HALF, LAST], S_LAST)
        delta_rest = gl.allocate_shared_memory(gl.float32, [1, LAST], LINE)
        lse_rest = gl.allocate_shared_memory(gl.float32, [1, LAST], LINE)
    bars = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    barrier()
    q_bar = bars.index(0)
    k_bar = bars.index(1)
    v_bar = bars.index(2)
    g_bar = bars.index(3)

    programs = gl.num_programs(0)
    image = gl.program_id(0) // H
    head = gl.program_id(0) % H
    _load_queries(g, g_last, g_bufs, g_rest, g_bar, image, head, PARTS, LAST)
    _load_queries(q, q_last, q_bufs, q_rest, q_bar, image, head, PARTS, LAST)
    _load_keys(k, k_bufs, k_bar, image, head_of(head, H, 1, PACKED), HALVES)
    _load_keys(v, v_bufs, v_bar, image, head_of(head, H, 2, PACKED), HALVES)
    turn = gl.to_tensor(0)
    for item in range(gl.program_id(0), heads, programs):
        # 0, which the compiler does not know: else it would compute the addresses of all operands
        # once, before the loop, and keep them in local memory; so in each section of the loop
        zero = turn >> 30
        image = item // H
        head = item % H
        more = item + programs < heads
        next_image = (item + programs) // H
        next_head = (item + programs) % H
        out = out_ptr + image.to(gl.int64) * N * H * D + head * D
        stat = stat_ptr + item.to(gl.int64) * N
        norms = (heads + zero).to(gl.int64) * N
        mbarrier.wait(g_bar, turn & 1)
        for part in gl.static_range(PARTS):
            _put_statistics(
                g_bufs.index(part + zero), delta.index(part + zero), lse.index(part + zero), out,
                stat, H * D, norms, part * PART, N, D,
            )  # fmt: skip
        if LAST > 0:
            _put_statistics(
                g_rest.index(zero), delta_rest.index(zero), lse_rest.index(zero), out, stat, H * D,
                norms, PARTS * PART, N, D,
            )  # fmt: skip
        mbarrier.wait(q_bar, turn & 1)
        mbarrier.wait(k_bar, turn & 1)
        mbarrier.wait(v_bar, turn & 1)

        dv_sums, dk_sums = _half(
            k_bufs, v_bufs, q_bufs, q_rest, g_bufs, g_rest, ds, ds_rest, delta, delta_rest, lse,
            lse_rest, scale, zero, 0, HALVES, PARTS, LAST,
        )  # fmt: skip
        matrix_of(v_bufs.index(zero)).store(dv_sums.to(DTYPE))
        dk_low = (dk_sums * slope).to(DTYPE)
        dk_high = dk_low
        zero1 = turn >> 29
        if HALVES > 1:
            dv_sums, dk_sums = _half(
                k_bufs, v_bufs, q_bufs, q_rest, g_bufs, g_rest, ds, ds_rest, delta, delta_rest,
                lse, lse_rest, scale, zero1, 1, HALVES, PARTS, LAST,
            )  # fmt: skip
            matrix_of(v_bufs.index(1 + zero1)).store(dv_sums.to(DTYPE))
            dk_high = (dk_sums * slope).to(DTYPE)
        fence_async_shared()
        barrier()  # all warps are done with q, G and V, and their dS^T and dV are there
        for half in gl.static_range(HALVES):
            tma.async_copy_shared_to_global(
                dv, [image, half * HALF, head_of(head, H, 2, PACKED), 0],
                v_bufs.index(half + zero1),
            )  # fmt: skip
        if more:
            _load_queries(q, q_last, q_bufs, q_rest, q_bar, next_image, next_head, PARTS, LAST)

        zero2 = turn >> 28
        sums = ()
        for part in gl.static_range(PARTS):
            sums += (_issue_dq(k_bufs, ds, part, zero2, HALVES, PARTS),)
        if LAST > 0:
            sums += (_issue_dq(k_bufs, ds_rest, 0, zero2, HALVES, 1),)
        sums = warpgroup_mma_wait(0, deps=sums)
        if COUNT == 1:
            sums = (sums,)
        for part in gl.static_range(COUNT):
            buf = g_bufs.index(part + zero2) if part < PARTS else g_rest.index(zero2)
            matrix_of(buf).permute((1, 0)).store((sums[part] * slope).to(DTYPE))
        barrier()  # all warps are done with K
        matrix_of(k_bufs.index(zero2)).store(dk_low)
        if HALVES > 1:
            matrix_of(k_bufs.index(1 + zero2)).store(dk_high)
        fence_async_shared()
        barrier()  # dQ and dK are there
        for part in gl.static_range(PARTS):
            tma.async_copy_shared_to_global(
                dq, [image, part * PART, head, 0], g_bufs.index(part + zero2)
            )
        if LAST > 0:
            tma.async_copy_shared_to_global(
                dq_last, [image, PARTS * PART, head, 0], g_rest.index(zero2)
            )
        for half in gl.static_range(HALVES):
            tma.async_copy_shared_to_global(
                dk, [image, half * HALF, head_of(head, H, 1, PACKED), 0],
                k_bufs.index(half + zero2),
            )  # fmt: skip
        if more:
            tma.store_wait(COUNT + HALVES)  # dV has been read
            _load_keys(v, v_bufs, v_bar, next_image, head_of(next_head, H, 2, PACKED), HALVES)
            tma.store_wait(HALVES)  # dQ has been read
            _load_queries(g, g_last, g_bufs, g_rest, g_bar, next_image, next_head, PARTS, LAST)
            tma.store_wait(0)  # dK has been read
            _load_keys(k, k_bufs, k_bar, next_image, head_of(next_head, H, 1, PACKED), HALVES)
        turn += 1
    tma.store_wait(0)
