"""Linear layer with an epilogue, in plain PyTorch.

Source: ViT paper (arXiv:2010.11929) equations 1 to 3, whose linear maps carry GELU, LayerScale
(arXiv:2103.17239, equation 4) and the residual sum.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


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
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None,
    residual: Tensor | None = None, row_scale: Tensor | None = None, activation: str | None = None,
) -> Tensor:  # fmt: skip
    """act(x W^T + b) * scale * row_scale + residual; shapes as in `fastvit.ops.linear`."""
    return finish_reference(F.linear(x, weight, bias), activation, scale, residual, row_scale)


def finish_reference(
    y: Tensor, activation: str | None = None, scale: Tensor | None = None,
    residual: Tensor | None = None, row_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(y) * scale * row_scale + residual."""
    y = ACTIVATIONS[activation or "none"](y)
    if scale is not None:
        y = y * scale
    if row_scale is not None:
        y = y * row_scale[..., None]
    return y if residual is None else residual + y
