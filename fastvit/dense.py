"""Feature maps for segmentation and detection out of a plain ViT.

Shape legend: B batch, D width of the ViT, C channels of the pyramid, p patch size in pixels,
gh x gw the grid of patches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.layers import LayerNorm

SCALES = (4.0, 2.0, 1.0, 0.5)  # strides 4, 8, 16 and 32 at patch size 16


class LayerNorm2d(LayerNorm):
    """LayerNorm over the channels of [B, C, h, w]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """Maps of several resolutions from one: the last feature map of a ViT, each level on its own.

    Level by level: deconvolutions (kernel and stride 2, a norm and GELU between two) or max-pooling
    bring the map to its scale, a 1x1 and a 3x3 convolution, each with a norm, to C channels.

    Args:
        embed_dim: D.
        out_channels: C.
        scales: of every level, relative to the grid of patches: 4, 2, 1 or 0.5. The stride in
            pixels is the patch size over the scale: 4, 8, 16, 32 for patch 16 and the default.

    Raises:
        ValueError: another scale.

    Source: Li et al., Exploring plain vision transformer backbones for object detection
    (arXiv:2203.16527), section 3, the simple feature pyramid of ViTDet.
    """

    def __init__(
        self, embed_dim: int, out_channels: int = 256, scales: Sequence[float] = SCALES
    ) -> None:
        super().__init__()
        self.out_channels = out_channels  # torchvision's detectors ask for it
        self.scales = tuple(scales)
        self.levels = nn.ModuleList(
            nn.Sequential(*_rescale(embed_dim, scale), *_project(embed_dim, scale, out_channels))
            for scale in scales
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, D, gh, gw] to a list of [B, C, gh*scale, gw*scale], one a scale; a scale of 0.5
        rounds down."""
        return [level(x) for level in self.levels]


def _rescale(dim: int, scale: float) -> list[nn.Module]:
    """Layers from D channels to `_width` channels at `scale`."""
    if scale == 4:
        return [
            nn.ConvTranspose2d(dim, dim // 2, 2, 2),
            LayerNorm2d(dim // 2),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
        ]
    if scale == 2:
        return [nn.ConvTranspose2d(dim, dim // 2, 2, 2)]
    if scale == 1:
        return []
    if scale == 0.5:
        return [nn.MaxPool2d(2, 2)]
    raise ValueError(f"scale {scale} is not one of 4, 2, 1, 0.5")


def _project(dim: int, scale: float, out_channels: int) -> list[nn.Module]:
    width = int(dim // max(scale, 1))
    return [
        nn.Conv2d(width, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]


class DenseFeatures(nn.Module):
    """A ViT with a pyramid on top: images to named feature maps, as detectors take them.

    Args:
        vit: a ViT with `forward_intermediates` and `embed_dim`: fastvit's and timm's, accelerated
            or not.
        out_channels, scales: of the `SimpleFeaturePyramid`.
        frozen: do not train the ViT: it runs without gradients and stays in eval mode.

    Raises:
        TypeError: `vit` has no `forward_intermediates`.
        ValueError: as `SimpleFeaturePyramid`.
    """

    def __init__(
        self,
        vit: Any,
        out_channels: int = 256,
        scales: Sequence[float] = SCALES,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if not callable(getattr(vit, "forward_intermediates", None)):
            raise TypeError(f"a {type(vit).__name__} has no forward_intermediates")
        self.vit = vit
        self.pyramid = SimpleFeaturePyramid(vit.embed_dim, out_channels, scales)
        self.out_channels = out_channels
        self.frozen = frozen
        if frozen:
            vit.requires_grad_(False)
            vit.eval()

    def train(self, mode: bool = True) -> DenseFeatures:
        """As `nn.Module.train`; a frozen ViT stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.vit.eval()
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """[B, 3, H, W] to {"0": [B, C, gh*scale, gw*scale], "1": ...}, in the order of `scales`.

        With patch size p and the default scales the strides are p/4, p/2, p and 2p pixels.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            (grid,) = self.vit.forward_intermediates(
                images, indices=1, norm=True, intermediates_only=True
            )  # (B, D, gh, gw)
        return OrderedDict((str(i), level) for i, level in enumerate(self.pyramid(grid)))
