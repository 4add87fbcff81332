"""timm's models with random weights, small enough for a test, and how far two outputs differ."""

from typing import Any

import seeds
import timm
import torch
from torch import Tensor, nn

# of the largest output in float32; room for another order of sums, a hundred times below what
# the planted errors of test_accelerate.py give
TOLERANCE = 1e-5


def reseed() -> int:
    """Other random numbers at each call; pytest shows the seed, which it returns, where a test
    fails."""
    seed = seeds.draw()
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    return seed


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Every parameter random and none near zero, so that each of them shows in the output."""
    for name, p in model.named_parameters():
        p.normal_(std=0.5 if p.dim() < 2 or p.shape[0] == 1 else p[0].numel() ** -0.5)
        if p.dim() == 1 and name.endswith("weight"):
            p.add_(1)  # a norm's


def build(name: str, patches: tuple[int, int] = (2, 3), **options: Any) -> Any:
    """timm's model `name`, two blocks deep, for an image of few patches and not square."""
    reseed()
    plain: Any = timm.create_model(name, depth=1, device="meta")
    side = plain.patch_embed.patch_size[0]
    options = {"depth": 2, "img_size": (patches[0] * side, patches[1] * side)} | options
    model = timm.create_model(name, device="meta", **options)
    assert not list(model.buffers())  # to_empty would leave them uninitialised
    model = model.to_empty(device="cpu")
    randomise(model)
    return model.eval()


def small(**options: Any) -> Any:
    """A quick model with LayerScale and registers; 8 patches of 16 pixels."""
    options = {"embed_dim": 32, "num_heads": 2, "init_values": 0.5, "reg_tokens": 2} | options
    return build("vit_tiny_patch16_224", patches=(2, 4), **options)


def images(model: Any, batch: int = 2) -> Tensor:
    """Of the size that `model` takes."""
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest of `theirs`."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def classes(model: nn.Module) -> list[type]:
    """Of every module, in order."""
    return [type(module) for module in model.modules()]


class Doubled(nn.Module):
    """As adapters do it: the old layer inside a new one."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)
