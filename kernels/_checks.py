"""Argument checks shared by the public functions: each error names the offending value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvit.kernels._device import fp8_problem


def check_tensors(op: str, x: Tensor, **others: Tensor | None) -> None:
    """All on x's device and of a floating dtype that kernels compute in.

    Raises:
        TypeError: a complex, integer or float8 dtype.
        ValueError: tensors on different devices.
    """
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            continue
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(
                f"{op}: {name} is {tensor.dtype}; "
                "supported are float16, bfloat16, float32 and float64"
            )
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the input on {x.device}")


def check_same_dtype(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Of one dtype, unless autocast is about to cast them.

    Raises:
        TypeError: naming both dtypes.
    """
    for name, tensor in others.items():
        if (
            tensor is not None
            and tensor.dtype != x.dtype
            and not torch.is_autocast_enabled(x.device.type)
        ):
            raise TypeError(f"{op}: {name} is {tensor.dtype} but the input is {x.dtype}")


def check_shape(op: str, name: str, tensor: Tensor | None, *expected: int) -> None:
    """Exactly the expected shape.

    Raises:
        ValueError: naming both shapes.
    """
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {list(expected)}")


def check_fp8_device(op: str, device: torch.device) -> None:
    """Of an architecture whose tensor cores multiply e4m3.

    Raises:
        RuntimeError: naming the architecture.
    """
    if (problem := fp8_problem(device)) is not None:
        raise RuntimeError(f"{op}: {problem}")


def check_out_scale(op: str, out_scale: float | None) -> None:
    """None, or a positive finite number.

    Raises:
        ValueError: naming it.
    """
    if out_scale is not None and not 0 < out_scale < math.inf:
        raise ValueError(f"{op}: out_scale {out_scale} is not a positive number")
