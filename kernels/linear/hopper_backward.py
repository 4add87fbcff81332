"""Gradients of y = x W^T + b on Hopper, in Gluon, without atomics.

`hopper_input_gradient_kernel`: out = G W, or (G W) * act'(pre), then also the sums of out's columns
and act(pre) once more: an MLP's gradient through its activation. `hopper.py`'s protocol; W comes as
the layer keeps it, so the tensor core reads it transposed, and pre comes as a residual does, into
the buffer that out leaves from.

`hopper_weight_product_kernel`: G^T x and the sums of G's columns, both operands transposed by the
tensor core. A table cuts the tiles along M (`hopper_backward_plan.schedule`) so that all
multiprocessors have as much to do and those at work at one time read the same rows, which the L2
cache holds. Each piece leaves a float32 tile; `sum_pieces_kernel` adds them, always in one order.

Sums of columns are products with eight columns of ones, the narrowest there is: the rounded tile
lies in shared memory already, so they cost no shuffles and hardly a register.

Legend: M rows (batch x tokens), N output features, K input features of the layer.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastvit.kernels._activations import activate_with_slope
from fastvit.kernels.attention.hopper_parts import fast_exp2
from fastvit.kernels.linear.hopper_parts import (
    CONSUMERS,
    advance,
    columns,
    load_operands,
    load_residual,
    multiply,
    new_barriers,
    normal_cdf,
    tile_of,
    tile_product,
)

# --------------------------------------------------------------------------- gradient of the input


@gluon.jit(do_not_specialize=["M"])
def hopper_input_gradient_kernel(
    grad,  # TMA descriptors with layouts: G [M, N] in boxes [ROWS, BLOCK_N]
    weight,  # [N, K] in boxes [BLOCK_N, BLOCK_K]
    out,  # [M, K] in boxes [ROWS, COLS]
    pre,  # as out, or None
    hidden,  # as out, or None: gets act(pre)
    sums,  # float32 [parts, K] or None: of out's columns, over each consumer's ROWS rows
    factor,  # float32 [1] or None, of G W
    M,
    N,
    K,
    ACTIVATION: gl.constexpr,
    PINGPONG: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,  # slots of the ring
    BUFS: gl.constexpr,  # buffers of out for each consumer
    REGISTERS: gl.constexpr,  # a thread of consumer 1
    LOAD_REGISTERS: gl.constexpr,  # a thread of a loading warp
):
    ROWS: gl.constexpr = grad.block_type.shape[0]
    BLOCK_N: gl.constexpr = grad.block_type.shape[1]
    BLOCK_K: gl.constexpr = weight.block_type.shape[1]
    COLS: gl.constexpr = out.block_type.shape[1]
    CHUNKS: gl.constexpr = BLOCK_K // COLS
    SHARE: gl.constexpr = 1 if PINGPONG else CONSUMERS
    DTYPE: gl.constexpr = grad.block_type.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    gl.static_assert(CHUNKS % BUFS == 0)
    # a buffer of pre is given back when the next band has been stored from another one
    gl.static_assert(BUFS >= 2 or pre is None)
    gl.static_assert(pre is not None or hidden is None)

    g_bufs = gl.allocate_shared_memory(DTYPE, [STAGES * SHARE, ROWS, BLOCK_N], grad.layout)
    w_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    out_bufs = gl.allocate_shared_memory(DTYPE, [CONSUMERS * BUFS, ROWS, COLS], out.layout)
    hidden_bufs = out_bufs
    if hidden is not None:
        hidden_bufs = gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, COLS], out.layout)
    ones = out_bufs
    if sums is not None:
        ones = _ones(ROWS, DTYPE)
    barriers = new_barriers(STAGES, SHARE, CONSUMERS * BUFS)

    tiles_m = gl.cdiv(M, ROWS * SHARE)
    tiles_k = gl.cdiv(K, BLOCK_K)
    buffers = (g_bufs, w_bufs, out_bufs)
    sizes = (tiles_m, tiles_k, gl.cdiv(N, BLOCK_N), K)
    if pre is not None:
        gl.warp_specialize(
            [
                (_consume, (
                    out, hidden, sums, factor, buffers, hidden_bufs, ones, barriers, sizes, True,
                    ACTIVATION, 0, PINGPONG, GROUP_M, STAGES, CHUNKS, BUFS,
                )),
                (_consume, (
                    out, hidden, sums, factor, buffers, hidden_bufs, ones, barriers, sizes, True,
                    ACTIVATION, 1, PINGPONG, GROUP_M, STAGES, CHUNKS, BUFS,
                )),
                (load_operands, (
                    grad, weight, buffers, barriers, sizes, GROUP_M, STAGES, SHARE, True,
                )),
                (load_residual, (
                    pre, buffers, barriers, sizes, 0, PINGPONG, GROUP_M, CHUNKS, BUFS,
                )),
                (load_residual, (
                    pre, buffers, barriers, sizes, 1, PINGPONG, GROUP_M, CHUNKS, BUFS,
                )),
            ],
            [WARPS, 1, 1, 1],
            [REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    out, hidden, sums, factor, buffers, hidden_bufs, ones, barriers, sizes, False,
                    ACTIVATION, 0, PINGPONG, GROUP_M, STAGES, CHUNKS, BUFS,
                )),
                (_consume, (
                    out, hidden, sums, factor, buffers, hidden_bufs, ones, barriers, sizes, False,
                    ACTIVATION, 1, PINGPONG, GROUP_M, STAGES, CHUNKS, BUFS,
                )),
                (load_operands, (
                    grad, weight, buffers, barriers, sizes, GROUP_M, STAGES, SHARE, True,
                )),
            ],
            [WARPS, 1],
            [REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip


@gluon.jit
def _consume(
    out, hidden, sums, factor, buffers, hidden_bufs, ones, barriers, sizes,
    HAS_PRE: gl.constexpr, ACTIVATION: gl.constexpr, CONSUMER: gl.constexpr,
    PINGPONG: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr,
    BUFS: gl.constexpr,
):  # fmt: skip
    """A warpgroup: multiplies, finishes and stores its part of each tile."""
    g_bufs, w_bufs, out_bufs = buffers
    _, _, pre_full, pre_empty, _ = barriers
    tiles_m, tiles_k, steps, K = sizes
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = g_bufs.shape[1]
    BLOCK_K: gl.constexpr = w_bufs.shape[2]
    COLS: gl.constexpr = BLOCK_K // CHUNKS
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_K, 16])
    BAND: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 8, 16])
    SHARE: gl.constexpr = 1 if PINGPONG else CONSUMERS  # consumers on one tile
    OFFSET: gl.constexpr = 0 if PINGPONG else CONSUMER
    TURNS: gl.constexpr = CONSUMERS if PINGPONG else 1  # tiles from one of its own to the next
    TURN: gl.constexpr = CONSUMER if PINGPONG else 0
    USES: gl.constexpr = CHUNKS // BUFS  # of each buffer of out in a tile
    STORES: gl.constexpr = 2 if hidden is not None else 1  # of a band

    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, ACC)
    step = gl.to_tensor(0) + TURN * steps  # of the ring, where this tile begins
    turn = gl.to_tensor(0)  # this consumer's tiles so far
    for tile in range(
        gl.program_id(0) + TURN * gl.num_programs(0), tiles_m * tiles_k,
        TURNS * gl.num_programs(0),
    ):  # fmt: skip
        tile_m, tile_k = tile_of(tile, tiles_m, tiles_k, GROUP_M)
        stage = step % STAGES
        phase = (step // STAGES) & 1
        step += TURNS * steps
        acc = tile_product(
            zeros, stage, phase, turn, steps, buffers, barriers, HAS_PRE, CONSUMER, PINGPONG,
            STAGES, BUFS, 0, True,
        )  # fmt: skip

        part = tile_m * SHARE + OFFSET
        row = part * ROWS
        bands = columns(acc, CHUNKS, BAND)
        for chunk in gl.static_range(CHUNKS):
            col = (tile_k * CHUNKS + chunk) * COLS
            which = CONSUMER * BUFS + chunk % BUFS
            value = bands[chunk]
            if factor is not None:
                value *= gl.load(factor)
            buf = out_bufs.index(which)
            if HAS_PRE:
                mbarrier.wait(pre_full.index(which), (turn * USES + chunk // BUFS) & 1)
                activated, slope = _with_slope(buf.load(BAND).to(gl.float32), ACTIVATION)
                value *= slope
            else:
                tma.store_wait(BUFS - 1)
            if hidden is not None:
                # all but the last store, that of out, so that of the last hidden too
                tma.store_wait(1)
                hidden_bufs.index(CONSUMER).store(activated.to(buf.dtype))
            buf.store(value.to(buf.dtype))
            fence_async_shared()
            if hidden is not None:
                tma.async_copy_shared_to_global(hidden, [row, col], hidden_bufs.index(CONSUMER))
            tma.async_copy_shared_to_global(out, [row, col], buf)
            if sums is not None:
                total = _sum_product(buf, ones, gl.zeros([COLS, 8], gl.float32, SUMS), True)
                total = warpgroup_mma_wait(0, deps=(total,))
                _put_sums(sums + (part * K + col), total, K - col)
            if HAS_PRE and chunk > 0:
                # the band before has been read out: its buffer may take the next of pre
                tma.store_wait(STORES)
                mbarrier.arrive(pre_empty.index(CONSUMER * BUFS + (chunk - 1) % BUFS))
        turn += 1
    tma.store_wait(0)


@gluon.jit
def _with_slope(x, ACTIVATION: gl.constexpr):
    """act(x) and act'(x); GELU's polynomial with a density of one ex2."""
    if ACTIVATION == "gelu_polynomial":
        square = x * x
        cdf = normal_cdf(x, square)
        density = fast_exp2(square * -0.72134752 - 1.32574806)  # exp(-x^2 / 2) / sqrt(2 pi)
        return x * cdf, x * density + cdf
    else:
        return activate_with_slope(x, ACTIVATION)


# --------------------------------------------------------------------------- sums of columns


@gluon.jit
def _ones(ROWS: gl.constexpr, DTYPE: gl.constexpr):
    """[8, ROWS] in shared memory; a fence has to follow."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0])
    ones = gl.allocate_shared_memory(DTYPE, [8, ROWS], gl.NVMMASharedLayout(128, 16, 2))
    ones.store(gl.full([8, ROWS], 1.0, DTYPE, LAYOUT))
    return ones


