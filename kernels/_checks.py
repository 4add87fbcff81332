"""Checks of an op's arguments, tensors or their metadata: a TypeError for a dtype, a ValueError for
anything else. Each names the offending value."""

import math
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(op: str, **operands: tuple[Any, str]) -> None:
    """`check_floats` and `check_shapes`."""
    check_floats(op, **{name: tensor for name, (tensor, _) in operands.items()})
    check_shapes(op, **operands)


def check_floats(op: str, **tensors: Any) -> None:
    """Of a floating dtype that kernels compute in: not complex, an integer or float8."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} is {tensor.dtype}; "
                "supported are float16, bfloat16, float32 and float64"
            )


def check_same_dtype(op: str, x: Any, **others: Any) -> None:
    """Of one dtype, unless autocast is about to cast them."""
    for name, tensor in others.items():
        if tensor is None or tensor.dtype == x.dtype:
            continue
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{op}: {name} is {tensor.dtype} but the input is {x.dtype}")


def check_shapes(op: str, **operands: tuple[Any, str]) -> None:
    """All on one device, and of the shapes named beside them, such as ``x=(x, "... K")`` and
    ``weight=(weight, "N K")``: a name stands for one size throughout, "..." for any leading ones.
    """
    known: dict[str, Any] = {}
    device: Any = None
    for name, (tensor, pattern) in operands.items():
        if tensor is None:
            continue
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the input on {device}")
        first, *rest = pattern.split()
        names: list[Any] = [first, *rest]
        if first == "...":
            names = [*known.setdefault("...", tensor.shape[: tensor.dim() - len(rest)]), *rest]
        expected = [known.get(size, size) if isinstance(size, str) else size for size in names]
        # one by one: Dynamo compares tuples of symbolic sizes as objects
        fits = len(expected) == tensor.dim()
        for size, want in zip(tensor.shape, expected, strict=False):
            fits = fits and (isinstance(want, str) or size == want)
        if not fits:
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected [{wanted}]")
        for size, given in zip(names, tensor.shape, strict=True):
            if isinstance(size, str):
                known[size] = given


def check_out_scale(op: str, out_scale: float | None) -> None:
    """None, or a positive finite number."""
    if out_scale is not None and not 0 < out_scale < math.inf:
        raise ValueError(f"{op}: out_scale {out_scale} is not a positive number")
