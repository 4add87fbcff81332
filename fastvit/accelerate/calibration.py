"""Scales of activations for ``precision="fp8"``, from the largest values that some images cause."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.accelerate import fp8
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.fp8 import LINEARS
from fastvit.accelerate.graphs import GRAPHS
from fastvit.accelerate.plan import Part, check_module
from fastvit.kernels.linear_fp8.reference import E4M3_MAX

FORMAT = "fastvit fp8 calibration 1"
MARGIN = 1.5  # room for images with larger values than those seen; e4m3 loses no digits by it


@dataclass(frozen=True)
class Calibration:
    """The largest input of each linear in a model's blocks, which gives its scale in e4m3.

    Attributes:
        largest: by the name of a linear, the largest absolute value of its input.
        images: how many were looked at.
        margin: a scale is ``largest * margin / 448``.
    """

    largest: dict[str, float]
    images: int
    margin: float = MARGIN

    def scales(self, block: str) -> dict[str, float]:
        """Of the four linears of the block of that name.

        Raises:
            ValueError: naming those that were not calibrated.
        """
        prefix = f"{block}." if block else ""
        missing = [prefix + name for name in LINEARS if prefix + name not in self.largest]
        if missing:
            raise ValueError(f"the calibration is of another model: it lacks {', '.join(missing)}")
        # an input that is 0 throughout has any scale
        return {n: (self.largest[prefix + n] or 1.0) * self.margin / E4M3_MAX for n in LINEARS}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file for `load`."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file of `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            calibration = cls(**content)
            numbers = [*calibration.largest.values(), calibration.margin]
            if not all(0 <= float(number) < math.inf for number in numbers):
                raise ValueError("a number that is negative or not finite")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{os.fspath(path)} holds no calibration: {problem}") from error
        return calibration


def calibrate(
    model: nn.Module, images: Tensor | Iterable[Tensor], *, margin: float = MARGIN
) -> Calibration:
    """Run `model` on some images and note how large the inputs of its blocks' linears get.

    A handful of images of the kind that the model will see is enough: e4m3 spans 17 powers of two,
    and `margin` leaves room above. The model runs in eval mode and its own dtype, and is left as it
    was.

    Args:
        model: with pre-norm blocks of any library; accelerated or not.
        images: [B, C, H, W] as the model takes them, or several such batches.
        margin: at least 1.

    Returns:
        A `Calibration`, for ``accelerate(model, precision="fp8", calibration=...)``.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: no block to calibrate, no images, a margin below 1, values that are not finite.
    """
    check_module(model)
    if not 1 <= margin < math.inf:
        raise ValueError(f"margin {margin} is below 1 or not finite")
    return observe(model, quantizable(model, find_parts(model)), images, margin)


def observe(
    model: nn.Module,
    blocks: dict[str, Part],
    images: Tensor | Iterable[Tensor],
    margin: float = MARGIN,
) -> Calibration:
    """As `calibrate`, of the `blocks` that `quantizable` gave for `model`."""
    modes = {module: module.training for module in model.modules()}
    before = {part.module: _class_and_fp8(part.module) for part in blocks.values()}
    watches = {name: fp8.Watch() for name in blocks}
    # a graph would not let the watches look on
    graphs = {m: m.__dict__.pop(GRAPHS) for m in model.modules() if GRAPHS in m.__dict__}
    count = 0
    try:
        model.eval()
        for name, part in blocks.items():
            part.module.__class__ = part.quantized  # pyright: ignore
            setattr(part.module, fp8.QUANTIZED, watches[name])
        with torch.no_grad():
            for batch in [images] if isinstance(images, Tensor) else images:
                count += len(batch)
                model(batch)
    finally:
        for block, (kind, quantized) in before.items():
            block.__class__ = kind
            block.__dict__.pop(fp8.QUANTIZED, None)
            block.__dict__ |= quantized
        for module, own in graphs.items():
            setattr(module, GRAPHS, own)
        for module, training in modes.items():
            module.training = training
    if count == 0:
        raise ValueError("no images to calibrate with")
    found = {
        f"{name}.{linear}".lstrip("."): float(value)
        for name, watch in watches.items()
        for linear, value in watch.largest.items()
    }
    if bad := [name for name, value in found.items() if not math.isfinite(value)]:
        raise ValueError(f"inputs that are not finite: {', '.join(bad)}")
    return Calibration(found, count, margin)


def _class_and_fp8(block: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    state = block.__dict__
    return type(block), {k: v for k, v in state.items() if k == fp8.QUANTIZED}


def quantizable(model: nn.Module, parts: list[Part]) -> dict[str, Part]:
    """The blocks that can have e4m3 linears, by name, of the `parts` that `find_parts` gave.

    Raises:
        ValueError: there is none.
    """
    found = {part.row.module: part for part in parts if part.quantized is not None and part.row}
    if not found:
        raise ValueError(
            f"no block in this {type(model).__name__} can be quantised: that takes a pre-norm "
            "block with LayerNorms"
        )
    return found
