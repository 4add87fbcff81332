"""Linear layer with an epilogue, in plain PyTorch.

Source: ViT paper (arXiv:2010.11929) equations 1 to 3, whose linear maps carry GELU, LayerScale
(arXiv:2103.17239, equation 4) and the residual sum.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels.layer_norm.reference import merge_statistics_reference, to_e4m3


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): OpenAI CLIP's GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
}


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """act(x W^T + b) * scale * row_scale + residual; shapes as in `fastvit.ops.linear`."""
    return finish_reference(F.linear(x, weight, bias), activation, scale, residual, row_scale)


def finish_reference(
    y: Tensor,
    activation: str | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """act(y) * scale * row_scale + residual."""
    y = ACTIVATIONS[activation or "none"](y)
    if scale is not None:
        y = y * scale
    if row_scale is not None:
        y = y * row_scale[..., None]
    return y if residual is None else residual + y


def folded_linear_reference(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    colsum: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """act(norm(x) W^T + b) with the rows normalised before the product, so without `colsum`."""
    mean, variance = merge_statistics_reference(statistics, x.shape[-1])
    rstd = torch.rsqrt(variance + eps)
    normal = (x - mean[..., None]) * rstd[..., None]
    y = F.linear(normal.to(x.dtype), weight)
    return ACTIVATIONS[activation or "none"](y if bias is None else y + bias).to(x.dtype)


def fp8_linear_reference(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
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
