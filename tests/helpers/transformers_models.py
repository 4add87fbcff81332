"""transformers' families with random weights, small enough for a test."""

import copy
from typing import Any

import torch
from timm_models import error, reseed
from torch import Tensor, nn

from fastvit.check.families import tensors, tiny_model
from fastvit.numerics import randomise

# where the patch projection is no plain convolution over an image
UNFUSED_PROJECTION = {  # they pad, or overlap
    "ViTPose": "does not cut patches side by side", "Hiera": "does not cut patches side by side",
}  # fmt: skip

DROPOUT = {
    "hidden_dropout_prob": 0.3,
    "attention_probs_dropout_prob": 0.2,
    "attention_dropout": 0.2,
    "projection_dropout": 0.3,
    "drop_path_rate": 0.3,
}


def build(name: str, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model of a family with every parameter random, and its inputs."""
    reseed()
    model, inputs = tiny_model(name, **options)
    randomise(model, int(torch.randint(2**31, ()).item()))
    return model, inputs


def with_dropout(name: str) -> tuple[Any, dict[str, Tensor]]:
    """As `build`, in training mode with every rate that the family's config has."""
    model, _ = tiny_model(name)
    rates = {key: rate for key, rate in DROPOUT.items() if hasattr(model.config, key)}
    model, inputs = build(name, **rates)
    return model.train(), inputs


def eager(model: nn.Module) -> Any:
    """A copy with transformers' eager attention, where the family lets it be chosen."""
    twin: Any = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    for module in twin.modules():
        if "Sdpa" in type(module).__name__:  # chosen when the model was built
            module.__class__ = type(module).__base__
    return twin


def largest_error(ours: Any, theirs: Any) -> float:
    """The worst `error` among the tensors of two outputs, of which there have to be some."""
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert pairs
    return max(error(a, b) for a, b in pairs)
