"""Which architectures of which library `accelerate` takes over, and whether it keeps their numbers.

Every architecture is built small (two blocks, few patches; each library's own block with its own
options), its parameters drawn at random so that each of them matters, run, accelerated and run
again.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import gc
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvit.accelerate import accelerate
from fastvit.accelerate.find import find_parts
from fastvit.accelerate.plan import make_plan
from fastvit.check import families, models
from fastvit.numerics import exact_convolutions, randomise

TOLERANCE = 1e-5  # of the largest output, float32: room for another order of sums
SEED = 0
DEPTH = 2  # blocks of a model built here

Build = Callable[[str], tuple[nn.Module, Callable[[nn.Module], Any]]]


@dataclasses.dataclass(frozen=True)
class Covered:
    """One architecture.

    Attributes:
        library, architecture: by name.
        fused: encoder blocks that run on our kernels.
        left: encoder blocks that run their library's forward.
        why: reasons of the blocks left.
        parts_left: what else is left, such as ``attn_pool``.
        error: largest difference of any output from the library's own, relative to that output's
            largest value, in float32; None where something raised.
        raised: what did.
    """

    library: str
    architecture: str
    fused: int = 0
    left: int = 0
    why: tuple[str, ...] = ()
    parts_left: tuple[str, ...] = ()
    error: float | None = None
    raised: str | None = None

    @property
    def sound(self) -> bool:
        """Nothing raised and the error is within `TOLERANCE`; a NaN is not."""
        return self.error is not None and self.error <= TOLERANCE

    @property
    def fully_fused(self) -> bool:
        """Whether every encoder block runs on our kernels."""
        return self.fused > 0 and self.left == 0


@dataclasses.dataclass(frozen=True)
class Library:
    """How a library's architectures are listed and built small.

    Attributes:
        names: of all, or an ImportError where the library is not installed.
        build: a model in eval mode with random parameters, and the call to compare.
    """

    names: Callable[[], list[str]]
    build: Build


def libraries() -> dict[str, Library]:
    """The libraries by name."""

    def timm(name: str) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
        model, inputs = models.build_small(name, seed=SEED)
        return model, lambda model: model(inputs)

    def transformers(name: str) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
        torch.manual_seed(SEED)  # of the inputs
        model, inputs = families.tiny_model(name)
        randomise(model, SEED)
        return model, lambda model: model(**inputs)

    return {
        "timm": Library(models.architectures, timm),
        "transformers": Library(lambda: list(families.FAMILIES), transformers),
        "torchvision": Library(_torchvision_names, _torchvision),
        "open_clip": Library(_open_clip_names, _open_clip),
    }


def select(
    chosen: Iterable[str] | None = None, pattern: str = "*"
) -> tuple[list[tuple[str, str]], list[str]]:
    """Architectures to cover.

    Args:
        chosen: names of libraries; None for all that are installed.
        pattern: of architecture names; ``*`` stands for anything.

    Returns:
        Pairs (library, architecture), and the libraries that are not installed.

    Raises:
        ValueError: an unknown library, or no architecture matches.
        ImportError: a chosen library is not installed.
    """
    known = libraries()
    for name in chosen or ():
        if name not in known:
            raise ValueError(f"unknown library {name!r}; known: {', '.join(known)}")
    pairs: list[tuple[str, str]] = []
    absent: list[str] = []
    for name in chosen or known:
        try:
            names = known[name].names()
        except ImportError:
            if chosen:
                raise
            absent.append(name)
            continue
        pairs += [(name, found) for found in names if fnmatch.fnmatchcase(found, pattern)]
    if not pairs:
        raise ValueError(f"no architecture matches {pattern!r}")
    return pairs, absent


@torch.no_grad()
@exact_convolutions
def cover(library: str, architecture: str) -> Covered:
    """Build, run, accelerate, run again. What raises is reported, never raised."""
    try:
        model, run = libraries()[library].build(architecture)
        theirs = _outputs(run(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that it changed nothing; counted
            accelerate(model)
        plan = make_plan(model, find_parts(model))
        ours = _outputs(run(model))
        return Covered(
            library,
            architecture,
            fused=len(plan.fused_blocks),
            left=len(plan.left_blocks),
            why=_reasons(row.reason for row in plan.rows if row.block and not row.fused),
            parts_left=tuple(row.module for row in plan.rows if not (row.block or row.fused)),
            error=_error(ours, theirs),
        )
    except Exception as error:  # whatever a library raises, the others are covered
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Covered(library, architecture, raised=message)
    finally:
        gc.collect()  # models have cycles, and the next one needs the memory


def _reasons(reasons: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(reason for reason in reasons if reason))


def _outputs(result: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    shapes = [tensor.shape for tensor in theirs]
    if not theirs or [tensor.shape for tensor in ours] != shapes:
        raise ValueError(f"outputs {[list(t.shape) for t in ours]} instead of {shapes}")
    errors = [
        (mine.double() - own.double()).abs().max() / own.double().abs().max().clamp(min=1e-30)
        for mine, own in zip(ours, theirs, strict=True)
    ]
    return float(torch.stack(errors).max())  # NaN if any is


# --------------------------------------------------------------------------- models built here


def _torchvision_names() -> list[str]:
    from fastvit._compat import import_timm

    import_timm()  # which makes a torchvision for another torch importable
    from torchvision import models

    return models.list_models(include="vit_*")


def _torchvision(name: str) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """Of its own width, cut to the first blocks."""
    from torchvision import models

    side = 2 * int(name.rsplit("_", 1)[1])  # 2x2 patches; vit_b_16 has patches of 16 pixels
    with torch.device("meta"):
        model: Any = getattr(models, name)(image_size=side)
    model.encoder.layers = model.encoder.layers[:DEPTH]
    model = model.to_empty(device="cpu").eval()
    randomise(model, SEED)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(SEED))
    return model, lambda model: model(images)


def _open_clip_names() -> list[str]:
    """Those whose vision tower is open_clip's own; others are timm's models, or ResNets."""
    from fastvit._compat import import_timm

    import_timm()
    import open_clip

    def is_vit(name: str) -> bool:
        cfg = (open_clip.get_model_config(name) or {}).get("vision_cfg", {})
        return "timm_model_name" not in cfg and isinstance(cfg.get("layers"), int)

    return [name for name in open_clip.list_models() if is_vit(name)]


def _open_clip(name: str) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """The vision tower, two blocks deep and two heads wide, for 2x3 patches."""
    import open_clip

    cfg: Any = open_clip.get_model_config(name)
    vision = dict(cfg["vision_cfg"])
    size = (2 * vision["patch_size"], 3 * vision["patch_size"])
    vision |= {"layers": DEPTH, "width": 2 * vision.get("head_width", 64), "image_size": size}
    build: Any = open_clip.model._build_vision_tower  # a whole CLIP would bring its text tower
    model = build(64, vision, quick_gelu=cfg.get("quick_gelu", False)).eval()
    randomise(model, SEED)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(SEED))
    return model, lambda model: model(images)
