"""A layer norm and the linear behind it, in plain PyTorch. Source: ViT paper (arXiv:2010.11929),
equation 2: the queries, keys and values of LN(z)."""

from torch import Tensor

from fastvit.kernels.layer_norm.reference import layer_norm_reference
from fastvit.kernels.linear.reference import linear_reference


def norm_linear_reference(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor,
    bias: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """LN(x) W^T + b; shapes as in `fastvit.ops.norm_linear`."""
    normal = layer_norm_reference(x, norm_weight, norm_bias, eps)
    return linear_reference(normal.to(weight.dtype), weight, bias)
