"""Which of Hopper's attention kernels runs a shape, forward or backward, and its launch.

Measured on an H200 (2026-11-27, H = 12, N = 197, d = 64, bfloat16; `proven/sm90.json`): roles with
the next block's scores ahead win at batch 256, a head's blocks of queries in programs of their own
at batch 1. The rest follows a rule until it is measured.

Legend: B batch, H heads, N queries, M keys, d head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastvit.kernels._backend import Meta
from fastvit.kernels._device import SHARED_MEMORY, architecture, multiprocessors
from fastvit.kernels._hopper import answer, give_up, hopper_problem
from fastvit.kernels._launch import Box, Prepared, run
from fastvit.kernels._tuning import TileConfig, cdiv

if TYPE_CHECKING:
    from fastvit.kernels.attention.launch import Problem, Strides

PORTABLE_TILE = TileConfig(64, 32, num_warps=4, num_stages=2)  # in the place of these kernels
LOG2E = 1.4426950408889634
ROWS = 64  # queries of a block, which a warpgroup has
CONSUMERS = 2
REGISTERS = 240  # a thread of a consumer; the rest of 168 a thread goes to the loading warps
LOAD_REGISTERS = 24
BARRIERS = 512  # bytes of shared memory
SCRATCH = 2048  # bytes for each consumer, where the output turns on its way to memory
PARTS = (128, 64, 32, 16)  # keys of one product
MOST_KEYS = 272  # whose scores registers hold
MOST_AHEAD = 224  # columns of scores that leave room for the next block's
HEADS_AT_ONCE = 3  # blocks of queries a multiprocessor, up to which each gets a program
RELOADED = 1.1  # what keys from the L2 cache for every two blocks of queries cost, about
HALF = (torch.bfloat16, torch.float16)
SHORT, LONG = ("roles", "head"), ("stream", "stay", "stream-turns", "stay-turns")
NAMES = SHORT + LONG  # backends that a tuning table may name
HEAD_DIMS = range(32, 129, 8)
# of the backward: keys of a half, channels of a box, the last queries, the most of all
HALF_KEYS, CHANNELS, LAST_ROWS, BACKWARD_QUERIES, BACKWARD_KEYS = 128, 64, 16, 208, 256


class Variant(NamedTuple):
    """One configuration of a Hopper kernel."""

    name: str  # one of `NAMES`
    parts: tuple[int, int, int]  # keys of each product; of `LONG` those of a block, then the rest
    stages: int  # heads, of `LONG` blocks of keys, in shared memory at a time
    blocks: int  # of queries of one item, which sees its keys once
    items: int
    tails: int = 0  # slots for the smaller blocks
    queries: int = 0  # blocks of queries that a consumer has room for
    ahead: bool = False  # the next block's scores are made in advance


def hopper_variant(
    problem: Problem, q: Meta, k: Meta | None, v: Meta | None, mask: Meta | None,
    tile: TileConfig | None = None,
) -> Variant | str:  # fmt: skip
    """Hopper's kernel for an attention, or why the portable one runs: the table, the machine, the
    operands. `tile` is what the tuning table says, if that is known. Where there is a rotary
    embedding it is the kernel for what `turned` leaves."""
    tile = tile or problem.tile()
    if tile.backend in NAMES or tile.backend == "hopper":
        left = turned(problem, q, v) or (problem, q, k, v)
        choice = hopper_problem(problem.device) or hopper_choice(*left, mask, tile)
        short = isinstance(choice, Variant) and choice.name in SHORT
        if problem.rope is not None and short and _few_heads(problem):
            choice = "so few heads are not worth a launch that turns q and k"
    else:
        choice = _by_table(problem)
    return answer("attention", problem.sizes, choice)


def _by_table(problem: Problem) -> str:
    where = f"for head dimension {problem.sizes[4]}"
    return f"the tuning table of {architecture(problem.device)} names a portable tile {where}"


def turned(problem: Problem, q: Meta, v: Meta | None) -> tuple[Problem, Meta, Meta, Meta] | None:
    """The attention that is left once q and k are turned, and its q, k and v; None where there is
    no rotary embedding, or images are packed."""
    if problem.rope is None or problem.images is not None:
        return None
    batch, h, n, _, d = problem.sizes
    shape, (_, *steps) = (batch, h, n, d), _by_token(problem)
    new = Meta(problem.dtype, shape, tuple(steps), problem.device, True)
    v = v or new._replace(strides=problem.sides[2][1:], aligned=q.aligned)
    sides = (_by_token(problem),) * 2 + ((0, *v.strides),)
    return problem._replace(rope=None, sides=sides), new, new, v  # type: ignore[arg-type]


def _by_token(problem: Problem) -> tuple[int, int, int, int, int]:
    """How a new [B, N, H, d] lies in memory."""
    _, h, n, _, d = problem.sizes
    return 0, n * h * d, d, h * d, 1


def portable_tile(tile: TileConfig) -> TileConfig:
    """A table's tile for the portable kernel."""
    return PORTABLE_TILE if tile.backend in NAMES else replace(tile, backend="")


