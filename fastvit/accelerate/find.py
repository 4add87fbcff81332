"""The modules of a model that a library's file knows."""

from __future__ import annotations

import importlib

from torch import nn

from fastvit.accelerate import own
from fastvit.accelerate.plan import Part, check_module

LIBRARIES = ("timm", "transformers", "torchvision", "open_clip", "dino")  # each a file here


def find_parts(model: nn.Module) -> list[Part]:
    """The known modules inside `model`; a TypeError for no nn.Module."""
    check_module(model)
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    # a library of which the model has nothing is not imported; DINO's classes are in no package
    packages = {kind.__module__.partition(".")[0] for kind in kinds} | {"dino"}
    parts: list[Part] = []
    for name in filter(packages.__contains__, LIBRARIES):
        parts += importlib.import_module(f"fastvit.accelerate.{name}").find(model)
    return parts + own.find(model)
