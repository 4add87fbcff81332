"""Linear, layer norm, attention and quantisation with e4m3 operands or results, in plain PyTorch.

Source: FP8 Formats for Deep Learning (arXiv:2209.05433).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels.attention.reference import attention_reference, unpack
from fastvit.kernels.layer_norm.reference import layer_norm_reference
from fastvit.kernels.linear.reference import ACTIVATIONS

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def to_e4m3(x: Tensor, out_scale: float) -> Tensor:
    """x / out_scale as e4m3, beyond +-448 as +-448; float64 stays float64, without rounding."""
    x = (x / out_scale).clamp(-E4M3_MAX, E4M3_MAX)
    return x if x.dtype == torch.float64 else x.to(E4M3)


def fp8_layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_scale: float
) -> Tensor:
    """Layer norm in float32 (float64 for float64 input), then `to_e4m3`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return to_e4m3(layer_norm_reference(x.to(wide), weight, bias, eps), out_scale)


def fp8_attention_reference(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, attn_mask: Tensor | None = None, *,
    num_heads: int = 0, scale: float | None = None, rope: tuple[Tensor, Tensor] | None = None,
    rotate_half: bool = False, out_scale: float,
) -> Tensor:  # fmt: skip
    """Attention of q, k, v or of packed q in float32 (float64 for float64 input), then `to_e4m3`,
    [B, N, H*d]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = unpack(q, num_heads) if k is None or v is None else (q, k, v)
    sides = q.to(wide), k.to(wide), v.to(wide)
    out = attention_reference(*sides, attn_mask, 0.0, scale, rope, rotate_half)
    return to_e4m3(out.transpose(1, 2).flatten(2), out_scale)


def fp8_quantize_reference(x: Tensor, out_scale: float) -> Tensor:
    """`to_e4m3` from float32 (float64 for float64 input)."""
    return to_e4m3(x.to(torch.promote_types(x.dtype, torch.float32)), out_scale)


def fp8_linear_reference(
    x: Tensor, weight: Tensor, factor: Tensor, bias: Tensor | None = None,
    scale: Tensor | None = None, residual: Tensor | None = None, activation: str | None = None,
    out_scale: float | None = None, dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """act((x W^T) * factor + b) * scale + residual in float32, of e4m3 operands; for float64 ones
    all in float64, without the rounding to `dtype` or e4m3."""
    wide = torch.promote_types(factor.dtype, torch.float32)
    y = F.linear(x.to(wide), weight.to(wide)) * factor
    y = ACTIVATIONS[activation or "none"](y if bias is None else y + bias.to(wide))
    if scale is not None:
        y = y * scale.to(wide)
    if residual is not None:
        y = y + residual.to(wide)
    if out_scale is not None:
        return to_e4m3(y, out_scale)
    return y if wide == torch.float64 else y.to(dtype)
