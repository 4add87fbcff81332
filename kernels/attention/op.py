"""`attention` and `attention_qkv`: registration, public functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_tensors
from fastvit.kernels._library import Gradient, define_op, uses_triton
from fastvit.kernels.attention.backward import backward, bias_gradient, rope_gradient
from fastvit.kernels.attention.forward import Problem, Rope, accumulator, forward
from fastvit.kernels.attention.reference import (
    attention_qkv_reference,
    attention_reference,
    rope_pairs,
    rotate,
)

MAX_HEAD_DIM = 256


def _additive(attn_mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    """The mask as values to add, broadcast to [B, H, N, M] without a copy of what repeats."""
    if attn_mask is None:
        return None
    if attn_mask.dtype == torch.bool:
        zeros = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device)
        attn_mask = zeros.masked_fill_(~attn_mask, -math.inf)
    return attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], keys)


def rope_of(cos: Tensor | None, sin: Tensor | None, half: bool) -> Rope | None:
    """The rotary embedding of an op's arguments."""
    return None if cos is None or sin is None else Rope(cos, sin, half)


def _problem(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float,
    cos: Tensor | None, sin: Tensor | None, half: bool,
) -> Problem:  # fmt: skip
    return Problem(q, k, v, _additive(attn_mask, q, k.shape[2]), scale, rope_of(cos, sin, half))


def unpack(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3*H*d] as three [B, H, N, d] views."""
    batch, tokens, width = qkv.shape
    packed = qkv.reshape(batch, tokens, 3, num_heads, width // (3 * num_heads))
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _qkv_problem(qkv: Tensor, num_heads: int, *rest: Any) -> Problem:
    return _problem(*unpack(qkv, num_heads), *rest)


def _launch_qkv(*args: Any) -> Tensor:
    return forward(_qkv_problem(*args))[0].flatten(2)


def _forward_qkv(*args: Any) -> tuple[Tensor, ...]:
    out, statistics = forward(_qkv_problem(*args), keep=True)
    return out.flatten(2), statistics


def gradients(
    problem: Problem,
    grad: Tensor,
    out: Tensor,
    statistics: Tensor,
    targets: tuple[Tensor, Tensor, Tensor],
    needs: Sequence[bool],
    attn_mask: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Write the gradients of q, k and v into `targets`.

    Args:
        grad: of the output `out`, both [B, N, H, d].
        statistics: what `forward` gave.
        needs: of q, k, v, attn_mask, and cos or sin, whose gradients take those of q and k.

    Returns:
        The gradients of attn_mask and of (cos, sin), each in a list that is empty unless needed.
    """
    *needs_qkv, needs_mask, needs_rope = needs
    wanted = [need or (needs_rope and i < 2) for i, need in enumerate(needs_qkv)]
    dq, dk, dv = (target if want else None for target, want in zip(targets, wanted, strict=True))
    delta = backward(problem, grad, out, statistics, dq, dk, dv)
    bias, tables = [], []
    if needs_mask and attn_mask is not None:
        bias = [bias_gradient(problem, grad, statistics, delta, attn_mask)]
    if needs_rope and problem.rope is not None:
        tables = rope_gradient(problem.rope, (problem.q, targets[0]), (problem.k, targets[1]))
    return bias, tables


def _backward_attention(
    grad: Tensor, out: Tensor, kept: list[Tensor], args: list[Any], needs: list[bool]
) -> list[Tensor]:
    if grad.numel() == 0:
        return zeros_like(args, needs)
    q, k, v, attn_mask = args[:4]
    targets = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    wanted = (*needs[:4], needs[5] or needs[6])
    bias, tables = gradients(_problem(*args), grad, out, kept[0], targets, wanted, attn_mask)
    found = [target for target, need in zip(targets, needs, strict=False) if need]
    return found + bias + [t for t, need in zip(tables, needs[5:], strict=False) if need]


def _backward_qkv(
    grad: Tensor, out: Tensor, kept: list[Tensor], args: list[Any], needs: list[bool]
) -> list[Tensor]:
    if grad.numel() == 0:
        return zeros_like(args, needs)
    qkv, num_heads, attn_mask = args[:3]
    grad, out = (x.unflatten(2, (num_heads, -1)) for x in (grad, out))
    packed = qkv.new_empty(qkv.shape)
    wanted = (needs[0], needs[0], needs[0], needs[2], needs[4] or needs[5])
    bias, tables = gradients(
        _qkv_problem(*args), grad, out, kept[0], unpack(packed, num_heads), wanted, attn_mask
    )
    found = [packed] if needs[0] else []
    return found + bias + [t for t, need in zip(tables, needs[4:], strict=False) if need]


def zeros_like(args: list[Any], needs: list[bool]) -> list[Tensor]:
    """The gradients where there is no output."""
    return [torch.zeros(arg.shape).to(arg) for arg, need in zip(args, needs, strict=True) if need]


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float,
    cos: Tensor | None, sin: Tensor | None, half: bool, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """PyTorch's own attention, which wants a float mask in the query's dtype."""
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin, half), rotate(k, cos, sin, half)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p=dropout_p, scale=scale)


