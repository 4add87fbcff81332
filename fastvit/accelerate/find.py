"""What the files of all libraries know inside a model."""

from __future__ import annotations

import sys

from torch import nn

from fastvit.accelerate import own
from fastvit.accelerate.plan import Part, check_module


def find_parts(model: nn.Module) -> list[Part]:
    """The known modules inside `model`; a TypeError for no nn.Module."""
    check_module(model)
    parts: list[Part] = []
    if "timm" in sys.modules:  # else no module can be timm's
        from fastvit.accelerate import timm

        parts += timm.find(model)
    return parts + own.find(model)
