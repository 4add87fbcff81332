"""y = act(LN(x) W^T + b) * scale + residual of a few hundred rows on Hopper, in Gluon: one image's
forward, where most of the time goes to launches and to waiting for the first bytes.

A block of threads for each tile of 64 rows and P0 + P1 columns; its warpgroup loads for itself.

- The norm has no pass of its own. Weight and bias carry its gamma and beta, and with mean and rstd
  of a row LN(x) W^T = rstd * (x W'^T - mean * colsum), colsum the sums of W' over K. They come from
  the kernel that made x, which leaves mean and squares around it of each band of a row; bands are
  combined while the products run (Chan et al. 1983), so nothing cancels.
- Weights come first: with programmatic dependent launch the block starts while the kernel before
  still runs, and asks for what that one does not write before `gdc_wait`; x, its statistics and the
  residual follow. After it all kernels before are complete. Without the launch attribute both
  instructions do nothing.
- SPLITS > 1 cuts K. Parts of a sum go to memory, and the block that finishes a tile last adds them
  in their order, so that the bits do not depend on who that is; it clears the tile's count.
- `coming` are weights that a later kernel reads: each block asks for its share of them to be
  brought into the L2 cache, and waits for nothing.

Barriers: full[s], slot s of the ring has landed (one arrival and its bytes, of W and x together). A
slot is filled again one step late, when the products after those that read it have been issued.

Legend: M rows (batch x tokens), N output features, K input features.
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastvit.kernels._activations import activate
from fastvit.kernels.attention.hopper_parts import barrier
from fastvit.kernels.linear.hopper_parts import advance, normal_cdf

ROWS = gl.constexpr(64)  # of a tile
BANDS = gl.constexpr(32)  # room for the bands of a row's statistics
UNIT = gl.constexpr(512)  # bytes that one thread asks the L2 cache for


@gluon.jit(do_not_specialize=["M", "bands", "units"])
def hopper_small_linear_kernel(
    x,  # TMA descriptors with layouts: x [K / 64, M, 64] in boxes [CHUNKS, ROWS, 64]
    weight0,  # [K / 64, N, 64] in boxes [CHUNKS, P0, 64]
    weight1,  # the same in boxes of P1, or None for P1 = 0
    y,  # [M, N]
    bias,  # [N] or None
    colsum,  # float32 [N] of a norm that is folded into the weight, or None
    scale,  # [N] or None
    residual,  # [M, N] or None
    statistics,  # float32 [2, rows of all tiles, BANDS] of x's `bands`, or None without colsum
    out_statistics,  # likewise: gets those of y's N / (P0 + P1) bands, or None
    work,  # float32 [tiles, SPLITS, ROWS, P0 + P1], or None for SPLITS = 1
    count,  # int32 [tiles], zeros before and after, or None
    coming,  # or None
    units,  # of `coming`
    M,
    bands,
    N: gl.constexpr,
    K: gl.constexpr,
    EPS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    STEPS: gl.constexpr,  # of one split, CHUNKS * 64 of K each
    STAGES: gl.constexpr,  # slots of the ring
    SPLITS: gl.constexpr,
):
    CHUNKS: gl.constexpr = x.block_type.shape[0]
    DTYPE: gl.constexpr = x.block_type.element_ty
    P0: gl.constexpr = weight0.block_type.shape[1]
    P1: gl.constexpr = 0 if weight1 is None else weight1.block_type.shape[1]
    BLOCK_N: gl.constexpr = P0 + P1
    L0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, P0, 16])
    NORM: gl.constexpr = colsum is not None
    gl.static_assert(STAGES <= STEPS)

    x_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, CHUNKS, ROWS, 64], x.layout)
    w0_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, CHUNKS, P0, 64], weight0.layout)
    w1_bufs = w0_bufs
    if P1 > 0:
        w1_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, CHUNKS, P1, 64], weight1.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()

    tiles_m = gl.cdiv(M, ROWS)  # blocks beside each other share weights
    tile = gl.program_id(0) % (tiles_m * (N // BLOCK_N))
    split = gl.program_id(0) // (tiles_m * (N // BLOCK_N))
    row = tile % tiles_m * ROWS
    band = tile // tiles_m
    col = band * BLOCK_N
    chunk = split * (STEPS * CHUNKS)

    # what the kernel before does not write
    for step in gl.static_range(STAGES):
        _load_weights(
            weight0, weight1, w0_bufs, w1_bufs, full, chunk + step * CHUNKS, col, step, True
        )
    gdc_launch_dependents()
    bias0 = _of_columns(bias, col, P0, L0)
    scale0 = _of_columns(scale, col, P0, L0)
    colsum0 = _of_columns(colsum, col, P0, L0)
    if P1 > 0:
        L1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, P1, 16])
        bias1 = _of_columns(bias, col + P0, P1, L1)
        scale1 = _of_columns(scale, col + P0, P1, L1)
        colsum1 = _of_columns(colsum, col + P0, P1, L1)
    gdc_wait()

    for step in gl.static_range(STAGES):
        _load_x(x, x_bufs, full, chunk + step * CHUNKS, row, step, True)
    if coming is not None:
        _bring(coming, units)
    if SPLITS == 1:
        added0 = _of_tile(residual, bias0, row, col, M, N, P0, L0)
        if P1 > 0:
            added1 = _of_tile(residual, bias1, row, col + P0, M, N, P1, L1)
    if NORM:
        STAT: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [gl.num_warps(), 1], [1, 0])
        stat_bands = gl.arange(0, BANDS, layout=gl.SliceLayout(0, STAT))
        stat_rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STAT))
        stat_at = statistics + stat_rows[:, None] * BANDS + stat_bands[None, :]
        means = gl.load(stat_at)
        squares = gl.load(stat_at + tiles_m * (ROWS * BANDS))

    acc0 = gl.zeros([ROWS, P0], gl.float32, L0)
    if P1 > 0:
        acc1 = gl.zeros([ROWS, P1], gl.float32, L1)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for step in range(STEPS):
        mbarrier.wait(full.index(slot), phase)
        for j in gl.static_range(CHUNKS):
            operand = _chunk(x_bufs.index(slot), j)
            columns = _chunk(w0_bufs.index(slot), j).permute((1, 0))
            acc0 = warpgroup_mma(operand, columns, acc0, is_async=True)
            if P1 > 0:
                columns = _chunk(w1_bufs.index(slot), j).permute((1, 0))
                acc1 = warpgroup_mma(operand, columns, acc1, is_async=True)
        # the products of the step before are done
        if P1 > 0:
            acc0, acc1 = warpgroup_mma_wait(2 * CHUNKS, deps=(acc0, acc1))
        else:
            acc0 = warpgroup_mma_wait(CHUNKS, deps=(acc0,))
        if STAGES < STEPS:
            barrier()  # in all warps: its slot is free
            more = (step > 0) & (step - 1 + STAGES < STEPS)
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            next_chunk = chunk + (step - 1 + STAGES) * CHUNKS
            _load_weights(weight0, weight1, w0_bufs, w1_bufs, full, next_chunk, col, free, more)
            _load_x(x, x_bufs, full, next_chunk, row, free, more)
        slot, phase = advance(slot, phase, STAGES)
    if P1 > 0:
        acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
    else:
        acc0 = warpgroup_mma_wait(0, deps=(acc0,))

    last = tile >= 0
    if SPLITS > 1:
        parts = work + tile.to(gl.int64) * (SPLITS * ROWS * BLOCK_N)
        at0, _ = _places(0, 0, ROWS, BLOCK_N, P0, L0)
        gl.store(parts + split * (ROWS * BLOCK_N) + at0, acc0)
        if P1 > 0:
            at1, _ = _places(0, P0, ROWS, BLOCK_N, P1, L1)
            gl.store(parts + split * (ROWS * BLOCK_N) + at1, acc1)
        barrier()  # all threads' parts are before the count
        last = gl.atomic_add(count + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        if SPLITS > 1:
            gl.store(count + tile, 0)
            added0 = _of_tile(residual, bias0, row, col, M, N, P0, L0)
            acc0 = _sum_of_parts(parts + at0, ROWS * BLOCK_N, SPLITS)
            if P1 > 0:
                added1 = _of_tile(residual, bias1, row, col + P0, M, N, P1, L1)
                acc1 = _sum_of_parts(parts + at1, ROWS * BLOCK_N, SPLITS)
        mean0 = bias0
        rstd0 = bias0
        mean1 = bias0
        rstd1 = bias0
        if NORM:
            known = (stat_bands < bands)[None, :]
            width = K / bands.to(gl.float32)
            mean = gl.sum(gl.where(known, means, 0.0), axis=1) / bands.to(gl.float32)
            apart = gl.where(known, means - mean[:, None], 0.0)
            square = gl.sum(gl.where(known, squares, 0.0) + width * apart * apart, axis=1)
            rstd = gl.rsqrt(square / K + EPS)
            mean0 = gl.convert_layout(mean, gl.SliceLayout(1, L0))
            rstd0 = gl.convert_layout(rstd, gl.SliceLayout(1, L0))
            if P1 > 0:
                mean1 = gl.convert_layout(mean0, gl.SliceLayout(1, L1))
                rstd1 = gl.convert_layout(rstd0, gl.SliceLayout(1, L1))
        y0 = _finish(
            acc0, mean0, rstd0, colsum0, bias0, scale0, added0, NORM, ACTIVATION,
            scale is not None, residual is not None, DTYPE,
        )  # fmt: skip
        places, inside = _places(row, col, M, N, P0, L0)
        gl.store(y + places, y0, mask=inside)
        if P1 > 0:
            y1 = _finish(
                acc1, mean1, rstd1, colsum1, bias1, scale1, added1, NORM, ACTIVATION,
                scale is not None, residual is not None, DTYPE,
            )  # fmt: skip
            places, inside = _places(row, col + P0, M, N, P1, L1)
            gl.store(y + places, y1, mask=inside)
        if out_statistics is not None:
            R0: gl.constexpr = gl.SliceLayout(1, L0)
            f0 = y0.to(gl.float32)
            total = gl.sum(f0, axis=1)
            if P1 > 0:
                f1 = y1.to(gl.float32)
                total += gl.convert_layout(gl.sum(f1, axis=1), R0)
            middle = total / BLOCK_N
            apart0 = f0 - middle[:, None]
            around = gl.sum(apart0 * apart0, axis=1)
            if P1 > 0:
                apart1 = f1 - gl.convert_layout(middle, gl.SliceLayout(1, L1))[:, None]
                around += gl.convert_layout(gl.sum(apart1 * apart1, axis=1), R0)
            out = out_statistics + (row + gl.arange(0, ROWS, layout=R0)) * BANDS + band
            gl.store(out, middle)
            gl.store(out + tiles_m * (ROWS * BANDS), around)


# --------------------------------------------------------------------------- loads


@gluon.jit
def _load_weights(weight0, weight1, w0_bufs, w1_bufs, full, chunk, col, slot, pred):
    """Of a step, from `chunk` on. Its barrier is told of x's bytes too."""
    CHUNKS: gl.constexpr = weight0.block_type.shape[0]
    P0: gl.constexpr = weight0.block_type.shape[1]
    P1: gl.constexpr = 0 if weight1 is None else weight1.block_type.shape[1]
    bar = full.index(slot)
    mbarrier.expect(bar, CHUNKS * (ROWS + P0 + P1) * 128, pred=pred)
    tma.async_copy_global_to_shared(weight0, [chunk, col, 0], bar, w0_bufs.index(slot), pred=pred)
    if P1 > 0:
        tma.async_copy_global_to_shared(
            weight1, [chunk, col + P0, 0], bar, w1_bufs.index(slot), pred=pred
        )


