"""Norms and patch projections by themselves, of torch's classes.

Shape legend: B batch, N tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastvit import ops
from fastvit.accelerate.block import applies, fast, fast_class, make_row, original_of
from fastvit.accelerate.plan import Part
from fastvit.obstacles import Obstacle, conv_obstacle, own_forward, patched
from fastvit.parts import apply_norm


class FastNorm(nn.Module):
    """Base of norms on our kernel."""

    def forward(self, input: Tensor) -> Tensor:
        original: Any = super()
        return apply_norm(self, input) if applies(self, input) else original.forward(input)


@fast(nn.Conv2d)
class FastPatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel on the patch embedding's kernel.

    The result [B, D, H/p, W/p] is a view of tokens [B, N, D], which is what libraries make of it
    next.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _divides(self, input) or conv_obstacle(self) is not None:
            return super().forward(input)
        tokens = ops.patch_embed(input, self.weight, self.bias)
        grid = (-1, input.shape[-1] // self.kernel_size[1])
        return tokens.transpose(1, 2).unflatten(2, grid)


@fast(nn.Conv3d)
class FastPatchConv3d(nn.Conv3d):
    """As `FastPatchConv2d` for tubelets of a video: their frames become channels of an image."""

    def forward(self, input: Tensor) -> Tensor:
        if not _divides(self, input) or conv_obstacle(self) is not None:
            return super().forward(input)
        b, frames = input.shape[0], self.kernel_size[0]
        images = input.unflatten(2, (-1, frames)).transpose(1, 2)  # (B, T/t, C, t, H, W)
        images = images.flatten(2, 3).flatten(0, 1)  # (B * T/t, C*t, H, W)
        tokens = ops.patch_embed(images, self.weight.flatten(1, 2), self.bias)
        grid = (-1, input.shape[3] // self.kernel_size[1], input.shape[4] // self.kernel_size[2])
        return tokens.unflatten(0, (b, -1)).flatten(1, 2).transpose(1, 2).unflatten(2, grid)


def _divides(conv: Any, x: Any) -> bool:
    """Whether `x` is a batch of floats that the patches divide; all else is left to PyTorch."""
    return (
        applies(conv, x)
        and x.is_floating_point()
        and x.dim() == conv.weight.dim()
        and not any(size % p for size, p in zip(x.shape[2:], conv.kernel_size, strict=True))
    )


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: fast_class(nn.LayerNorm, FastNorm, globals()),
    nn.Conv2d: FastPatchConv2d,
    nn.Conv3d: FastPatchConv3d,
}
_RUNS = {nn.LayerNorm: "layer_norm", nn.Conv2d: "patch_embed", nn.Conv3d: "patch_embed"}


def find_single(name: str, module: Any, library: str) -> Part | None:
    """The part of a norm or a patch projection that a library's file points at; None where it is of
    no such class."""
    kind = original_of(type(module))
    if kind not in FAST:
        return None
    conv = None if kind is nn.LayerNorm else conv_obstacle(module)
    return layer_part(name, module, FAST[kind], _RUNS[kind], library, conv)


def layer_part(
    name: str,
    module: nn.Module,
    kind: type[nn.Module] | None,
    runs: str,
    library: str,
    obstacle: Obstacle | None = None,
) -> Part:
    """The part of a layer that may become a `kind`, unless there is an obstacle."""
    original = original_of(type(module))
    obstacle = obstacle or own_forward(module) or patched(original)
    row = make_row(name, original, runs, library, obstacle)
    stays = obstacle is not None and obstacle.lasting
    return Part(module, None if stays else kind, row)
