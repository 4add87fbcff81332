"""The encoder's MLP block in plain PyTorch. Source: ViT paper (arXiv:2010.11929), equation 3."""

from torch import Tensor

from fastvit.kernels.layer_norm.reference import layer_norm_reference
from fastvit.kernels.linear.reference import linear_reference


def mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    activation: str | None = "gelu", scale: Tensor | None = None, residual: Tensor | None = None,
    row_scale: Tensor | None = None, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """(act(h W1^T + b1) W2^T + b2) * scale * row_scale + residual, h = x or, with `norm_weight`,
    LN(x); shapes as in `fastvit.ops.mlp`."""
    if norm_weight is not None:
        x = layer_norm_reference(x, norm_weight, norm_bias, eps).to(w1.dtype)
    hidden = linear_reference(x, w1, b1, activation=activation)
    return linear_reference(hidden, w2, b2, scale, residual, row_scale)
