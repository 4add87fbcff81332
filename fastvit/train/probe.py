"""A linear probe: how much of the classes a frozen model's features tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastvit.train.data import Batch, Data, Images

BATCH = 250


def mean_tokens(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """The mean over patch tokens of a `VisionTransformer`'s last block, [B, C, H, W] to [B, D]."""

    def features(images: Tensor) -> Tensor:
        images = images.to(next(model.parameters()).device)
        return model.forward_features(images)[:, model.num_prefix_tokens :].mean(1)  # pyright: ignore

    return features


def linear_probe(features: Callable[[Tensor], Tensor], data: Data) -> float:
    """Top-1 accuracy on the held-out images of logistic regression on features of the training
    images, standardised; scikit-learn's, with its default L2 penalty.

    Args:
        features: normalised images [B, C, H, W] to [B, D].
        data: neither augmented nor shuffled here.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise ImportError("a linear probe needs scikit-learn: pip install scikit-learn") from error
    train_x, train_y = _collect(features, data, data.train)
    test_x, test_y = _collect(features, data, data.test)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(probe.fit(train_x, train_y).score(test_x, test_y))


@torch.inference_mode()
def _collect(
    features: Callable[[Tensor], Tensor], data: Data, images: Images
) -> tuple[np.ndarray, np.ndarray]:
    found = [
        (features(batch.images).float().cpu().numpy(), batch.targets.numpy())
        for batch in _batches(data, images)
    ]
    x, y = zip(*found, strict=True)
    return np.concatenate(x), np.concatenate(y)


def _batches(data: Data, images: Images) -> Iterator[Batch]:
    for start in range(0, len(images), BATCH):
        pictures, labels = zip(
            *(images.source[i] for i in range(start, min(start + BATCH, len(images)))), strict=True
        )
        pixels = torch.stack([data.test.transform(picture) for picture in pictures])
        yield data.to_model(Batch(pixels, torch.tensor(labels)), torch.device("cpu"))
