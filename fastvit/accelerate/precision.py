"""``accelerate(precision=...)`` of a whole ViT: autocast around its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.accelerate.plan import PRECISION

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def at_precision(
    vit: nn.Module, forward: Callable[..., Any], x: Any, *args: Any, **kwargs: Any
) -> Any:
    """`forward(x)`, under autocast if `accelerate` was given a precision; results in x's dtype."""
    precision = vit.__dict__.get(PRECISION)
    pixels = x["patches"] if isinstance(x, dict) else x  # timm's NaFlex takes a dict
    if precision is None or not isinstance(pixels, Tensor):
        return forward(x, *args, **kwargs)
    with torch.autocast(pixels.device.type, AUTOCAST[precision]):
        return _cast(forward(x, *args, **kwargs), pixels.dtype)


def _cast(result: Any, dtype: torch.dtype) -> Any:
    """The floating tensors of a result, of one dtype."""
    if isinstance(result, Tensor):
        return result.to(dtype) if result.is_floating_point() else result
    if isinstance(result, dict):
        return {name: _cast(value, dtype) for name, value in result.items()}
    if isinstance(result, (list, tuple)):
        return type(result)(_cast(value, dtype) for value in result)
    return result
