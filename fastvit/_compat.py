"""timm, imported so that it also works beside a torchvision built for another torch."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch


@functools.cache
def _define_torchvision_schemas() -> None:
    """A CUDA build of torchvision beside a CPU build of torch cannot load its C++ ops, and then
    fails at import for want of two schemas. Defining them lets its Python part work; it is the
    part that timm uses."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[torch.library.Library] = []  # a Library takes its definitions back when collected


def import_timm() -> ModuleType:
    """The timm package.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        _define_torchvision_schemas()
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this needs {error.name}, which is not installed: pip install timm"
        ) from error
