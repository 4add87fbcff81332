"""Multi-head self-attention, spelled out in plain PyTorch.

Source: ViT paper (arXiv:2010.11929) appendix A, equations 5 to 8.
"""

import math

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale + mask) v; shapes as in `fastvit.ops.attention`."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.transpose(-2, -1) * scale  # (B, H, N, M)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    weights = scores.softmax(dim=-1)
    # a query that may look nowhere gets zeros, as PyTorch's attention gives
    weights = weights.masked_fill((scores == -math.inf).all(dim=-1, keepdim=True), 0.0)
    return torch.nn.functional.dropout(weights, dropout_p) @ v


def attention_qkv_reference(
    qkv: Tensor,
    num_heads: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """`attention_reference` on packed [B, N, 3*H*d]."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).unbind(2)
    out = attention_reference(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask, dropout_p, scale
    )
    return out.transpose(1, 2).reshape(batch, tokens, width // 3)
