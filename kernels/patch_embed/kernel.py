"""Finished tokens straight from NCHW pixels, one tile of token rows per program.

One product over all B * T token rows. A prefix row (CLS, registers) reads no pixel: its product is
0 and the epilogue adds its token. A patch row adds the bias; both add their position. One store.

Legend: B images, T = P + N tokens (P prefix, N patches), D width, K = C * PH * PW pixels a patch.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastvit.kernels._tiles import multiply, of_columns, tile_of


class Images(NamedTuple):
    """[B, C, H, W] in memory."""

    ptr: Any
    stride_b: Any
    stride_c: Any
    stride_h: Any
    stride_w: Any


@triton.jit
def patch_embed_kernel(
    images,  # Images
    weight_ptr,  # [D, K]
    bias_ptr,  # [D] or None
    pos_ptr,  # [T, D], or [N, D] if not POS_ON_PREFIX, or None
    prefix_ptr,  # [P, D] or None
    out_ptr,  # [B, T, D]
    B, T, D,
    GRID_W,  # patches in a row of the image
    RUN: tl.constexpr,  # pixels that lie side by side in memory, from a multiple of RUN on
    SHIFT: tl.constexpr,  # subtracted from each pixel
    PREFIX: tl.constexpr,  # P
    POS_ON_PREFIX: tl.constexpr, K: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    ACC: tl.constexpr,  # accumulator dtype
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    M = B * T
    tile = tile_of(tl.program_id(0), M, D, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile.row + tl.arange(0, BLOCK_M)
    cols = tile.col + tl.arange(0, BLOCK_N)
    token = rows % T
    patch = tl.maximum(token - PREFIX, 0)
    is_patch = (token >= PREFIX) & (rows < M)
    top = (patch // GRID_W) * PH
    left = (patch % GRID_W) * PW
    image = tl.minimum(rows // T, B - 1).to(tl.int64)
    corner = image * images.stride_b + top * images.stride_h + left * images.stride_w  # [BLOCK_M]
    cols_in = tl.minimum(cols, D - 1)
    w_rows = weight_ptr + cols_in.to(tl.int64)[None, :] * K

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        channel = ks // (PH * PW)
        pixel = (ks % (PH * PW) // PW) * images.stride_h + (ks % PW) * images.stride_w
        offsets = corner[:, None] + (channel * images.stride_c + pixel)[None, :]
        # the compiler does not see through % 14
        offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, RUN)), (1, RUN))
        if K % BLOCK_K == 0:
            x = tl.load(images.ptr + offsets, mask=is_patch[:, None], other=0.0)
            w = tl.load(w_rows + ks[:, None])  # [BLOCK_K, BLOCK_N]
        else:
            inside = is_patch[:, None] & (ks[None, :] < K)
            x = tl.load(images.ptr + offsets, mask=inside, other=0.0)
            w = tl.load(w_rows + ks[:, None], mask=ks[:, None] < K, other=0.0)
        if SHIFT != 0.0:
            # weights past K are 0, so only the prefix rows need their 0 back
            x = tl.where(is_patch[:, None], x.to(ACC) - SHIFT, 0.0)
        x = x.to(weight_ptr.dtype.element_ty)
        acc = multiply(x, w, acc, PRECISION)

    in_cols = cols[None, :] < D
    if bias_ptr is not None:
        acc += tl.where(is_patch[:, None], of_columns(bias_ptr, tile, acc), 0.0)
    if prefix_ptr is not None:
        ptrs = prefix_ptr + token[:, None] * D + cols[None, :]
        acc += tl.load(ptrs, mask=(token[:, None] < PREFIX) & in_cols, other=0.0).to(ACC)
    if pos_ptr is not None:
        position = token if POS_ON_PREFIX else patch
        ptrs = pos_ptr + position[:, None] * D + cols[None, :]
        has_position = in_cols if POS_ON_PREFIX else is_patch[:, None] & in_cols
        acc += tl.load(ptrs, mask=has_position, other=0.0).to(ACC)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < M) & in_cols)
