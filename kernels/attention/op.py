"""`attention`, `attention_qkv` and `attention_packed`: registration, public functions.

One op in three forms that differ in which tensors there are: see `launch.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels._checks import check_floats, check_same_dtype, check_tensors
from fastvit.kernels._launch import wide_dtype
from fastvit.kernels._register import Gradient, Op, define_op
from fastvit.kernels.attention.launch import attention_backward, prepare, run, sizes_of
from fastvit.kernels.attention.reference import attention_reference, rope_pairs, rotate, unpack

MAX_HEAD_DIM = 256
ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? mask, Tensor? cos, Tensor? sin, Tensor? cu_seqlens, "
    "int num_heads, SymInt longest, float? scale, bool half"
)


def eager_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, mask: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, cu_seqlens: Tensor | None, num_heads: int, longest: int,
    scale: float | None, half: bool, dropout_p: float = 0.0,
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:  # fmt: skip
    """PyTorch's own attention, which wants a mask of two dimensions or more, floats in the query's
    dtype; or that of another `attend`."""
    together = k is None or v is None
    if k is None or v is None:
        q, k, v = unpack(q, num_heads)
    if cos is not None and sin is not None:
        cos, sin = (rope_pairs(table, q.shape[-1], half) for table in (cos, sin))
        q, k = rotate(q, cos, sin, half), rotate(k, cos, sin, half)
    if cu_seqlens is not None and not torch.compiler.is_exporting():
        sizes = cu_seqlens.diff().tolist()  # one image after another
        images = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
        done = [attend(*image, scale=scale) for image in images]
        out = torch.cat(done, dim=2) if done else q
    else:
        if cu_seqlens is not None:  # `torch.export` cannot loop over sizes that it does not know
            token = torch.arange(q.shape[2], device=q.device)
            image = torch.bucketize(token, cu_seqlens[1:], right=True)
            mask = image[:, None] == image
        elif mask is not None:
            mask = torch.atleast_2d(mask if mask.dtype == torch.bool else mask.to(q.dtype))
        out = attend(q, k, v, mask, dropout_p=dropout_p, scale=scale)
    out = out.transpose(1, 2)
    if not together:
        return out
    return out.flatten(2) if cu_seqlens is None else out[0].flatten(1)


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(have in (1, want) for have, want in pairs)


def _check_form(
    op: str, x: Any, mask: Any, cos: Any, sin: Any, sizes: tuple[int, int, int, int, int]
) -> None:
    """Head dimension, mask and rotary tables; `sizes` are (B, H, N, M, d)."""
    batch, h, n, m, d = sizes
    if not 1 <= d <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head dimension {d} is not within 1 to {MAX_HEAD_DIM}")
    for name, other in (("attn_mask", mask), ("cos of rope", cos), ("sin of rope", sin)):
        if other is None:
            continue
        if other.device != x.device:
            raise ValueError(f"{op}: {name} is on {other.device}, the input on {x.device}")
        if not other.is_floating_point() and (other is not mask or other.dtype != torch.bool):
            supported = "bool and floats" if other is mask else "floats"
            raise TypeError(f"{op}: {name} is {other.dtype}; supported are {supported}")
    if mask is not None and not _broadcasts(mask.shape, (batch, h, n, m)):
        raise ValueError(
            f"{op}: attn_mask {list(mask.shape)} does not broadcast to {[batch, h, n, m]}"
        )
    if cos is None:
        return
    if n != m:
        raise ValueError(f"{op}: rope with {n} queries and {m} keys")
    fits = (
        d % 2 == 0
        and cos.shape == sin.shape
        and 2 <= cos.dim() <= 4
        and cos.shape[-1] in (d, d // 2)
        and cos.shape[-2] <= n
        and _broadcasts(cos.shape[:-2], (batch, h))
    )
    if not fits:
        raise ValueError(
            f"{op}: rope of cos {list(cos.shape)} and sin {list(sin.shape)} does not fit "
            f"[B, H, N', d] or [B, H, N', d/2] with B, H, N, d = {[batch, h, n, d]}"
        )


def check_attention(
    op: str, q: Any, k: Any, v: Any, mask: Any, cos: Any, sin: Any, cu_seqlens: Any,
    num_heads: int, longest: int, scale: float | None, half: bool,
) -> None:  # fmt: skip
    if k is not None:
        check_tensors(op, q=(q, "B H N d"), k=(k, "B H M d"), v=(v, "B H M d"))
        check_same_dtype(op, q, k=k, v=v)
        if k.shape[2] == 0 and 0 not in q.shape:
            raise ValueError(f"{op}: k {list(k.shape)} has no keys")
    else:
        check_floats(op, qkv=q)
        form = "[B, N, 3*H*d]" if cu_seqlens is None else "[T, 3*H*d]"
        dims = form.count(",") + 1
        if q.dim() != dims or num_heads < 1 or q.shape[-1] % (3 * num_heads):
            raise ValueError(
                f"{op}: qkv {list(q.shape)} does not fit {form} with num_heads={num_heads}"
            )
    sizes = sizes_of(q, k, num_heads)
    _check_form(op, q, mask, cos, sin, sizes)
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens is {cu_seqlens.dtype}, not int32")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, the input on {q.device}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens {list(cu_seqlens.shape)} is not [B + 1]")
    if cos is not None and cos.shape[-2] != q.shape[0]:
        raise ValueError(f"{op}: rope of {cos.shape[-2]} tokens for {q.shape[0]}")


def _check_bounds(qkv: Tensor, cu_seqlens: Tensor) -> None:
    bounds = cu_seqlens.tolist()
    if bounds and (bounds[0] != 0 or bounds[-1] != len(qkv) or bounds != sorted(bounds)):
        raise ValueError(
            f"attention_packed: cu_seqlens {bounds} does not rise from 0 to {len(qkv)}"
        )


def fake_attention(q: Tensor, k: Tensor | None, *rest: Any) -> Tensor:
    if k is None:
        return q.new_empty((*q.shape[:-1], q.shape[-1] // 3))
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _fake_kept(*args: Any) -> tuple[Tensor]:
    q = args[0]
    b, h, n, _, _ = sizes_of(q, args[1], args[7])
    return (q.new_empty(2, b, h, n, dtype=wide_dtype(q.dtype)),)


def attention_flops(*args: Any) -> int:
    q, k, _, _, _, _, cu_seqlens, num_heads, *_ = args
    b, h, n, m, d = sizes_of(q, k, num_heads)
    pairs = b * n * m if cu_seqlens is None else int(cu_seqlens.diff().long().square().sum())
    return 4 * pairs * h * d


_attention, _attention_qkv, _attention_packed = (
    define_op(
        name,
        ARGUMENTS,
        functools.partial(check_attention, name), prepare, run, eager=eager_attention,
        fake=fake_attention, flops=attention_flops,
        smooth=functools.partial(eager_attention, attend=attention_reference),
        opaque=name == "attention_packed",  # it loops over lengths
        autocast=("q", "k", "v"),
        gradient=Gradient(
            attention_backward, kept=1, fake_kept=_fake_kept, saves_output=True,
            flops=2.5,  # as PyTorch counts FlashAttention's: five products, where here are two
        ),
    )
    for name in ("attention", "attention_qkv", "attention_packed")
)  # fmt: skip


def _with_dropout(op: Op, args: tuple[Any, ...], dropout_p: float) -> Tensor:
    op.check(*args)
    return eager_attention(*args, dropout_p=dropout_p)


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    scale: float | None = None, rope: tuple[Tensor, Tensor] | None = None,
    rotate_half: bool = False,
) -> Tensor:  # fmt: skip
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
    cos, sin = (None, None) if rope is None else rope
    tensors, options = (q, k, v, attn_mask, cos, sin, None), (0, 0, scale, rotate_half)
    if dropout_p > 0:
        return _with_dropout(_attention, tensors + options, dropout_p).transpose(1, 2)
    return _attention.apply(tensors, *options).transpose(1, 2)


def attention_qkv(
    qkv: Tensor, num_heads: int, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    scale: float | None = None, rope: tuple[Tensor, Tensor] | None = None,
    rotate_half: bool = False,
) -> Tensor:  # fmt: skip
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
    cos, sin = (None, None) if rope is None else rope
    tensors = (qkv, None, None, attn_mask, cos, sin, None)
    options = (num_heads, 0, scale, rotate_half)
    if dropout_p > 0:
        return _with_dropout(_attention_qkv, tensors + options, dropout_p)
    return _attention_qkv.apply(tensors, *options)


def attention_packed(
    qkv: Tensor, num_heads: int, cu_seqlens: Tensor, max_seqlen: int | None = None,
    scale: float | None = None, rope: tuple[Tensor, Tensor] | None = None,
    rotate_half: bool = False,
) -> Tensor:  # fmt: skip
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
    cos, sin = (None, None) if rope is None else rope
    # on a GPU a look at the values would wait for it
    if cu_seqlens.is_cpu and cu_seqlens.dim() == 1 and not torch.compiler.is_compiling():
        _check_bounds(qkv, cu_seqlens)
    tensors = (qkv, None, None, None, cos, sin, cu_seqlens)
    return _attention_packed.apply(tensors, num_heads, max_seqlen or 0, scale, rotate_half)