@gluon.jit
def _sum_product(buf, ones, sums, is_first: gl.constexpr):
    """Starts sums + (sums of the columns of `buf`), [columns, 8], of which all 8 are the same."""
    return warpgroup_mma(
        buf.permute((1, 0)), ones.permute((1, 0)), sums, use_acc=not is_first, is_async=True
    )


@gluon.jit
def _put_sums(pointer, sums, there):
    """Column 0 of `sums` [columns, 8], as many as are `there`."""
    LAYOUT: gl.constexpr = sums.type.layout
    rows = gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    copy = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT))
    pointers = pointer + rows[:, None] + 0 * copy[None, :]
    gl.store(pointers, sums, mask=(rows < there)[:, None] & (copy == 0)[None, :])


# -------------------------------------------------------------------------- gradient of the weight

# numbers of a piece in the table: its tile's row and column, its first step (of BLOCK_M rows) and
# the one after its last, its slot, and likewise the steps whose sums of G it takes
PIECE = gl.constexpr(7)


@gluon.jit(do_not_specialize=["width"])
def hopper_weight_product_kernel(
    grad,  # TMA descriptors with layouts: G [M, N] in boxes [BLOCK_M, ROWS]
    x,  # [M, K] in boxes [BLOCK_M, BLOCK_K]
    pieces,  # float32 [slots, CONSUMERS * ROWS, BLOCK_K]
    sums,  # float32 [slots, CONSUMERS * ROWS] or None: of G's columns
    table,  # int32 [programs, width]: for each program the count of its pieces, then those
    width,
    STAGES: gl.constexpr,  # slots of the ring
    REGISTERS: gl.constexpr,  # a thread of consumer 1
    LOAD_REGISTERS: gl.constexpr,  # a thread of the loading warp
):
    BLOCK_M: gl.constexpr = grad.block_type.shape[0]
    ROWS: gl.constexpr = grad.block_type.shape[1]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    DTYPE: gl.constexpr = grad.block_type.element_ty
    g_bufs = gl.allocate_shared_memory(DTYPE, [STAGES * CONSUMERS, BLOCK_M, ROWS], grad.layout)
    x_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    ones = g_bufs
    if sums is not None:
        ones = _ones(BLOCK_M, DTYPE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume_rows, (
                pieces, sums, table, width, g_bufs, x_bufs, ones, full, empty, 0, STAGES,
            )),
            (_consume_rows, (
                pieces, sums, table, width, g_bufs, x_bufs, ones, full, empty, 1, STAGES,
            )),
            (_load_rows, (grad, x, table, width, g_bufs, x_bufs, full, empty, STAGES)),
        ],
        [gl.num_warps(), 1],
        [REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _load_rows(grad, x, table, width, g_bufs, x_bufs, full, empty, STAGES: gl.constexpr):
    """One warp: fills the ring, piece after piece, as far ahead as there is room."""
    BLOCK_M: gl.constexpr = grad.block_type.shape[0]
    ROWS: gl.constexpr = grad.block_type.shape[1]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    BYTES: gl.constexpr = (CONSUMERS * ROWS + BLOCK_K) * BLOCK_M * 2
    plan = table + gl.program_id(0) * width
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for i in range(gl.load(plan)):
        piece = plan + 1 + i * PIECE
        tile_n = gl.load(piece)
        tile_k = gl.load(piece + 1)
        for step in range(gl.load(piece + 2), gl.load(piece + 3)):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(bar, BYTES)
            for box in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(
                    grad, [step * BLOCK_M, (tile_n * CONSUMERS + box) * ROWS], bar,
                    g_bufs.index(stage * CONSUMERS + box),
                )  # fmt: skip
            tma.async_copy_global_to_shared(
                x, [step * BLOCK_M, tile_k * BLOCK_K], bar, x_bufs.index(stage)
            )
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _consume_rows(
    pieces, sums, table, width, g_bufs, x_bufs, ones, full, empty,
    CONSUMER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: multiplies and stores its part of each piece."""
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = g_bufs.shape[2]
    BLOCK_K: gl.constexpr = x_bufs.shape[2]
    COLS: gl.constexpr = 64
    CHUNKS: gl.constexpr = BLOCK_K // COLS
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_K, 16])
    BAND: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 8, 16])
    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, ACC)
    plan = table + gl.program_id(0) * width
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for i in range(gl.load(plan)):
        piece = plan + 1 + i * PIECE
        first = gl.load(piece + 2)
        last = gl.load(piece + 3)
        slot = gl.load(piece + 4)
        mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(
            g_bufs.index(stage * CONSUMERS + CONSUMER).permute((1, 0)), x_bufs.index(stage), zeros,
            use_acc=False, is_async=True,
        )  # fmt: skip
        if sums is not None:
            # The sums of the first step are taken here, and cleared if they are another's: so no
            # product is under a condition. Steps before, among and after the others' have a loop
            # each.
            sum_first = gl.load(piece + 5)
            sum_last = gl.load(piece + 6)
            total = _sum_product(
                g_bufs.index(stage * CONSUMERS + CONSUMER), ones,
                gl.zeros([ROWS, 8], gl.float32, SUMS), True,
            )  # fmt: skip
            acc, total = warpgroup_mma_wait(0, deps=(acc, total))
            total *= (sum_first == first).to(gl.float32)
            for _ in range(first + 1, sum_first):
                acc, stage, phase = multiply(
                    acc, stage, phase, g_bufs, x_bufs, full, empty, STAGES, CONSUMERS, CONSUMER,
                    True, False,
                )  # fmt: skip
            acc = warpgroup_mma_wait(0, deps=(acc,))
            for _ in range(gl.maximum(sum_first, first + 1), sum_last):
                before = stage
                stage, phase = advance(stage, phase, STAGES)
                mbarrier.wait(full.index(stage), phase)
                g_buf = g_bufs.index(stage * CONSUMERS + CONSUMER)
                acc = warpgroup_mma(
                    g_buf.permute((1, 0)), x_bufs.index(stage), acc, is_async=True
                )  # fmt: skip
                total = _sum_product(g_buf, ones, total, False)
                acc, total = warpgroup_mma_wait(2, deps=(acc, total))
                mbarrier.arrive(empty.index(before))
            acc, total = warpgroup_mma_wait(0, deps=(acc, total))
            _put_sums(sums + slot * (CONSUMERS * ROWS) + CONSUMER * ROWS, total, ROWS)
            for _ in range(gl.maximum(sum_last, first + 1), last):
                acc, stage, phase = multiply(
                    acc, stage, phase, g_bufs, x_bufs, full, empty, STAGES, CONSUMERS, CONSUMER,
                    True, False,
                )  # fmt: skip
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
            for _ in range(first + 1, last):
                acc, stage, phase = multiply(
                    acc, stage, phase, g_bufs, x_bufs, full, empty, STAGES, CONSUMERS, CONSUMER,
                    True, False,
                )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage))
        stage, phase = advance(stage, phase, STAGES)

        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, BAND))
        cols = gl.arange(0, COLS, layout=gl.SliceLayout(0, BAND))
        at = (slot * CONSUMERS + CONSUMER).to(gl.int64) * (ROWS * BLOCK_K)
        bands = columns(acc, CHUNKS, BAND)
        for chunk in gl.static_range(CHUNKS):
            pointers = pieces + at + chunk * COLS + rows[:, None] * BLOCK_K + cols[None, :]
            gl.store(pointers, bands[chunk])


@triton.jit
def sum_pieces_kernel(
    pieces_ptr,  # as `hopper_weight_product_kernel` leaves them
    sums_ptr,  # likewise, or None
    slots_ptr,  # int32 [tiles + 1]: each tile's first slot
    out_ptr,  # [N, K]
    sum_ptr,  # [N] with sums_ptr
    N, K,
    MOST: tl.constexpr,  # pieces of a tile
    MOST_ROW: tl.constexpr,  # and of a row of tiles
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # of a tile
    ROWS: tl.constexpr,  # of a tile, for each program
):  # fmt: skip
    """out = the sum of each tile's pieces, and of its row's sums; all loads are in flight
    together."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // (BLOCK_N // ROWS)
    part = tl.program_id(0) % (BLOCK_N // ROWS)
    tile_n = tile // tiles_k
    tile_k = tile % tiles_k
    first = tl.load(slots_ptr + tile)
    count = tl.load(slots_ptr + tile + 1) - first
    rows = part * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_K)
    at = first.to(tl.int64) * (BLOCK_N * BLOCK_K)
    pointers = pieces_ptr + at + rows[:, None] * BLOCK_K + cols[None, :]
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for i in tl.static_range(MOST):
        total += tl.load(pointers + i * (BLOCK_N * BLOCK_K), mask=i < count, other=0.0)
    out_n = tile_n * BLOCK_N + rows
    out_k = tile_k * BLOCK_K + cols
    inside = (out_n < N)[:, None] & (out_k < K)[None, :]
    out_pointers = out_ptr + out_n[:, None] * K + out_k[None, :]
    tl.store(out_pointers, total.to(out_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:  # noqa: SIM102 - a constant, the condition below is none
        if tile_k == 0:
            count = tl.load(slots_ptr + tile + tiles_k) - first
            slots = tl.arange(0, MOST_ROW)
            sum_pointers = sums_ptr + (first + slots[:, None]) * BLOCK_N + rows[None, :]
            values = tl.load(sum_pointers, mask=(slots < count)[:, None], other=0.0)
            sums = tl.sum(values, axis=0)
            tl.store(sum_ptr + out_n, sums.to(sum_ptr.dtype.element_ty), mask=out_n < N)