def eager_qkv(qkv: Tensor, num_heads: int, *rest: Any) -> Tensor:
    """The plain path of `attention_qkv`."""
    return _sdpa(*unpack(qkv, num_heads), *rest).transpose(1, 2).flatten(2)


def _by_reference(reference: Callable[..., Tensor], *args: Any) -> Tensor:
    """A reference called with the arguments of its op."""
    *tensors, scale, cos, sin, half = args
    rope = None if cos is None else (cos, sin)
    return reference(*tensors, scale=scale, rope=rope, rotate_half=half)


def _attention_flops(q: tuple[int, ...], k: tuple[int, ...], *rest: object) -> int:
    batch, heads, n, d = q
    return 4 * batch * heads * n * k[2] * d


def _qkv_flops(qkv: tuple[int, ...], *rest: object) -> int:
    batch, n, width = qkv
    return 4 * batch * n * n * (width // 3)


# as PyTorch counts FlashAttention's backward: five products, where the forward has two
BACKWARD_FLOPS = 2.5

_attention = define_op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, float scale, Tensor? cos, Tensor? sin, "
    "bool rotate_half)",
    launch=lambda *args: forward(_problem(*args))[0],
    eager=lambda *args: _sdpa(*args).transpose(1, 2),
    reference=lambda *args: _by_reference(attention_reference, *args).transpose(1, 2),
    fake=lambda q, *rest: q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]),
    flops=_attention_flops,
    autocast=("q", "k", "v"),
    gradient=Gradient(
        forward=lambda *args: forward(_problem(*args), keep=True),
        kept=1,
        fake_kept=lambda q, *rest: (q.new_empty(2, *q.shape[:3], dtype=accumulator(q.dtype)),),
        backward=_backward_attention,
        saves_output=True,
        flops=BACKWARD_FLOPS,
    ),
)

_attention_qkv = define_op(
    "attention_qkv",
    "(Tensor qkv, int num_heads, Tensor? attn_mask, float scale, Tensor? cos, Tensor? sin, "
    "bool rotate_half)",
    launch=_launch_qkv,
    eager=eager_qkv,
    reference=functools.partial(_by_reference, attention_qkv_reference),
    fake=lambda qkv, *rest: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
    flops=_qkv_flops,
    autocast=("qkv",),
    gradient=Gradient(
        forward=_forward_qkv,
        kept=1,
        fake_kept=lambda qkv, heads, *rest: (
            qkv.new_empty(2, qkv.shape[0], heads, qkv.shape[1], dtype=accumulator(qkv.dtype)),
        ),
        backward=_backward_qkv,
        saves_output=True,
        flops=BACKWARD_FLOPS,
    ),
)


