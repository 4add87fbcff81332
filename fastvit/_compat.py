"""timm, torchvision and transformers, imported so that they also work beside a torchvision built
for another torch."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
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


def _import(name: str, before: Callable[[], None] = lambda: None) -> ModuleType:
    """A package, after `before`; where something is missing, an error that says what to install."""
    try:
        before()
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this needs {error.name}, which is not installed: pip install {name}"
        ) from error


def import_timm() -> ModuleType:
    """The timm package.

    Raises:
        ImportError: timm is not installed.
    """
    return _import("timm", before=_define_torchvision_schemas)


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Where Hugging Face's hub cannot be reached, its client looks into its cache at once, instead
    of trying for a minute."""
    constants = _import("huggingface_hub").constants
    before = constants.HF_HUB_OFFLINE
    try:
        importlib.import_module("huggingface_hub.utils").get_session().head(
            constants.ENDPOINT, timeout=5
        )
    except Exception:  # each of its versions has another HTTP library
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def import_torchvision() -> ModuleType:
    """The torchvision package; its C++ ops may be missing.

    Raises:
        ImportError: torchvision is not installed.
    """
    return _import("torchvision", before=_define_torchvision_schemas)


def import_transformers() -> ModuleType:
    """The transformers package.

    Raises:
        ImportError: transformers is not installed.
    """
    with contextlib.suppress(ModuleNotFoundError):  # it imports torchvision where it finds one
        _define_torchvision_schemas()
    return _import("transformers")