def hopper_choice(
    problem: Problem,
    q: Meta,
    k: Meta | None,
    v: Meta | None,
    mask: Meta | None,
    tile: TileConfig | None = None,
) -> Variant | str:
    """The variant for an attention, or why no Hopper kernel can take it. Pure: asks no GPU, imports
    nothing.

    Args:
        tile: of a tuning table; its backend is one of `NAMES`, or anything else for the rule.
    """
    reason = _problem(problem, q, k, v, mask)
    if reason is not None:
        return reason
    if tile is not None and tile.backend in NAMES:
        named = variant_of(tile.backend, problem, masked=mask is not None, block=tile.BLOCK_N)
        if named is not None:
            return named
    return _by_rule(problem, masked=mask is not None) or (
        f"{problem.sizes[2]:,} queries and {problem.sizes[3]:,} keys of {problem.sizes[4]} channels"
        f"{' with a mask' if mask is not None else ''} are too few"
    )


def _problem(
    problem: Problem, q: Meta, k: Meta | None, v: Meta | None, mask: Meta | None
) -> str | None:
    *_, keys, d = problem.sizes
    scale = problem.options.scale
    for holds, reason in (
        (q.dtype in HALF, f"operands are {q.dtype}, not bfloat16 or float16"),
        (problem.images is None, "images of different sizes are packed"),
        (problem.rope is None, "a rotary embedding turns q and k"),
        (d in HEAD_DIMS, f"head dimension {d} is not one of 32, 40, ..., 128"),
        (scale > 0, f"scale {scale} is not positive"),
    ):
        if not holds:
            return reason
    for name, x, side in zip("qkv", (q, k or q, v or q), problem.sides, strict=True):
        if (reason := _rows(problem, name, x, side, x.shape[-2])) is not None:
            return reason
    if problem.mask is not None and problem.mask[-1] != 1 and keys > 1:
        return "the mask's values of one query do not lie side by side"
    if problem.mask is not None and (problem.sizes[2] - 1) * problem.mask[3] + keys > 2**31:
        return "the mask of one head has more elements than 32 bits count"
    return None


def _rows(problem: Problem, name: str, x: Meta, side: Strides, tokens: int) -> str | None:
    """Why no descriptor reads x, of so many tokens a head."""
    _, *steps, last = side
    sizes = (*problem.sizes[:2], tokens)
    odd = any(n > 1 and (step <= 0 or step % 8) for n, step in zip(sizes, steps, strict=True))
    if last != 1 or odd or not x.aligned:
        return f"{name}'s rows do not start at multiples of 16 bytes, each at one of its own"
    return None


def _by_rule(problem: Problem, *, masked: bool) -> Variant | None:
    """The first that there is."""
    batch, h, n, m, d = problem.sizes
    processors, blocks = multiprocessors(problem.device), cdiv(n, ROWS)
    names = ["roles", "stream"]
    if _few_heads(problem) and m <= MOST_AHEAD:
        names.insert(0, "head")
    # turns of two blocks of queries of the busiest multiprocessor
    streaming = cdiv(batch * h * cdiv(blocks, CONSUMERS), processors)
    if cdiv(batch * h, processors) * cdiv(blocks, CONSUMERS) <= RELOADED * streaming:
        names.insert(-1, "stay")
    # sums of 128 channels and scores of 128 keys spill beside two smaller blocks
    block = 64 if channel_parts(d)[0] > 64 else 128
    variants = (variant_of(name, problem, masked=masked, block=block) for name in names)
    return next((found for found in variants if found is not None), None)


