"""Small models and sets for the tests of training."""

import numpy as np
import torch
from PIL import Image

from fastvit._compat import import_timm
from fastvit.train import Data, Images, Recipe
from fastvit.vit import VisionTransformer

COLOURS = {"blue": (40, 60, 220), "green": (50, 200, 60), "red": (230, 50, 40)}


def pictures(root):
    """Three classes of ten noisy pictures in various formats, and two files that are broken."""
    generator = np.random.default_rng(0)
    for label, colour in COLOURS.items():
        (root / label).mkdir()
        for i in range(10):
            size = (20 + 3 * i, 40 - 2 * i, 3)
            pixels = np.clip(np.array(colour) + generator.normal(0, 15, size), 0, 255)
            picture = Image.fromarray(pixels.astype(np.uint8))
            if i == 3:
                picture.putalpha(255)
            picture.save(root / label / (f"{i}.png" if i in (3, 4) else f"{i}.jpg"))
    whole = (root / "red" / "0.jpg").read_bytes()
    (root / "red" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "blue" / "empty.png").write_bytes(b"")
    (root / "blue" / "notes.txt").write_text("not an image")
    return root


def tiny(**changes):
    """A ViT of some 3,000 parameters."""
    options = dict(img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=2)
    torch.manual_seed(0)
    return VisionTransformer(**{**options, "num_heads": 2, **changes})


def tiny_timm():
    """timm's own, of as many tokens."""
    torch.manual_seed(0)
    options = dict(img_size=8, patch_size=4, in_chans=1, num_classes=3, depth=2)
    return import_timm().create_model("test_vit", **options)


class Noise:
    """Source of 8x8 noise images whose brightness gives their class."""

    def __init__(self, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 3, (size,), generator=generator)
        noise = torch.randint(0, 60, (size, 1, 8, 8), generator=generator)
        self.images = (noise + 80 * self.labels[:, None, None, None]).byte()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], int(self.labels[i])


def flip(image):
    """An augmentation: half of the images upside down."""
    return image.flip(1) if torch.rand(()) < 0.5 else image


def data(train=40, test=13):
    half = torch.tensor(0.5).view(1, 1, 1)
    return Data(
        Images(Noise(train), flip), Images(Noise(test, seed=1), lambda image: image),
        ("dark", "grey", "bright"), half, half,
    )  # fmt: skip


def recipe(**changes):
    """Five steps of eight images an epoch."""
    options = dict(epochs=3, batch_size=8, lr=3e-3, warmup_epochs=0.4, ema=0.9, log_every=2)
    return Recipe(**{**options, **changes})


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(ours, theirs):
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
