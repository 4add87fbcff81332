"""`attention` and `attention_qkv`: launcher, registration, public functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels._checks import check_same_dtype, check_tensors
from fastvit.kernels._device import architecture
from fastvit.kernels._library import define_op, launch, uses_triton
from fastvit.kernels._tuning import cdiv, lookup
from fastvit.kernels.attention.reference import attention_qkv_reference, attention_reference
from fastvit.kernels.linear.op import float32_precision

MIN_PART = 16  # the narrowest matrix product a tensor core takes
MAX_HEAD_DIM = 256


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


def key_tail(keys: int, block: int) -> int:
    """Width of the masked last step: 0 if `block` divides `keys`, else a power of two from 16."""
    rest = keys % block
    return min(block, max(MIN_PART, 1 << (rest - 1).bit_length())) if rest else 0


def _additive(attn_mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    """The mask as values to add, broadcast to [B, H, N, M] without a copy of what repeats."""
    if attn_mask is None:
        return None
    if attn_mask.dtype == torch.bool:
        zeros = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device)
        attn_mask = zeros.masked_fill_(~attn_mask, -math.inf)
    return attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], keys)


def _launch(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float) -> Tensor:
    import triton.language as tl

    from fastvit.kernels.attention.kernel import attention_kernel

    batch, heads, n, d = q.shape
    m = k.shape[2]
    out = q.new_empty(batch, n, heads, d)
    if out.numel() == 0:
        return out
    mask = _additive(attn_mask, q, m)
    d0, d1, d2 = split_head_dim(d)
    tile = lookup("attention", architecture(q.device), q.dtype, N=n, M=m, D=d)
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    launch(
        attention_kernel,
        cdiv(n, tile.BLOCK_M) * batch * heads,
        tile,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        mask_ptr=mask,
        o_ptr=out,
        H=heads,
        N=n,
        M=m,
        **_strides("q", "bhnd", q.stride()),
        **_strides("k", "bhmd", k.stride()),
        **_strides("v", "bhmd", v.stride()),
        **_strides("m", "bhnm", mask_strides),
        stride_ob=out.stride(0),
        stride_on=out.stride(1),
        stride_oh=out.stride(2),
        SCALE=scale,
        PRECISION=float32_precision(q.dtype),
        ACC=tl.float64 if q.dtype == torch.float64 else tl.float32,
        ALIGN=math.gcd(16, *(s for t in (q, k, v) for s in t.stride()[:3]), *out.stride()[:3]),
        D=d,
        D0=d0,
        D1=d1,
        D2=d2,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        TAIL=key_tail(m, tile.BLOCK_N),
    )
    return out


def _strides(tensor: str, axes: str, strides: tuple[int, ...]) -> dict[str, int]:
    return {f"stride_{tensor}{axis}": size for axis, size in zip(axes, strides, strict=True)}


def _unpack(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3*H*d] as three [B, H, N, d] views."""
    batch, tokens, width = qkv.shape
    packed = qkv.reshape(batch, tokens, 3, num_heads, width // (3 * num_heads))
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _launch_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float
) -> Tensor:
    return _launch(q, k, v, attn_mask, scale)


def _launch_qkv(qkv: Tensor, num_heads: int, attn_mask: Tensor | None, scale: float) -> Tensor:
    return _launch(*_unpack(qkv, num_heads), attn_mask, scale).flatten(2)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """PyTorch's own attention, which wants a float mask in the query's dtype."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p=dropout_p, scale=scale)


def _eager_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float
) -> Tensor:
    return _sdpa(q, k, v, attn_mask, scale).transpose(1, 2)


def _eager_qkv(
    qkv: Tensor, num_heads: int, attn_mask: Tensor | None, scale: float, dropout_p: float = 0.0
) -> Tensor:
    out = _sdpa(*_unpack(qkv, num_heads), attn_mask, scale, dropout_p)
    return out.transpose(1, 2).flatten(2)


def _reference_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float
) -> Tensor:
    return attention_reference(q, k, v, attn_mask, scale=scale).transpose(1, 2)


def _reference_qkv(qkv: Tensor, num_heads: int, attn_mask: Tensor | None, scale: float) -> Tensor:
    return attention_qkv_reference(qkv, num_heads, attn_mask, scale=scale)


def _attention_flops(q: tuple[int, ...], k: tuple[int, ...], *rest: object) -> int:
    batch, heads, n, d = q
    return 4 * batch * heads * n * k[2] * d


def _qkv_flops(qkv: tuple[int, ...], *rest: object) -> int:
    batch, n, width = qkv
    return 4 * batch * n * n * (width // 3)


_attention = define_op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, float scale)",
    launch=_launch_attention,
    eager=_eager_attention,
    reference=_reference_attention,
    fake=lambda q, *rest: q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]),
    flops=_attention_flops,
    autocast=("q", "k", "v"),
)

_attention_qkv = define_op(
    "attention_qkv",
    "(Tensor qkv, int num_heads, Tensor? attn_mask, float scale)",
    launch=_launch_qkv,
    eager=_eager_qkv,
    reference=_reference_qkv,
    fake=lambda qkv, *rest: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
    flops=_qkv_flops,
    autocast=("qkv",),
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


def _check_head_dim(op: str, d: int) -> None:
    if not 1 <= d <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head dimension {d} is not within 1 to {MAX_HEAD_DIM}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale + mask) v, with the meaning of PyTorch's scaled_dot_product_attention.

    Scores, softmax and sums are in float32 (float64 for float64 input). With dropout it runs
    PyTorch's attention.

    Args:
        q: [B, H, N, d], any strides, d up to 256.
        k, v: [B, H, M, d].
        attn_mask: broadcasts to [B, H, N, M]; bool (True takes part) or values to add.
        dropout_p: probability of dropping a weight.
        scale: of the scores; None for 1/sqrt(d).

    Returns:
        [B, H, N, d], laid out in memory as [B, N, H, d]. A query whose mask admits no key gets
        zeros.

    Raises:
        TypeError: a dtype that is not floating, or k or v of another dtype than q.
        ValueError: shapes or devices that do not fit, no keys, d above 256.

    Source: ViT paper (arXiv:2010.11929) appendix A; online softmax, arXiv:1805.02867.
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
    _check_head_dim("attention", d)
    _check_mask("attention", attn_mask, q, (batch, heads, n, k.shape[2]))
    scale = 1 / math.sqrt(d) if scale is None else scale
    if dropout_p > 0 or not uses_triton(q):
        return _sdpa(q, k, v, attn_mask, scale, dropout_p)
    return _attention(q, k, v, attn_mask, scale).transpose(1, 2)


def attention_qkv(
    qkv: Tensor,
    num_heads: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """`attention` on the packed output of one qkv linear, read in place.

    Args:
        qkv: [B, N, 3*H*d], as [3, H, d] in its last dimension.
        num_heads: H.
        attn_mask, dropout_p, scale: as in `attention`.

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
    _check_head_dim("attention_qkv", d)
    _check_mask("attention_qkv", attn_mask, qkv, (batch, num_heads, n, n))
    scale = 1 / math.sqrt(d) if scale is None else scale
    if dropout_p > 0 or not uses_triton(qkv):
        return _eager_qkv(qkv, num_heads, attn_mask, scale, dropout_p)
    return _attention_qkv(qkv, num_heads, attn_mask, scale)