def variant_of(name: str, problem: Problem, *, masked: bool, block: int = 128) -> Variant | None:
    """One of `NAMES`, or None where it cannot run.

    Args:
        block: keys of a block of `LONG`, 128 or 64; 64 where more do not fit, and with a mask,
            whose values take registers.
    """
    batch, h, n, m, d = problem.sizes
    blocks = cdiv(n, ROWS)
    if name in SHORT:
        if masked or d > 64 or m > MOST_KEYS:
            return None
        parts = key_parts(m)
        if name == "head":
            split = blocks if _few_heads(problem) else 1
            held = 2 * ROWS + 2 * sum(parts)
            found = Variant(name, parts, 1, blocks // split, batch * h * split)
        else:
            held = 2 * (blocks * ROWS + 2 * sum(parts))
            found = Variant(name, parts, 2, blocks, batch * h, ahead=sum(parts) <= MOST_AHEAD)
        fits = held * sum(channel_parts(d)) * 2 + BARRIERS + SCRATCH * CONSUMERS
        return found if fits <= SHARED_MEMORY["sm90"] else None
    stays = name.startswith("stay")
    if blocks < CONSUMERS or (name == "stay-turns" and blocks % CONSUMERS):
        return None
    for keys in (64,) if masked or block == 64 else (128, 64):
        room = None if m < keys else _room(m, d, keys, stays=stays)
        if room is not None:
            chunk = blocks if stays else CONSUMERS
            _, *tail = long_parts(m, keys)
            items = batch * h * cdiv(blocks, chunk)
            return Variant(name, (keys, tail[0], tail[1]), room[0], chunk, items, room[1], room[2])
    return None


def _few_heads(problem: Problem) -> bool:
    batch, h, n, *_ = problem.sizes
    return batch * h * cdiv(n, ROWS) <= HEADS_AT_ONCE * multiprocessors(problem.device)


def key_parts(m: int) -> tuple[int, int, int]:
    """Up to three powers of two that cover m keys, up to `MOST_KEYS`, with the fewest columns, then
    in the fewest parts; all but the last are full. 197 is 128 + 64 + 16."""
    covers = [
        (a, b, c)
        for a in PARTS
        for b in (0, *PARTS)
        for c in (0, *PARTS)
        if a >= b >= c and a + b + c >= m > (a + b if c else a if b else 0)
    ]
    return min(covers, key=lambda parts: (sum(parts), 3 - parts.count(0)))


def long_parts(m: int, block: int) -> tuple[int, int, int]:
    """(full blocks, T1, T2): up to two smaller powers of two after the full blocks, the last
    masked, with the fewest columns, where a part counts as 16 more."""
    full, rest = divmod(m, block)
    if rest == 0:
        return full, 0, 0
    covers = [
        (a, b)
        for a in PARTS
        for b in (0, *PARTS[1:])
        if block >= a >= b and a + b >= rest and not (b and a >= rest)
    ]
    return full, *min(covers, key=lambda parts: sum(parts) + (16 if parts[1] else 0))


def channel_parts(d: int) -> tuple[int, int]:
    """(D0, D1): one or two powers of two that cover d channels: 72 is 64 + 16."""
    for parts in ((32, 0), (64, 0), (64, 16), (64, 32), (128, 0)):
        if sum(parts) >= d:
            return parts
    raise ValueError(f"head dimension {d}")


def _room(m: int, d: int, block: int, *, stays: bool) -> tuple[int, int, int] | None:
    """(stages, tails, queries) that fit in shared memory, or None. One tail is enough where it is
    next needed after some full blocks."""
    width = sum(channel_parts(d))
    full, *tail = long_parts(m, block)
    tails = 2 if full == 1 and tail[0] else 1

    def stages(queries: int) -> int:
        left = SHARED_MEMORY["sm90"] - BARRIERS
        left -= CONSUMERS * (SCRATCH + queries * ROWS * width * 2)
        return (left - tails * 2 * sum(tail) * width * 2) // (2 * block * width * 2)

    most = max(4, 2 * full) if stays else 6
    good, least = (full + 1, max(2, full)) if stays else (3, 2)
    # rather enough stages than a second block of queries
    for queries, enough in ((2, good), (1, good), (2, least), (1, least)):
        if stages(queries) >= enough:
            return min(stages(queries), most), tails, queries
    return None


# --------------------------------------------------------------------------- launch


def prepare_hopper(
    choice: Variant, problem: Problem, k: Meta | None, mask: Meta | None, *, keep: bool,
    early: bool = False,
) -> Prepared:  # fmt: skip
    """`run` is given the tensors of `launch.py`, the output [B, N, H, d] and the statistics.

    Args:
        early: as of `Prepared`, for the kernel for few heads.
    """
    batch, h, n, m, d = problem.sizes
    d0, d1 = channel_parts(d)
    scale, keys = problem.options.scale * LOG2E, None if n == m else m
    programs = min(choice.items, multiprocessors(problem.device))
    box = functools.partial(_box, problem, packed=k is None)
    if choice.name in SHORT:
        from fastvit.kernels.attention.hopper import attention_head_kernel, attention_roles_kernel

        boxes = [box("q", ROWS, d0)]
        boxes += [box(which, part or 16, d0) for which in "kv" for part in choice.parts]
        kernel = attention_roles_kernel
        constants = (
            choice.blocks, choice.stages, min(CONSUMERS, choice.blocks), choice.ahead, REGISTERS,
            LOAD_REGISTERS,
        )  # fmt: skip
        if choice.name == "head":
            kernel, programs = attention_head_kernel, choice.items
            constants = choice.blocks, choice.items // (batch * h), early

        def arguments(
            q: Any, k: Any, v: Any, mask: Any, cos: Any, sin: Any, cu: Any, out: Tensor, kept: Any
        ) -> tuple[Any, ...]:
            keys_of = q if k is None else k
            return (
                q, keys_of, keys_of, keys_of, v, v, v, out, n, h, choice.items, scale, keys, kept,
                problem.inverse, d, *choice.parts, *constants,
            )  # fmt: skip

    else:
        from fastvit.kernels.attention.hopper_long import attention_long_kernel

        kernel, channels = attention_long_kernel, (d0, d1 or 16)
        boxes = [box("q", ROWS, c) for c in channels]
        boxes += [box(w, part or 16, c) for w in "kv" for part in choice.parts for c in channels]
        blocks = cdiv(n, ROWS)
        strides = (0, 0, 0) if problem.mask is None else problem.mask[1:4]
        counts = (choice.items, cdiv(blocks, choice.blocks), m // choice.parts[0], blocks)
        constants = (
            d, d1, *choice.parts[1:], choice.blocks, choice.stages, choice.tails, choice.queries,
            choice.name.endswith("turns"), keep, mask is not None, REGISTERS, LOAD_REGISTERS,
        )  # fmt: skip

        def arguments(
            q: Any, k: Any, v: Any, mask: Any, cos: Any, sin: Any, cu: Any, out: Tensor, kept: Any
        ) -> tuple[Any, ...]:
            keys_of = q if k is None else k
            return (
                q, q, *(keys_of,) * 6, *(v,) * 6, out, out if kept is None else kept,
                out if mask is None else mask, n, h, *counts, *strides, scale, keys,
                problem.inverse, *constants,
            )  # fmt: skip

    tile = TileConfig(ROWS, choice.parts[0], 0, 4, choice.stages, choice.name)
    return Prepared(kernel, programs, tile, arguments, boxes, early=early)


def prepare_turn(problem: Problem) -> Callable[..., tuple[Any, ...]]:
    """Gives of the tensors of `launch.py` those of `turned`."""
    from fastvit.kernels.attention.hopper_rope import turn_kernel

    batch, h, n, _, d = problem.sizes
    side, (start, *steps) = _by_token(problem), problem.sides[2]
    launch = problem.launch(
        turn_kernel, problem.programs(n, ROWS), TileConfig(ROWS, 1, num_warps=4, num_stages=1),
        (side, side), problem.form(side), ROWS,
    )  # fmt: skip

    def turn(q: Tensor, k: Any, v: Any, mask: Any, cos: Any, sin: Any, cu: Any) -> tuple[Any, ...]:
        new = [torch.empty((batch, n, h, d), dtype=q.dtype, device=q.device) for _ in "qk"]
        run(launch, q, k, v, mask, cos, sin, cu, *new)
        if v is None:
            v = q.as_strided((batch, h, n, d), steps, q.storage_offset() + start)
        return (*new, v, mask, None, None, None)

    return turn


def _box(problem: Problem, which: str, rows: int, channels: int, *, packed: bool) -> Box | None:
    """Of q, k or v as [B, tokens, heads, d]; None for the values of packed qkv, which the boxes of
    its keys bring too."""
    if packed and which == "v":
        return None
    _, h, n, m, _ = problem.sizes
    side, tokens = problem.sides["qkv".index(which)], n if which == "q" else m
    return _box_of(problem, side, tokens, 3 * h if packed else h, rows, channels)


def _box_of(
    problem: Problem, side: Strides, tokens: int, heads: int, rows: int, channels: int
) -> Box:
    """Of a tensor as [B, tokens, heads, d]."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, *_, d = problem.sizes
    _, by_batch, by_head, by_token, _ = side
    sizes = [batch, tokens, heads, d]
    steps = zip(sizes, (by_batch, by_token, by_head), strict=False)
    # where there is one of something, its stride may be anything
    strides = [*(step if size > 1 else d for size, step in steps), 1]
    block = [1, rows, 1, channels]
    element = gl.bfloat16 if problem.dtype == torch.bfloat16 else gl.float16
    layout: Any = gl.NVMMASharedLayout.get_default_for(block, element)
    return Box(lambda tensor: TensorDescriptor(tensor, sizes, strides, block, layout))


# --------------------------------------------------------------------------- backward


class Whole(NamedTuple):
    """One configuration of the backward's kernel, which has whole heads in shared memory."""

    halves: int  # of `HALF_KEYS` keys
    parts: int  # of `ROWS` queries
    last: int  # queries after those: `LAST_ROWS` or 0
    name: str = "whole"


def backward_variant(
    problem: Problem, tensors: tuple[Meta | None, ...], grad: Meta, out: Meta,
    needed: tuple[bool, ...], tile: TileConfig,
) -> Whole | str:  # fmt: skip
    """Hopper's kernel for the `needed` gradients of q, k and v, or why the portable ones run.

    Args:
        tensors: as in `launch.py`.
        tile: of a tuning table.
    """
    if tile.backend == "hopper":
        reason = hopper_problem(problem.device)
        choice = reason or backward_choice(problem, tensors, grad, out, needed)
    else:
        choice = _by_table(problem)
    return answer("attention_backward", problem.sizes, choice)


def backward_choice(
    problem: Problem, tensors: tuple[Meta | None, ...], grad: Meta, out: Meta,
    needed: tuple[bool, ...],
) -> Whole | str:  # fmt: skip
    """The kernel's configuration, or why it cannot take them. Pure, as `hopper_choice`."""
    q, k, v, mask = tensors[:4]
    assert q is not None
    reason = _problem(problem, q, k, v, mask)
    _, h, n, m, d = problem.sizes
    for holds, other in (
        (mask is None, "there is a mask"),
        (all(needed), "not all gradients are wanted"),
        (d <= CHANNELS, f"head dimension {d} is above {CHANNELS}"),
        (n <= BACKWARD_QUERIES, f"{n:,} queries are more than {BACKWARD_QUERIES}"),
        (m <= BACKWARD_KEYS, f"{m:,} keys are more than {BACKWARD_KEYS}"),
        (problem.by_head(out)[1:] == (n * h * d, d, h * d, 1), "the output is not packed"),
    ):
        reason = reason or (None if holds else other)
    reason = reason or _rows(problem, "the gradient", grad, problem.by_head(grad), n)
    if reason is not None:
        return reason
    parts, rest = divmod(n, ROWS)
    last = LAST_ROWS if parts and 0 < rest <= LAST_ROWS else 0
    return Whole(cdiv(m, HALF_KEYS), parts if last or not rest else parts + 1, last)


def prepare_whole(choice: Whole, problem: Problem, k: Meta | None, grad: Meta) -> Prepared:
    """`run` is given the tensors of `launch.py`, the output's gradient, the output, the statistics
    and the gradients of q, k and v, contiguous, all three the same where qkv is packed."""
    from fastvit.kernels.attention.hopper_backward import attention_backward_kernel

    batch, h, n, m, d = problem.sizes
    packed, scale = k is None, problem.options.scale
    all_heads = 3 * h if packed else h
    # of gradients
    dq, dk = ((0, h * tokens * d, tokens * d, d, 1) for tokens in (n, m))
    if packed:
        dq = dk = (0, n * all_heads * d, d, all_heads * d, 1)
    q_side, k_side, v_side = problem.sides
    boxes: list[Box | None] = [
        _box_of(problem, side, n, heads, rows, CHANNELS)
        for side, heads in ((q_side, all_heads), (problem.by_head(grad), h), (dq, all_heads))
        for rows in (ROWS, LAST_ROWS)
    ]
    boxes += [
        None if packed and values else _box_of(problem, side, m, all_heads, HALF_KEYS, CHANNELS)
        for side, values in ((k_side, False), (v_side, True), (dk, False), (dk, True))
    ]
    # of an only key the gradient of the score is 0; computed, it is rounding errors
    numbers = (n, h, batch * h, scale * LOG2E, scale * (m > 1), d, *choice[:3])

    def arguments(
        q: Any, k: Any, v: Any, mask: Any, cos: Any, sin: Any, cu: Any, grad: Tensor, out: Tensor,
        kept: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> tuple[Any, ...]:  # fmt: skip
        keys_of = q if k is None else k
        return (q, q, grad, grad, dq, dq, keys_of, v, dk, dv, out, kept, *numbers)

    tile = TileConfig(ROWS, HALF_KEYS, 0, 8, 1, choice.name)
    programs = min(batch * h, multiprocessors(problem.device))
    return Prepared(attention_backward_kernel, programs, tile, arguments, boxes, give_up)
