"""y = act(x W^T + b) * scale * row_scale + residual on Hopper, in Gluon. Of e4m3 operands x W^T is
multiplied by a factor a column, and y may be e4m3 too.

A persistent kernel of three roles: blocks are dealt tiles round robin; one warp of a block brings
tiles of x and W into a ring of shared memory; one warp per consumer brings its residual; two
consumers (warpgroups) multiply, finish and store.

PINGPONG:     each consumer has tiles of ROWS x BLOCK_N of its own, in turns: one finishes its tile
              while the other multiplies.
not PINGPONG: both share a tile of (2 ROWS) x BLOCK_N, each half of its rows; consumer 1 begins LAG
              steps after consumer 0, so that one finishes while the other multiplies.

Barriers, each with the parity of its use:

full[s]              slot s of the ring has landed (one arrival and its bytes)
empty[s]             every consumer of slot s has read it
residual_full[c, b]  buffer b of consumer c holds a band of residual
residual_empty[c, b] the band of y written over it has been stored
lead[c]              PINGPONG: consumer c has issued its tile's last product; else it is LAG steps
                     into its tile

A slot is given back one step late, when the product after the one that read it has been issued. A
parity cannot tell a use from the one two later, so nobody may wait for a use of a slot before the
use before has landed: in turns this is what `lead` sees to, and shared tiles with a LAG want more
steps of K than slots. Sizes are free: TMA clips boxes at the edges and fills them with zeros.

Legend: M rows (batch x tokens), N output features, K input features.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fastvit.kernels._activations import activate
from fastvit.kernels._hopper_e4m3 import E4M3, GELU_E4M3, as_pairs, e4m3_pairs
from fastvit.kernels.linear.hopper_parts import (
    CONSUMERS,
    columns,
    load_operands,
    load_residual,
    new_barriers,
    normal_cdf,
    tile_of,
    tile_product,
)


@gluon.jit(do_not_specialize=["M"])
def hopper_linear_kernel(
    x,  # TMA descriptors with layouts: x [M, K] in boxes [ROWS, BLOCK_K]
    weight,  # [N, K] in boxes [BLOCK_N, BLOCK_K]
    y,  # [M, N] in boxes [ROWS, COLS]
    residual,  # as y, or None
    pre,  # as y, or None: gets x W^T + b; not with a residual
    factor,  # float32 [N] with e4m3 operands, else None
    bias,  # [N] or None
    scale,  # [N] or None
    row_scale,  # [M] or None
    inverse,  # of y's scale, a number, where y is e4m3, else None
    M,
    N,
    K,
    ACTIVATION: gl.constexpr,
    PINGPONG: gl.constexpr,
    EVEN: gl.constexpr,  # columns of e4m3 operands need no mask: N is a multiple of BLOCK_N
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,  # slots of the ring
    BUFS: gl.constexpr,  # buffers of y for each consumer
    LAG: gl.constexpr,
    REGISTERS: gl.constexpr,  # a thread of consumer 1
    LOAD_REGISTERS: gl.constexpr,  # a thread of a loading warp
):
    ROWS: gl.constexpr = x.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight.block_type.shape[0]
    COLS: gl.constexpr = y.block_type.shape[1]
    CHUNKS: gl.constexpr = BLOCK_N // COLS
    SHARE: gl.constexpr = 1 if PINGPONG else CONSUMERS
    DTYPE: gl.constexpr = x.block_type.element_ty
    Y_DTYPE: gl.constexpr = y.block_type.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    gl.static_assert(CHUNKS % BUFS == 0 or pre is not None)
    # a residual's buffer is given back when the next band has been stored from another one
    gl.static_assert(BUFS >= 2 or residual is None)
    # y and pre leave from a buffer each
    gl.static_assert(pre is None or (BUFS == 2 and residual is None))
    # the leader reaches step LAG - 1 with no slot given back by the other
    gl.static_assert(LAG <= STAGES)

    x_bufs = gl.allocate_shared_memory(DTYPE, [STAGES * SHARE, ROWS, BLOCK_K], x.layout)
    w_bufs = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    y_bufs = gl.allocate_shared_memory(Y_DTYPE, [CONSUMERS * BUFS, ROWS, COLS], y.layout)
    barriers = new_barriers(STAGES, SHARE, CONSUMERS * BUFS)

    tiles_m = gl.cdiv(M, ROWS * SHARE)
    tiles_n = gl.cdiv(N, BLOCK_N)
    k_tiles = gl.cdiv(K, BLOCK_K)
    buffers = (x_bufs, w_bufs, y_bufs)
    sizes = (tiles_m, tiles_n, k_tiles, N)
    # tuples of constants held in a variable would become tensors, so each call spells them out
    if residual is not None:
        gl.warp_specialize(
            [
                (_consume, (
                    y, pre, factor, bias, scale, row_scale, inverse, buffers, barriers, sizes,
                    None if row_scale is None else M, True, ACTIVATION, 0, PINGPONG, EVEN, GROUP_M,
                    STAGES, CHUNKS, BUFS, LAG,
                )),
                (_consume, (
                    y, pre, factor, bias, scale, row_scale, inverse, buffers, barriers, sizes,
                    None if row_scale is None else M, True, ACTIVATION, 1, PINGPONG, EVEN, GROUP_M,
                    STAGES, CHUNKS, BUFS, LAG,
                )),
                (load_operands, (
                    x, weight, buffers, barriers, sizes, GROUP_M, STAGES, SHARE, False,
                )),
                (load_residual, (
                    residual, buffers, barriers, sizes, 0, PINGPONG, GROUP_M, CHUNKS, BUFS,
                )),
                (load_residual, (
                    residual, buffers, barriers, sizes, 1, PINGPONG, GROUP_M, CHUNKS, BUFS,
                )),
            ],
            [WARPS, 1, 1, 1],
            [REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    y, pre, factor, bias, scale, row_scale, inverse, buffers, barriers, sizes,
                    None if row_scale is None else M, False, ACTIVATION, 0, PINGPONG, EVEN, GROUP_M,
                    STAGES, CHUNKS, BUFS, LAG,
                )),
                (_consume, (
                    y, pre, factor, bias, scale, row_scale, inverse, buffers, barriers, sizes,
                    None if row_scale is None else M, False, ACTIVATION, 1, PINGPONG, EVEN, GROUP_M,
                    STAGES, CHUNKS, BUFS, LAG,
                )),
                (load_operands, (
                    x, weight, buffers, barriers, sizes, GROUP_M, STAGES, SHARE, False,
                )),
            ],
            [WARPS, 1],
            [REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip


# --------------------------------------------------------------------------- roles


@gluon.jit
def _consume(
    y, pre, factor, bias, scale, row_scale, inverse, buffers, barriers, sizes, M,
    HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr, CONSUMER: gl.constexpr,
    PINGPONG: gl.constexpr, EVEN: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    CHUNKS: gl.constexpr, BUFS: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """A warpgroup: multiplies, finishes and stores its part of each tile."""
    x_bufs, w_bufs, y_bufs = buffers
    _, _, residual_full, residual_empty, _ = barriers
    tiles_m, tiles_n, k_tiles, N = sizes
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = x_bufs.shape[1]
    BLOCK_N: gl.constexpr = w_bufs.shape[1]
    COLS: gl.constexpr = BLOCK_N // CHUNKS
    DEPTH: gl.constexpr = 256 // x_bufs.dtype.primitive_bitwidth  # of one instruction
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, DEPTH])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLS, DEPTH])
    # in turns, waiting for a factor costs less before the first product than after the last; beside
    # both an activation and a residual it would not fit the registers
    EARLY: gl.constexpr = (
        PINGPONG and factor is not None and (not HAS_RESIDUAL or ACTIVATION == "none")
    )
    SHARE: gl.constexpr = 1 if PINGPONG else CONSUMERS  # consumers on one tile
    OFFSET: gl.constexpr = 0 if PINGPONG else CONSUMER
    TURNS: gl.constexpr = CONSUMERS if PINGPONG else 1  # tiles from one of its own to the next
    TURN: gl.constexpr = CONSUMER if PINGPONG else 0
    USES: gl.constexpr = CHUNKS // BUFS  # of each buffer of y in a tile, with a residual

    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, ACC)
    step = gl.to_tensor(0) + TURN * k_tiles  # of the ring, where this tile begins
    turn = gl.to_tensor(0)  # this consumer's tiles so far
    for tile in range(
        gl.program_id(0) + TURN * gl.num_programs(0), tiles_m * tiles_n,
        TURNS * gl.num_programs(0),
    ):  # fmt: skip
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        stage = step % STAGES
        phase = (step // STAGES) & 1
        step += TURNS * k_tiles
        if EARLY:
            factors = _of_columns(factor, tile_n * BLOCK_N, N, BLOCK_N, ACC, EVEN)
            biases = bias
            if bias is not None:
                biases = _of_columns(bias, tile_n * BLOCK_N, N, BLOCK_N, ACC, EVEN)

        acc = tile_product(
            zeros, stage, phase, turn, k_tiles, buffers, barriers, HAS_RESIDUAL, CONSUMER,
            PINGPONG, STAGES, BUFS, LAG, False,
        )  # fmt: skip
        if EARLY:
            acc = _affine(acc, factors, biases)

        row = (tile_m * SHARE + OFFSET) * ROWS
        bands = columns(acc, CHUNKS, OUT)
        for chunk in gl.static_range(CHUNKS):
            col = (tile_n * CHUNKS + chunk) * COLS
            which = CONSUMER * BUFS + (1 if pre is not None else chunk % BUFS)
            value = bands[chunk]
            if not EARLY:
                if factor is not None:
                    factors = _of_columns(factor, col, N, COLS, OUT, EVEN)
                    biases = bias
                    if bias is not None:
                        biases = _of_columns(bias, col, N, COLS, OUT, EVEN)
                    value = _affine(value, factors, biases)
                elif bias is not None:
                    value += _of_columns(bias, col, N, COLS, OUT, EVEN).to(gl.float32)[None, :]
            if pre is not None:
                tma.store_wait(1)  # not the last band's y
                kept = y_bufs.index(CONSUMER * BUFS)
                kept.store(value.to(kept.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(pre, [row, col], kept)
            value = _finish(value, scale, row_scale, inverse, row, col, M, N, ACTIVATION, OUT, EVEN)
            buf = y_bufs.index(which)
            if HAS_RESIDUAL:
                mbarrier.wait(residual_full.index(which), (turn * USES + chunk // BUFS) & 1)
                value += buf.load(OUT).to(gl.float32)
            else:
                tma.store_wait(BUFS - 1)
            if inverse is not None:
                as_pairs(buf).store(value)
            else:
                buf.store(value.to(buf.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(y, [row, col], buf)
            if HAS_RESIDUAL and chunk > 0:
                # the band before has been read out: its buffer may take the next residual
                tma.store_wait(1)
                mbarrier.arrive(residual_empty.index(CONSUMER * BUFS + (chunk - 1) % BUFS))
        turn += 1
    tma.store_wait(0)


# --------------------------------------------------------------------------- epilogue


@gluon.jit
def _of_columns(
    pointer, first_col, N, COLS: gl.constexpr, LAYOUT: gl.constexpr, EVEN: gl.constexpr
):
    """COLS values of `pointer` [N] from `first_col` on."""
    cols = first_col + gl.arange(0, COLS, layout=gl.SliceLayout(0, LAYOUT))
    if EVEN:
        return gl.load(pointer + cols)
    else:
        return gl.load(pointer + cols, mask=cols < N, other=0.0)


@gluon.jit
def _affine(value, factors, biases):
    """value * factors + biases, each of a column."""
    if biases is not None:
        return value * factors[None, :] + biases.to(gl.float32)[None, :]
    else:
        return value * factors[None, :]


@gluon.jit
def _finish(
    value, scale, row_scale, inverse, first_row, first_col, M, N,
    ACTIVATION: gl.constexpr, LAYOUT: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """act(value) * scale * row_scale, a band of columns in float32; with `inverse` of e4m3, in
    pairs."""
    if ACTIVATION == "gelu_e4m3":
        return e4m3_pairs(value, inverse, GELU_E4M3)
    else:
        if ACTIVATION == "gelu_polynomial":
            value = _gelu_polynomial(value)
        else:
            value = activate(value, ACTIVATION)
        if scale is not None:
            scales = _of_columns(scale, first_col, N, value.shape[1], LAYOUT, EVEN)
            value *= scales.to(gl.float32)[None, :]
        if row_scale is not None:
            rows = first_row + gl.arange(0, value.shape[0], layout=gl.SliceLayout(1, LAYOUT))
            value *= gl.load(row_scale + rows, mask=rows < M, other=0.0).to(gl.float32)[:, None]
        if inverse is not None:
            value = e4m3_pairs(value, inverse, E4M3)
        return value


@gluon.jit
def _gelu_polynomial(x):
    """`_activations.gelu_polynomial` in 12 instructions instead of 15."""
    return x * normal_cdf(x, x * x)
