"""Launcher of the forward kernel, and what the backward's kernels share with it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels._device import architecture
from fastvit.kernels._library import launch
from fastvit.kernels._tuning import TileConfig, cdiv, lookup
from fastvit.kernels.linear.op import float32_precision

MIN_PART = 16  # the narrowest matrix product a tensor core takes


def split_head_dim(d: int) -> tuple[int, int, int]:
    """Powers of two, 16 or more, that cover head dimension `d` with the least padding, in at most
    three parts: 64 is (64, 0, 0), 72 (64, 16, 0), 104 (64, 32, 16)."""
    parts: list[int] = []
    rest = -(-d // MIN_PART) * MIN_PART
    while rest:
        # the largest that fits; in the last place one that covers what is left
        part = 1 << (rest.bit_length() - 1)
        if len(parts) == 2 and part < rest:
            part *= 2
        parts.append(part)
        rest -= min(part, rest)
    padded = max(MIN_PART, 1 << (d - 1).bit_length())
    if sum(parts) >= padded:
        parts = [padded]
    d0, d1, d2 = parts + [0] * (3 - len(parts))
    return d0, d1, d2


def tail_of(tokens: int, block: int) -> int:
    """Width of the masked last step: 0 if `block` divides `tokens`, else a power of two from 16."""
    rest = tokens % block
    return min(block, max(MIN_PART, 1 << (rest - 1).bit_length())) if rest else 0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Of scores, statistics and sums for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: cos and sin that broadcast to [B, H, N', d/2], of the last N' tokens."""

    cos: Tensor
    sin: Tensor
    half: bool  # channel i is paired with i + d/2, else 2 i with 2 i + 1

    def tables(self, batch: int, heads: int) -> tuple[Tensor, Tensor]:
        """[B, H, N', d/2] of the same strides, 1 in the last dimension."""
        cos, sin = self.cos, self.sin
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        shape = (batch, heads, *cos.shape[-2:])
        return cos.expand(shape), sin.expand(shape)


@dataclass(frozen=True)
class Problem:
    """One attention: q [B, H, N, d], k and v [B, H, M, d], a mask of values to add that is expanded
    to [B, H, N, M]. Packed images (`cu_seqlens` [images + 1]) are one batch of N = M tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    rope: Rope | None = None
    cu_seqlens: Tensor | None = None
    longest: int = 0  # tokens of the longest packed image, for the choice of tiles

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, N, M, d."""
        batch, heads, n, d = self.q.shape
        return batch, heads, n, self.k.shape[2], d

    def tile(self, op: str = "attention", **phase: int) -> TileConfig:
        """From a tuning table."""
        _, _, n, m, d = self.sizes
        if self.cu_seqlens is not None:
            n = m = self.longest
        arch = architecture(self.q.device)
        rope = int(self.rope is not None)  # takes registers
        return lookup(op, arch, self.q.dtype, N=n, M=m, D=d, ROPE=rope, **phase)

    def programs(self, tokens: int, block: int) -> int:
        """How many do `block` of every head's `tokens` each; as `find_block` counts them."""
        batch, heads = self.sizes[:2]
        if self.cu_seqlens is None:
            return cdiv(tokens, block) * batch * heads
        return (tokens // block + len(self.cu_seqlens) - 1) * heads

    def tail(self, tokens: int, block: int) -> int:
        """Of the kernels' masked last step: packed images each have one of their own."""
        return tail_of(tokens, block) if self.cu_seqlens is None else block

    def arguments(self, tile: TileConfig, *others: Tensor) -> dict[str, Any]:
        """What all kernels take. `others` are [B, H, N, d] too: `aligned` holds for them."""
        import triton.language as tl

        batch, heads, n, m, d = self.sizes
        cos, sin = (None, None) if self.rope is None else self.rope.tables(batch, heads)
        align = math.gcd(
            16, *(s for t in (self.q, self.k, self.v, *others) for s in t.stride()[:3])
        )
        parts, q_parts = split_head_dim(d), split_head_dim(d if cos is None else d // 2)
        rope = "none" if self.rope is None else "half" if self.rope.half else "interleaved"
        return {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "v_ptr": self.v,
            "mask_ptr": self.mask,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "cu_ptr": self.cu_seqlens,
            "H": heads,
            "N": n,
            "M": m,
            "images": 0 if self.cu_seqlens is None else len(self.cu_seqlens) - 1,
            "prefix": 0 if cos is None else n - cos.shape[2],
            **strides("q", "bhnd", self.q),
            **strides("k", "bhmd", self.k),
            **strides("v", "bhmd", self.v),
            **strides("m", "bhnm", self.mask),
            **strides("a", "bhnd", cos),
            "SCALE": self.scale,
            "ROPE": rope,
            "PRECISION": float32_precision(self.q.dtype),
            "ACC": tl.float64 if accumulator(self.q.dtype) == torch.float64 else tl.float32,
            "ALIGN": align,
            "D": d,
            **dict(zip(("Q0", "Q1", "Q2"), q_parts, strict=True)),
            **dict(zip(("D0", "D1", "D2"), parts, strict=True)),
            "BLOCK_M": tile.BLOCK_M,
            "BLOCK_N": tile.BLOCK_N,
        }


def strides(name: str, axes: str, tensor: Tensor | None) -> dict[str, int]:
    """``stride_<name><axis>`` of the leading axes of a tensor; 0 where there is none."""
    sizes = (0,) * len(axes) if tensor is None else tensor.stride()[: len(axes)]
    return {f"stride_{name}{axis}": size for axis, size in zip(axes, sizes, strict=True)}


def forward(problem: Problem, *, keep: bool = False) -> tuple[Tensor, Tensor]:
    """The output [B, N, H, d], and what the backward reads: each query's maximum (in base 2) and
    1 / sum, [2, B, H, N], or nothing unless `keep`."""
    from fastvit.kernels.attention.kernel import attention_kernel

    batch, heads, n, m, d = problem.sizes
    out = problem.q.new_empty(batch, n, heads, d)
    shape = (2, batch, heads, n) if keep else (0,)
    statistics = out.new_empty(shape, dtype=accumulator(problem.q.dtype))
    if out.numel() == 0:
        return out, statistics
    tile = problem.tile()
    by_head = out.transpose(1, 2)
    launch(
        attention_kernel,
        problem.programs(n, tile.BLOCK_M),
        tile,
        **problem.arguments(tile, by_head),
        TAIL=problem.tail(m, tile.BLOCK_N),
        o_ptr=by_head,
        stat_ptr=statistics if keep else None,
        **strides("o", "bhn", by_head),
        stride_stat=statistics.stride(0),
    )
    return out, statistics
