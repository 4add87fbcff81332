"""What Hopper's linear kernels share, forward and backward: barriers, roles of loading warps, the
loop over a tile's products, tiles and rings, GELU. The protocol stands in `hopper.py`.

Legend: M rows, N columns of the result, K what is summed over.
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

from fastvit.kernels._activations import GELU_CLAMP, gelu_series

CONSUMERS = gl.constexpr(2)


@gluon.jit
def new_barriers(STAGES: gl.constexpr, SHARE: gl.constexpr, BANDS: gl.constexpr):
    """full, empty [STAGES], of which SHARE consumers read each slot, residual_full, residual_empty
    [BANDS] and lead [CONSUMERS]."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    residual_full = gl.allocate_shared_memory(gl.int64, [BANDS, 1], mbarrier.MBarrierLayout())
    residual_empty = gl.allocate_shared_memory(gl.int64, [BANDS, 1], mbarrier.MBarrierLayout())
    lead = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=SHARE)
    for i in gl.static_range(BANDS):
        mbarrier.init(residual_full.index(i), count=1)
        mbarrier.init(residual_empty.index(i), count=1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(lead.index(i), count=1)
    fence_async_shared()
    return full, empty, residual_full, residual_empty, lead


# --------------------------------------------------------------------------- roles


@gluon.jit
def load_operands(
    x, weight, buffers, barriers, sizes,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, BOXES: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """One warp: fills the ring, tile after tile, as far ahead as there is room. The weight lies
    [N, K], or TURNED [K, N]."""
    x_bufs, w_bufs, _ = buffers
    full, empty, _, _, _ = barriers
    tiles_m, tiles_n, k_tiles, _ = sizes
    ROWS: gl.constexpr = x.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight.block_type.shape[1 if TURNED else 0]
    WIDTH: gl.constexpr = x.block_type.element_ty.primitive_bitwidth // 8
    BYTES: gl.constexpr = (BOXES * ROWS + BLOCK_N) * BLOCK_K * WIDTH  # clipped boxes count in full
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        for k in range(k_tiles):
            bar = full.index(stage)
            # the first use of a slot passes: a new barrier counts as past the phase before
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(bar, BYTES)
            for box in gl.static_range(BOXES):
                tma.async_copy_global_to_shared(
                    x, [(tile_m * BOXES + box) * ROWS, k * BLOCK_K], bar,
                    x_bufs.index(stage * BOXES + box),
                )  # fmt: skip
            if TURNED:
                tma.async_copy_global_to_shared(
                    weight, [k * BLOCK_K, tile_n * BLOCK_N], bar, w_bufs.index(stage)
                )
            else:
                tma.async_copy_global_to_shared(
                    weight, [tile_n * BLOCK_N, k * BLOCK_K], bar, w_bufs.index(stage)
                )
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def load_residual(
    residual, buffers, barriers, sizes,
    CONSUMER: gl.constexpr, PINGPONG: gl.constexpr, GROUP_M: gl.constexpr, CHUNKS: gl.constexpr,
    BUFS: gl.constexpr,
):  # fmt: skip
    """One warp per consumer: brings the residual of its tiles, band after band, into the buffers
    that y will leave from."""
    _, _, y_bufs = buffers
    _, _, full, empty, _ = barriers
    tiles_m, tiles_n, _, _ = sizes
    ROWS: gl.constexpr = residual.block_type.shape[0]
    COLS: gl.constexpr = residual.block_type.shape[1]
    BYTES: gl.constexpr = ROWS * COLS * 2
    SHARE: gl.constexpr = 1 if PINGPONG else CONSUMERS
    OFFSET: gl.constexpr = 0 if PINGPONG else CONSUMER
    TURNS: gl.constexpr = CONSUMERS if PINGPONG else 1
    TURN: gl.constexpr = CONSUMER if PINGPONG else 0
    buf = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(
        gl.program_id(0) + TURN * gl.num_programs(0), tiles_m * tiles_n,
        TURNS * gl.num_programs(0),
    ):  # fmt: skip
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row = (tile_m * SHARE + OFFSET) * ROWS
        for chunk in range(CHUNKS):
            bar = full.index(CONSUMER * BUFS + buf)
            mbarrier.wait(empty.index(CONSUMER * BUFS + buf), phase ^ 1)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(
                residual, [row, (tile_n * CHUNKS + chunk) * COLS], bar,
                y_bufs.index(CONSUMER * BUFS + buf),
            )  # fmt: skip
            buf, phase = advance(buf, phase, BUFS)


# --------------------------------------------------------------------------- products


@gluon.jit
def tile_product(
    zeros, stage, phase, turn, k_tiles, buffers, barriers,
    HAS_RESIDUAL: gl.constexpr, CONSUMER: gl.constexpr, PINGPONG: gl.constexpr,
    STAGES: gl.constexpr, BUFS: gl.constexpr, LAG: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """A consumer's part of a tile, from slot `stage` on; waits for its turn or lead first."""
    x_bufs, w_bufs, _ = buffers
    full, empty, _, residual_empty, lead = barriers
    SHARE: gl.constexpr = 1 if PINGPONG else CONSUMERS
    OFFSET: gl.constexpr = 0 if PINGPONG else CONSUMER
    if PINGPONG:
        if CONSUMER > 0:
            mbarrier.wait(lead.index(CONSUMER - 1), turn & 1)
        else:
            mbarrier.wait(lead.index(CONSUMERS - 1), (turn & 1) ^ 1)
    elif LAG > 0 and CONSUMER > 0:
        mbarrier.wait(lead.index(CONSUMER - 1), turn & 1)
    mbarrier.wait(full.index(stage), phase)
    acc = warpgroup_mma(
        x_bufs.index(stage * SHARE + OFFSET), operand(w_bufs, stage, not TURNED), zeros,
        use_acc=False, is_async=True,
    )  # fmt: skip
    acc = warpgroup_mma_wait(1, deps=(acc,))
    if HAS_RESIDUAL:
        # the store of the last tile's last band has had time to be read out
        tma.store_wait(0)
        mbarrier.arrive(residual_empty.index(CONSUMER * BUFS + BUFS - 1), pred=turn > 0)
    if LAG > 0 and not PINGPONG and CONSUMER < CONSUMERS - 1:
        for _ in range(1, LAG):
            acc, stage, phase = multiply(
                acc, stage, phase, x_bufs, w_bufs, full, empty, STAGES, SHARE, OFFSET,
                False, not TURNED,
            )  # fmt: skip
        mbarrier.arrive(lead.index(CONSUMER))
        for _ in range(LAG, k_tiles):
            acc, stage, phase = multiply(
                acc, stage, phase, x_bufs, w_bufs, full, empty, STAGES, SHARE, OFFSET,
                False, not TURNED,
            )  # fmt: skip
    else:
        for _ in range(1, k_tiles):
            acc, stage, phase = multiply(
                acc, stage, phase, x_bufs, w_bufs, full, empty, STAGES, SHARE, OFFSET,
                False, not TURNED,
            )  # fmt: skip
    if PINGPONG:
        mbarrier.arrive(lead.index(CONSUMER))
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(stage))
    return acc


@gluon.jit
def multiply(
    acc, stage, phase, a_bufs, b_bufs, full, empty,
    STAGES: gl.constexpr, SHARE: gl.constexpr, OFFSET: gl.constexpr,
    A_TURNED: gl.constexpr, B_TURNED: gl.constexpr,
):  # fmt: skip
    """Starts the product of the next slot; the one before is done then, and its slot given back."""
    before = stage
    stage, phase = advance(stage, phase, STAGES)
    mbarrier.wait(full.index(stage), phase)
    acc = warpgroup_mma(
        operand(a_bufs, stage * SHARE + OFFSET, A_TURNED), operand(b_bufs, stage, B_TURNED), acc,
        is_async=True,
    )  # fmt: skip
    acc = warpgroup_mma_wait(1, deps=(acc,))
    mbarrier.arrive(empty.index(before))
    return acc, stage, phase


@gluon.jit
def operand(bufs, i, TURNED: gl.constexpr):
    """Buffer `i`, or its transpose: the tensor core reads either."""
    if TURNED:
        return bufs.index(i).permute((1, 0))
    else:
        return bufs.index(i)


# --------------------------------------------------------------------------- tiles and rings


@gluon.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Row and column of a tile: GROUP_M rows of tiles go through all columns together, so that they
    find x and W in the L2 cache."""
    per_group = GROUP_M * tiles_n
    group = tile // per_group
    first = group * GROUP_M
    rows = gl.maximum(gl.minimum(tiles_m - first, GROUP_M), 1)  # 1: past the end nothing is loaded
    inside = tile - group * per_group
    column = inside // rows
    return first + inside - column * rows, column


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next slot of a ring, and the parity of its barrier's use."""
    stage += 1
    wrapped = stage == STAGES
    stage = gl.where(wrapped, 0, stage)
    phase = gl.where(wrapped, phase ^ 1, phase)
    return stage, phase


@gluon.jit
def halves(t):
    """Left and right half of the columns; moves nothing, as each thread has both."""
    ROWS: gl.constexpr = t.shape[0]
    HALF: gl.constexpr = t.shape[1] // 2
    return t.reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()


@gluon.jit
def columns(t, CHUNKS: gl.constexpr, LAYOUT: gl.constexpr):
    """A tuple of CHUNKS (1, 2, 4) bands of columns, from left to right."""
    if CHUNKS == 1:
        return (gl.convert_layout(t, LAYOUT, assert_trivial=True),)
    elif CHUNKS == 2:
        left, right = halves(t)
        return (
            gl.convert_layout(left, LAYOUT, assert_trivial=True),
            gl.convert_layout(right, LAYOUT, assert_trivial=True),
        )
    else:
        gl.static_assert(CHUNKS == 4)
        left, right = halves(t)
        c0, c1 = halves(left)
        c2, c3 = halves(right)
        return (
            gl.convert_layout(c0, LAYOUT, assert_trivial=True),
            gl.convert_layout(c1, LAYOUT, assert_trivial=True),
            gl.convert_layout(c2, LAYOUT, assert_trivial=True),
            gl.convert_layout(c3, LAYOUT, assert_trivial=True),
        )


# --------------------------------------------------------------------------- GELU

GELU_CLAMP_SQUARED = gl.constexpr(GELU_CLAMP.value * GELU_CLAMP.value)


@gluon.jit
def normal_cdf(x, square):
    """`_activations.normal_cdf_polynomial`, for x and x^2: the square is clamped in the place of x,
    and the clamp to [0, 1] is a free modifier of the last multiply-add.

    Beyond the clamp P stays at its last value, which overshoots, so that x P + 1/2 is past 0 or 1
    there too. NaN: the clamped part becomes 0, and x * 0 is NaN again.
    """
    p = gelu_series(gl.minimum(square, GELU_CLAMP_SQUARED))
    return gl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, 0f3F000000;", "=f,f,f", [p, x],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
