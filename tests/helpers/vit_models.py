"""Our models beside timm's with the same random weights, and how to compare what they give."""

from typing import Any

import torch
from timm_models import TOLERANCE, build, error, images, randomise, reseed
from torch import Tensor, nn

import fastvit

__all__ = ["TINY", "assert_close", "differ", "images", "pair", "same_weights", "tiny"]

TINY: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5,
}  # fmt: skip


def tiny(**options: Any) -> fastvit.VisionTransformer:
    """A quick model for 32x32 images, 17 tokens, with random weights."""
    reseed()
    model = fastvit.VisionTransformer(**{**TINY, **options}).eval()
    randomise(model)
    return model


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """timm's model and ours, two blocks deep unless told, with the same weights."""
    options = {"depth": 2, **options}
    theirs = build(name, **options)
    options.setdefault("img_size", theirs.patch_embed.img_size)
    ours = fastvit.create_model(name, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval()


def assert_close(ours: Any, theirs: Any) -> None:
    """Equal up to `TOLERANCE` of the largest value, through lists, tuples and dicts."""
    if isinstance(theirs, Tensor):
        assert error(ours.detach(), theirs.detach()) <= TOLERANCE
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        assert_close(list(ours.values()), list(theirs.values()))
    else:
        assert type(ours) is type(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether by much more than rounding explains."""
    return error(a.detach(), b.detach()) > 100 * TOLERANCE


def same_weights(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> bool:
    """Whether two models, or two state_dicts, are equal to the bit."""
    x, y = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
