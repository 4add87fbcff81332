"""Multi-head self-attention, spelled out in plain PyTorch.

Source: ViT paper (arXiv:2010.11929) appendix A, equations 5 to 8; rotary embedding,
arXiv:2104.09864, equation 34.
"""

import math

import torch
from torch import Tensor


def rope_pairs(table: Tensor, d: int, half: bool) -> Tensor:
    """[..., d/2], one entry for each pair of channels, from that or from [..., d]."""
    if table.shape[-1] == d // 2:
        return table
    return table[..., : d // 2] if half else table[..., ::2]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """x [..., N, d] with its last N' tokens turned by tables [..., N', d/2]; channel i is paired
    with i + d/2 where `half`, else 2 i with 2 i + 1."""
    prefix = x.shape[-2] - cos.shape[-2]
    turning = x[..., prefix:, :]
    a, b = turning.chunk(2, -1) if half else (turning[..., ::2], turning[..., 1::2])
    turned = (a * cos - b * sin, b * cos + a * sin)
    together = torch.cat(turned, -1) if half else torch.stack(turned, -1).flatten(-2)
    return torch.cat((x[..., :prefix, :], together.to(x.dtype)), -2)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    scale: float | None = None, rope: tuple[Tensor, Tensor] | None = None,
    rotate_half: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(q k^T * scale + mask) v; shapes as in `fastvit.ops.attention`."""
    if rope is not None:
        cos, sin = (rope_pairs(table, q.shape[-1], rotate_half) for table in rope)
        q, k = (rotate(x, cos, sin, rotate_half) for x in (q, k))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.transpose(-2, -1) * scale  # (B, H, N, M)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    # a query that may look nowhere gets zeros, as PyTorch's attention gives
    nowhere = (scores == -math.inf).all(dim=-1, keepdim=True)
    weights = scores.masked_fill(nowhere, 0.0).softmax(dim=-1).masked_fill(nowhere, 0.0)
    return torch.nn.functional.dropout(weights, dropout_p) @ v


def unpack(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3*H*d], or [T, 3*H*d] of one batch, as three [B, H, N, d]; views where qkv allows."""
    qkv = qkv if qkv.dim() == 3 else qkv[None]
    packed = qkv.unflatten(2, (3, num_heads, qkv.shape[2] // (3 * num_heads)))
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attention_qkv_reference(
    qkv: Tensor, num_heads: int, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    scale: float | None = None, rope: tuple[Tensor, Tensor] | None = None,
    rotate_half: bool = False,
) -> Tensor:  # fmt: skip
    """`attention_reference` on packed [B, N, 3*H*d]."""
    q, k, v = unpack(qkv, num_heads)
    out = attention_reference(q, k, v, attn_mask, dropout_p, scale, rope, rotate_half)
    return out.transpose(1, 2).flatten(2)


def attention_packed_reference(
    qkv: Tensor, num_heads: int, cu_seqlens: Tensor, max_seqlen: int | None = None,
    scale: float | None = None, rope: tuple[Tensor, Tensor] | None = None,
    rotate_half: bool = False,
) -> Tensor:  # fmt: skip
    """`attention_qkv_reference` of one image after another, [T, 3*H*d] to [T, H*d]."""
    sizes = cu_seqlens.diff().tolist()
    images = qkv[None].split(sizes, dim=1)
    tables = [None] * len(sizes)
    if rope is not None:
        tables = list(zip(*(table.split(sizes, dim=-2) for table in rope), strict=True))
    out = [
        attention_qkv_reference(image, num_heads, None, 0.0, scale, table, rotate_half)[0]
        for image, table in zip(images, tables, strict=True)
    ]
    return torch.cat(out) if out else qkv[:, : qkv.shape[1] // 3]
