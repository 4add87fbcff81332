"""The encoder's MLP block in plain PyTorch. Source: ViT paper (arXiv:2010.11929), equation 3."""

from torch import Tensor

from fastvit.kernels.linear.reference import linear_reference


def mlp_reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None = "gelu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """(act(x W1^T + b1) W2^T + b2) * scale + residual; shapes as in `fastvit.ops.mlp`."""
    hidden = linear_reference(x, w1, b1, activation=activation)
    return linear_reference(hidden, w2, b2, scale=scale, residual=residual)
