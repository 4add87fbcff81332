"""Layer norm (arXiv:1607.06450, equation 4) and RMS norm (arXiv:1910.07467, equation 4)."""

import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)
