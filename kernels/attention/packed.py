"""`attention_packed`: registration, public function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels._checks import check_tensors
from fastvit.kernels._library import Gradient, define_op, uses_triton
from fastvit.kernels._tuning import cdiv
from fastvit.kernels.attention.forward import Problem, accumulator, forward
from fastvit.kernels.attention.op import (
    BACKWARD_FLOPS,
    check_head_dim,
    check_rope,
    eager_qkv,
    gradients,
    rope_of,
    unpack,
    zeros_like,
)
from fastvit.kernels.attention.reference import attention_packed_reference, rotate


def _problem(
    qkv: Tensor, num_heads: int, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    cos: Tensor | None, sin: Tensor | None, half: bool,
) -> Problem:  # fmt: skip
    cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    return Problem(
        *unpack(qkv[None], num_heads), None, scale, rope_of(cos, sin, half), cu_seqlens, max_seqlen
    )


def _forward(*args: Any, keep: bool = True) -> tuple[Tensor, ...]:
    out, statistics = forward(_problem(*args), keep=keep)
    return out[0].flatten(1), statistics


def _backward(
    grad: Tensor, out: Tensor, kept: list[Tensor], args: list[Any], needs: list[bool]
) -> list[Tensor]:
    if grad.numel() == 0:
        return zeros_like(args, needs)
    qkv, num_heads = args[:2]
    grad, out = (x[None].unflatten(2, (num_heads, -1)) for x in (grad, out))
    packed = qkv.new_empty(qkv.shape)
    wanted = (needs[0], needs[0], needs[0], False, needs[5] or needs[6])
    _, tables = gradients(
        _problem(*args), grad, out, kept[0], unpack(packed[None], num_heads), wanted
    )
    found = [packed] if needs[0] else []
    return found + [t for t, need in zip(tables, needs[5:], strict=False) if need]


def _eager(
    qkv: Tensor, num_heads: int, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    cos: Tensor | None, sin: Tensor | None, half: bool,
) -> Tensor:  # fmt: skip
    """One image after another."""
    if cos is not None and sin is not None:
        qkv, cos, sin = _turned(qkv, num_heads, cos, sin, half), None, None
    sizes = cu_seqlens.diff().tolist()
    images = (x[None] for x in qkv.split(sizes))
    out = [eager_qkv(x, num_heads, None, scale, None, None, half)[0] for x in images]
    return torch.cat(out) if out else qkv[:, : qkv.shape[1] // 3]


def _masked(qkv: Tensor, num_heads: int, cu_seqlens: Tensor, scale: float) -> Tensor:
    """All of [T, T], for `torch.export`, which cannot loop over sizes that it does not know."""
    token = torch.arange(qkv.shape[0], device=qkv.device)
    image = torch.bucketize(token, cu_seqlens[1:], right=True)
    mask = image[:, None] == image
    return eager_qkv(qkv[None], num_heads, mask, scale, None, None, False)[0]


def _turned(qkv: Tensor, num_heads: int, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    q, k, v = unpack(qkv[None], num_heads)
    parts = (rotate(q, cos, sin, half), rotate(k, cos, sin, half), v)
    return torch.cat([x[0].transpose(0, 1).flatten(1) for x in parts], dim=1)


def _reference(
    qkv: Tensor, num_heads: int, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    cos: Tensor | None, sin: Tensor | None, half: bool,
) -> Tensor:  # fmt: skip
    rope = None if cos is None or sin is None else (cos, sin)
    return attention_packed_reference(qkv, num_heads, cu_seqlens, max_seqlen, scale, rope, half)


def _flops(qkv: Tensor, num_heads: int, cu_seqlens: Tensor, *rest: object) -> int:
    pairs = int(cu_seqlens.diff().long().square().sum())
    return 4 * pairs * (qkv.shape[1] // 3)


_attention_packed = define_op(
    "attention_packed",
    "(Tensor qkv, int num_heads, Tensor cu_seqlens, SymInt max_seqlen, float scale, Tensor? cos, "
    "Tensor? sin, bool rotate_half)",
    launch=lambda *args: _forward(*args, keep=False)[0],
    eager=_eager,
    reference=_reference,
    fake=lambda qkv, *rest: qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3),
    flops=_flops,
    flops_of_values=True,
    autocast=("qkv",),
    gradient=Gradient(
        forward=_forward,
        kept=1,
        fake_kept=lambda qkv, heads, *rest: (
            qkv.new_empty(2, 1, heads, qkv.shape[0], dtype=accumulator(qkv.dtype)),
        ),
        backward=_backward,
        saves_output=True,
        flops=BACKWARD_FLOPS,
    ),
)


def _check_lengths(qkv: Tensor, cu_seqlens: Tensor) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"attention_packed: cu_seqlens is {cu_seqlens.dtype}, not int32")
    if cu_seqlens.device != qkv.device:
        raise ValueError(
            f"attention_packed: cu_seqlens is on {cu_seqlens.device}, the input on {qkv.device}"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"attention_packed: cu_seqlens {list(cu_seqlens.shape)} is not [B + 1]")
    # on a GPU a look at the values would wait for it
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != len(qkv) or bounds != sorted(bounds):
            raise ValueError(
                f"attention_packed: cu_seqlens {bounds} does not rise from 0 to {len(qkv)}"
            )


def attention_packed(
    qkv: Tensor,
    num_heads: int,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    scale: float | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rotate_half: bool = False,
) -> Tensor:
    """`attention_qkv` of images of different sizes that lie one after another in one sequence.

    Each image costs its own tokens squared, rounded up to tiles, and at most one program that finds
    nothing to do. Sizes are data: new ones need no compilation and no waiting for the GPU.

    Args:
        qkv: [T, 3*H*d] for T tokens of all images, as [3, H, d] in its last dimension.
        num_heads: H.
        cu_seqlens: [B + 1] int32, where each image begins, and T: 0 and the cumulated lengths, as
            FlashAttention takes it. On a GPU its values are not checked.
        max_seqlen: tokens of the longest image, for the choice of tiles only; None for the mean
            of all.
        scale: of the scores; None for 1/sqrt(d).
        rope, rotate_half: as in `attention`, one row of the tables a token: [T, d], [T, d/2], or
            [H, ...] of either. A token that does not turn has cos 1 and sin 0.

    Returns:
        Contiguous [T, H*d].

    Raises:
        TypeError: a dtype that is not floating, lengths that are not integers.
        ValueError: shapes, lengths or devices that do not fit, d above 256.

    Source: NaViT (arXiv:2307.06304), section 2.1.
    """
    check_tensors("attention_packed", qkv)
    if qkv.dim() != 2 or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"attention_packed: qkv {list(qkv.shape)} does not fit [T, 3*H*d] "
            f"with num_heads={num_heads}"
        )
    tokens, width = qkv.shape
    d = width // (3 * num_heads)
    check_head_dim("attention_packed", d)
    _check_lengths(qkv, cu_seqlens)
    cos, sin = check_rope("attention_packed", rope, rotate_half, qkv, (1, num_heads, tokens, d))
    if cos is not None and cos.shape[-2] != tokens:
        raise ValueError(f"attention_packed: rope of {cos.shape[-2]} tokens for {tokens}")
    scale = 1 / math.sqrt(d) if scale is None else scale
    longest = max_seqlen or cdiv(tokens, max(1, len(cu_seqlens) - 1))
    exporting = torch.compiler.is_exporting() and not uses_triton(qkv)
    if cos is not None and sin is not None and exporting:
        qkv, cos, sin = _turned(qkv, num_heads, cos, sin, rotate_half), None, None
    if exporting:
        return _masked(qkv, num_heads, cu_seqlens, scale)
    # while compiling the op also stands for the plain path, whose loop depends on the lengths
    run = _attention_packed if uses_triton(qkv) or torch.compiler.is_compiling() else _eager
    return run(qkv, num_heads, cu_seqlens, longest, scale, cos, sin, rotate_half)
