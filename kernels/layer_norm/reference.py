"""Layer norm (arXiv:1607.06450, equation 4) and RMS norm (arXiv:1910.07467, equation 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def row_statistics_reference(x: Tensor) -> Tensor:
    """Mean and sum of centred squares over the last dimension, [..., 1, 2], float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(dim=-1)
    squares = (wide - mean[..., None]).square().sum(dim=-1)
    return torch.stack([mean, squares], dim=-1)[..., None, :]


def merge_statistics_reference(statistics: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [...] of rows of `width` values from those of their parts [..., T, 2].

    Source: Chan, Golub and LeVeque, Updating formulae, 1979.
    """
    parts = statistics.shape[-2]
    # a part's columns are a power of two, of which only one gives this many parts
    part = 1 << ((width - 1) // parts).bit_length() if parts > 1 else width
    starts = torch.arange(0, parts * part, part, device=statistics.device)
    counts = (width - starts).clamp(max=part).to(statistics.dtype)
    means, squares = statistics.unbind(dim=-1)  # (..., T)
    mean = (means * counts).sum(dim=-1) / width
    apart = means - mean[..., None]
    return mean, (squares + counts * apart.square()).sum(dim=-1) / width


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


def fp8_quantize_reference(x: Tensor, out_scale: float) -> Tensor:
    """`to_e4m3` from float32 (float64 for float64 input)."""
    return to_e4m3(x.to(torch.promote_types(x.dtype, torch.float32)), out_scale)
