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

from fastvit.accelerate.find import find_parts
from fastvit.accelerate.inference import LINEARS
from fastvit.accelerate.plan import check_module
from fastvit.kernels.layer_norm.inference import E4M3_MAX

FORMAT = "fastvit fp8 calibration 1"
MARGIN = 1.5  # room for images with larger values than those seen; e4m3 loses no digits by it


@dataclass(frozen=True)
class Calibration:
    """What the linears of a model's blocks take their inputs to be in e4m3.

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
        """What `save` wrote.

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
        model: with blocks of timm's `Block` or fastvit's; accelerated or not.
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
    blocks = quantizable(model)
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found = args[0].detach().abs().amax().float()
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        return hook

    modes = {module: module.training for module in model.modules()}
    # a hook inside a block makes it call its layers one by one
    handles = [
        block.get_submodule(linear).register_forward_pre_hook(watch(f"{name}.{linear}".lstrip(".")))
        for name, block in blocks.items()
        for linear in LINEARS
    ]
    count = 0
    try:
        model.eval()
        with torch.no_grad():
            for batch in [images] if isinstance(images, Tensor) else images:
                count += len(batch)
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if count == 0:
        raise ValueError("no images to calibrate with")
    found = {name: float(value) for name, value in largest.items()}
    if bad := [name for name, value in found.items() if not math.isfinite(value)]:
        raise ValueError(f"inputs that are not finite: {', '.join(bad)}")
    return Calibration(found, count, margin)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that can have e4m3 linears, by name.

    Raises:
        ValueError: there is none.
    """
    found = {
        part.row.module: part.module
        for part in find_parts(model)
        if part.inference is not None and part.row is not None and has_layer_norms(part.module)
    }
    if not found:
        raise ValueError(
            f"no block in this {type(model).__name__} can be quantised or folded: that takes "
            "timm's or fastvit's pre-norm Block with LayerNorms"
        )
    return found


def has_layer_norms(block: Any) -> bool:
    """Whether both norms of a block are LayerNorms."""
    return isinstance(block.norm1, nn.LayerNorm) and isinstance(block.norm2, nn.LayerNorm)