@gluon.jit
def _load_x(x, x_bufs, full, chunk, row, slot, pred):
    tma.async_copy_global_to_shared(
        x, [chunk, row, 0], full.index(slot), x_bufs.index(slot), pred=pred
    )


@gluon.jit
def _chunk(buf, J: gl.constexpr):
    """Chunk J, [rows, 64], of a box [CHUNKS, rows, 64]."""
    ROWS_OF_ONE: gl.constexpr = buf.shape[1]
    flat = buf.reshape([buf.shape[0] * ROWS_OF_ONE, 64])
    if buf.shape[0] > 1:
        return flat.slice(J * ROWS_OF_ONE, ROWS_OF_ONE)
    else:
        return flat


@gluon.jit
def _of_columns(pointer, col, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """WIDTH values of `pointer` [N] from `col` on in float32, or zeros."""
    AXIS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    if pointer is None:
        return gl.zeros([WIDTH], gl.float32, AXIS)
    else:
        return gl.load(pointer + col + gl.arange(0, WIDTH, layout=AXIS)).to(gl.float32)


@gluon.jit
def _places(row, col, M, N, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Of ROWS rows and WIDTH columns in [M, N], and which of them there are."""
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    cols = col + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    return rows[:, None] * N + cols[None, :], (rows < M)[:, None] & (cols < N)[None, :]


@gluon.jit
def _of_tile(pointer, instead, row, col, M, N, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """ROWS x WIDTH values of `pointer` [M, N], or whatever `instead` is."""
    if pointer is None:
        return instead
    else:
        places, inside = _places(row, col, M, N, WIDTH, LAYOUT)
        return gl.load(pointer + places, mask=inside, other=0.0)


@gluon.jit
def _sum_of_parts(parts, STRIDE: gl.constexpr, SPLITS: gl.constexpr):
    """In their order, whoever comes last; from the L2 cache, where other blocks put them."""
    total = gl.load(parts, cache_modifier=".cg")
    for s in gl.static_range(1, SPLITS):
        total += gl.load(parts + s * STRIDE, cache_modifier=".cg")
    return total


@gluon.jit
def _bring(coming, units):
    """This block's share of `units` of UNIT bytes, into the L2 cache."""
    THREADS: gl.constexpr = gl.num_warps() * 32
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    unit = gl.arange(0, THREADS, layout=LINE) * gl.num_programs(0) + gl.program_id(0)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.s32 p, $2, $3;"
        " @p cp.async.bulk.prefetch.L2.global [$1], 512; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [coming + unit * (UNIT // 2), unit, gl.full([THREADS], 0, gl.int32, LINE) + units],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


# --------------------------------------------------------------------------- epilogue


@gluon.jit
def _finish(
    value, mean, rstd, colsum, bias, scale, added, NORM: gl.constexpr, ACTIVATION: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_RESIDUAL: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    if NORM:
        value = (value - mean[:, None] * colsum[None, :]) * rstd[:, None]
    value += bias[None, :]
    if ACTIVATION == "gelu_polynomial":
        value *= normal_cdf(value, value * value)
    else:
        value = activate(value, ACTIVATION)
    if HAS_SCALE:
        value *= scale[None, :]
    if HAS_RESIDUAL:
        value += added.to(gl.float32)
    return value.to(DTYPE)


# --------------------------------------------------------------------------- first statistics


@triton.jit(do_not_specialize=["M"])
def row_statistics_kernel(
    x,  # [M, K]
    out_statistics,  # as above, of one band
    M,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
):  # fmt: skip
    """For a norm of what no `hopper_small_linear_kernel` made."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    values = tl.load(x + rows[:, None] * K + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=1) / K
    apart = tl.where(inside, values - mean[:, None], 0.0)
    out = out_statistics + rows * BANDS
    tl.store(out, mean, mask=rows < M)
    tl.store(out + tl.cdiv(M, ROWS) * (ROWS * BANDS), tl.sum(apart * apart, axis=1), mask=rows < M)