def _check_mask(
    op: str, attn_mask: Tensor | None, q: Tensor, shape: tuple[int, int, int, int]
) -> None:
    if attn_mask is None:
        return
    if attn_mask.device != q.device:
        raise ValueError(f"{op}: attn_mask is on {attn_mask.device}, the input on {q.device}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"{op}: attn_mask is {attn_mask.dtype}; supported are bool and floats")
    fits = attn_mask.dim() <= 4 and all(
        have in (1, want)
        for have, want in zip(reversed(attn_mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{op}: attn_mask {list(attn_mask.shape)} does not broadcast to {list(shape)}"
        )


def check_head_dim(op: str, d: int) -> None:
    """Raises:
    ValueError: no kernel takes head dimension `d`.
    """
    if not 1 <= d <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head dimension {d} is not within 1 to {MAX_HEAD_DIM}")


def check_rope(
    op: str, rope: tuple[Tensor, Tensor] | None, half: bool, q: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin, one entry for each pair of channels.

    Args:
        rope: as in `attention`.
        q: a tensor on the device of the op's input.
        shape: (B, H, N, d).

    Raises:
        TypeError: tables that are not floating.
        ValueError: tables that do not fit, or an odd head dimension.
    """
    if rope is None:
        return None, None
    cos, sin = rope
    *batched, n, d = shape
    for name, table in (("cos", cos), ("sin", sin)):
        if not table.is_floating_point():
            raise TypeError(f"{op}: {name} of rope is {table.dtype}; floats are supported")
        if table.device != q.device:
            raise ValueError(f"{op}: {name} of rope is on {table.device}, the input on {q.device}")
    fits = (
        d % 2 == 0
        and cos.shape == sin.shape
        and 2 <= cos.dim() <= 4
        and cos.shape[-1] in (d, d // 2)
        and cos.shape[-2] <= n
        and all(
            have in (1, want)
            for have, want in zip(reversed(cos.shape[:-2]), reversed(batched), strict=False)
        )
    )
    if not fits:
        raise ValueError(
            f"{op}: rope of cos {list(cos.shape)} and sin {list(sin.shape)} does not fit "
            f"[B, H, N', d] or [B, H, N', d/2] with B, H, N, d = {list(shape)}"
        )
    return rope_pairs(cos, d, half), rope_pairs(sin, d, half)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rotate_half: bool = False,
) -> Tensor:
    """softmax(q k^T * scale + mask) v, with the meaning of PyTorch's scaled_dot_product_attention,
    and a rotary position embedding of q and k where `rope` gives one.

    Scores, softmax and sums are in float32 (float64 for float64 input), the rotation too. With
    dropout it runs PyTorch's attention.

    Args:
        q: [B, H, N, d], any strides, d up to 256.
        k, v: [B, H, M, d].
        attn_mask: broadcasts to [B, H, N, M]; bool (True takes part) or values to add. The gradient
            of the latter is summed in a fixed order.
        dropout_p: probability of dropping a weight.
        scale: of the scores; None for 1/sqrt(d).
        rope: (cos, sin), which turn the last N' tokens of q and k; the N - N' before them (class
            token, registers) stay. Each is [N', d/2], one angle for a pair of channels, or
            [N', d], of which the first entry of a pair is read; in front may stand [H, ...] for
            angles of each head, or [B, 1, ...] or [B, H, ...] for those of each image. N = M. Any
            floating dtype; fastest in that of q, with [N', d/2].
        rotate_half: channel i is paired with i + d/2 (DINOv3, transformers), else 2 i with 2 i + 1
            (timm's default). (a, b) becomes (a cos - b sin, b cos + a sin). Of timm's `rope`, which
            is [N', 2 d]: ``sin, cos = rope.chunk(2, -1)``.

    Returns:
        [B, H, N, d], laid out in memory as [B, N, H, d]. A query whose mask admits no key gets
        zeros.

    Raises:
        TypeError: a dtype that is not floating, or k or v of another dtype than q.
        ValueError: shapes or devices that do not fit, no keys, d above 256, an odd d with `rope`.

    Source: ViT paper (arXiv:2010.11929) appendix A; online softmax, arXiv:1805.02867; backward,
    FlashAttention-2 (arXiv:2307.08691); rotary embedding, arXiv:2104.09864.
    """
    check_tensors("attention", q, k=k, v=v)
    check_same_dtype("attention", q, k=k, v=v)
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4:
        raise ValueError(
            f"attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not fit "
            "[B, H, N, d], [B, H, M, d], [B, H, M, d]"
        )
    batch, heads, n, d = q.shape
    if k.shape[0] != batch or k.shape[1] != heads or k.shape[3] != d:
        raise ValueError(f"attention: q {list(q.shape)} and k {list(k.shape)} differ beyond tokens")
    if k.shape[2] == 0 and q.numel() > 0:
        raise ValueError(f"attention: k {list(k.shape)} has no keys")
    check_head_dim("attention", d)
    _check_mask("attention", attn_mask, q, (batch, heads, n, k.shape[2]))
    if rope is not None and k.shape[2] != n:
        raise ValueError(f"attention: rope with {n} queries and {k.shape[2]} keys")
    cos, sin = check_rope("attention", rope, rotate_half, q, (batch, heads, n, d))
    scale = 1 / math.sqrt(d) if scale is None else scale
    if dropout_p > 0 or not uses_triton(q):
        return _sdpa(q, k, v, attn_mask, scale, cos, sin, rotate_half, dropout_p)
    return _attention(q, k, v, attn_mask, scale, cos, sin, rotate_half).transpose(1, 2)


def attention_qkv(
    qkv: Tensor,
    num_heads: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rotate_half: bool = False,
) -> Tensor:
    """`attention` on the packed output of one qkv linear, read in place.

    Args:
        qkv: [B, N, 3*H*d], as [3, H, d] in its last dimension.
        num_heads: H.
        attn_mask, dropout_p, scale, rope, rotate_half: as in `attention`.

    Returns:
        Contiguous [B, N, H*d].

    Raises:
        TypeError, ValueError: as `attention`, and for a width that 3 * num_heads does not divide.
    """
    check_tensors("attention_qkv", qkv)
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"attention_qkv: qkv {list(qkv.shape)} does not fit [B, N, 3*H*d] "
            f"with num_heads={num_heads}"
        )
    batch, n, width = qkv.shape
    d = width // (3 * num_heads)
    check_head_dim("attention_qkv", d)
    _check_mask("attention_qkv", attn_mask, qkv, (batch, num_heads, n, n))
    cos, sin = check_rope("attention_qkv", rope, rotate_half, qkv, (batch, num_heads, n, d))
    scale = 1 / math.sqrt(d) if scale is None else scale
    if dropout_p > 0 or not uses_triton(qkv):
        return eager_qkv(qkv, num_heads, attn_mask, scale, cos, sin, rotate_half, dropout_p)
    return _attention_qkv(qkv, num_heads, attn_mask, scale, cos, sin, rotate_half)
