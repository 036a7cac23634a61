"""Loading, augmentation against torchvision, and what is wrong with a folder."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from torchvision.transforms import functional as reference

from utils.training.augment import Loader, crop, flip
from utils.training.data import DATASETS, hold_out, load_dataset, together
from utils.training.dataset import Dataset, Split

PADDING = 4

RANDOM = torch.Generator().manual_seed(0)
SAMPLES = torch.randint(256, (81, 3, 32, 32), generator=RANDOM, dtype=torch.uint8)


def test_crop_equals_torchvision_at_every_offset():
    top, left = torch.arange(81) // 9, torch.arange(81) % 9
    ours = crop(SAMPLES, top, left, padding=PADDING)
    for image, result, y, x in zip(SAMPLES, ours, top.tolist(), left.tolist(), strict=True):
        assert torch.equal(result, reference.crop(reference.pad(image, [PADDING] * 4), y, x, 32, 32))
    middle = torch.full((81,), PADDING)
    assert torch.equal(crop(SAMPLES, middle, middle, padding=PADDING), SAMPLES)


def test_flip_equals_torchvision():
    mirrored = torch.arange(81) % 2 == 0
    for image, result, mirror in zip(SAMPLES, flip(SAMPLES, mirrored), mirrored.tolist(), strict=True):
        assert torch.equal(result, reference.hflip(image) if mirror else image)


def dataset(count=50, *, flip=True):
    split = Split(SAMPLES[:count], torch.arange(count))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    return Dataset(split, split, ("a", "b"), mean, std, PADDING, flip)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalisation_equals_torchvision(memory_format):
    data = dataset()
    images, labels, _ = next(iter(Loader(data.test, data, batch_size=50, memory_format=memory_format)))
    expected = reference.normalize(SAMPLES[:50].float() / 255, data.mean, data.std)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)
    assert images.is_contiguous(memory_format=memory_format) and torch.equal(labels, torch.arange(50))


def test_an_epoch_shows_every_image_once_in_a_new_order():
    data = dataset()
    loader = Loader(data.train, data, batch_size=16, generator=torch.Generator().manual_seed(1))
    epochs = [torch.cat([labels for _, labels, _ in loader]) for _ in range(2)]
    assert len(loader) == 4 and not torch.equal(*epochs)
    assert all(torch.equal(labels.sort().values, torch.arange(50)) for labels in epochs)


def test_every_image_is_a_crop_or_flip_of_its_own():
    data = dataset(10)
    loader = Loader(data.train, data, batch_size=10, generator=torch.Generator().manual_seed(1))
    plain = loader.normalize(crop_everywhere(SAMPLES[:10]))
    seen_offsets = set()
    for _ in range(20):
        images, labels, _ = next(iter(loader))
        for image, label in zip(images, labels, strict=True):
            matches = [i for i, c in enumerate(plain[label * 162 : (label + 1) * 162]) if torch.equal(c, image)]
            assert len(matches) == 1
            seen_offsets.add(matches[0])
    assert len(seen_offsets) > 100  # of 162: all offsets and both sides are drawn


def crop_everywhere(images):
    """Return the 2 * 81 crops and flips of each image, (n * 162, 3, 32, 32)."""
    grid = torch.arange(81)
    crops = [crop(image.expand(81, -1, -1, -1), grid // 9, grid % 9, padding=PADDING) for image in images]
    return torch.cat([torch.cat([c, c.flip(3)]) for c in crops])


def test_same_generator_same_batches_and_its_state_continues():
    data = dataset()
    first = Loader(data.train, data, batch_size=16, generator=torch.Generator().manual_seed(3))
    list(first)
    state = first.generator.get_state()
    expected = list(first)
    again = torch.Generator()
    again.set_state(state)
    for (x, y, _), (u, v, _) in zip(Loader(data.train, data, batch_size=16, generator=again), expected, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_without_flip_nothing_is_mirrored():
    data = dataset(10, flip=False)
    loader = Loader(data.train, data, batch_size=10, generator=torch.Generator().manual_seed(1))
    plain = loader.normalize(crop_everywhere(SAMPLES[:10]))
    for _ in range(5):
        images, labels, _ = next(iter(loader))
        for image, label in zip(images, labels, strict=True):
            unflipped = plain[label * 162 : label * 162 + 81]
            assert any(torch.equal(c, image) for c in unflipped)


def test_digits():
    data = load_dataset("digits", "nowhere")
    assert data.train.images.shape == (1437, 3, 32, 32) and data.test.images.shape == (360, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8 and data.train.images.max() == 255
    assert not data.flip
    counts = data.test.labels.bincount()
    assert len(counts) == 10 and counts.min() >= 34 and counts.max() <= 37
    pixels = data.train.images.float() / 255
    assert pixels.mean().item() == pytest.approx(data.mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(data.std[0], abs=1e-3)


def test_grey_digits_and_mnist_are_plain_pixels(tmp_path, monkeypatch):
    from torchvision import datasets

    class Official:
        def __init__(self, root, train, download):
            self.data = torch.full((4, 28, 28), 255 if train else 51, dtype=torch.uint8)
            self.targets = torch.tensor([3, 1, 4, 1])

    monkeypatch.setattr(datasets, "MNIST", Official)
    mnist = load_dataset("mnist", tmp_path, shape=(1, 28, 28))
    images, labels, _ = next(iter(Loader(mnist.train, mnist, batch_size=4, generator=torch.Generator())))
    assert images.shape == (4, 1, 28, 28) and (images == 1).all() and labels.sort().values.tolist() == [1, 1, 3, 4]
    assert next(iter(Loader(mnist.test, mnist, batch_size=4)))[0].unique().tolist() == [pytest.approx(0.2)]
    digits = load_dataset("digits", tmp_path, shape=(1, 28, 28))
    loader = Loader(digits.train, digits, batch_size=1437, generator=torch.Generator())
    images, labels, _ = next(iter(loader))
    order = torch.randperm(1437, generator=torch.Generator())
    assert torch.equal((images * 255).round(), digits.train.images[order].float())  # shuffled, not augmented


def test_a_network_that_takes_other_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="cifar10 has no 1x28x28 images.*use digits, mnist"):
        load_dataset("cifar10", tmp_path, shape=(1, 28, 28))


def test_val_split_is_disjoint_and_the_same_each_time(images):
    whole, data, again = (load_dataset("folder", images, val_split=n) for n in (0, 10, 10))
    assert (len(data.train.labels), len(data.val.labels), len(data.test.labels)) == (26, 10, 18)
    assert torch.equal(data.val.images, again.val.images)
    pixels = torch.cat([data.train.images, data.val.images]).flatten(1).double().sum(1).sort().values
    assert torch.equal(pixels, whole.train.images.flatten(1).double().sum(1).sort().values)
    with pytest.raises(ValueError, match="36"):
        load_dataset("folder", images, val_split=36)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_has_the_preprocessing_of_the_release(name):
    (source,) = DATASETS[name]
    mean, std = source.preprocessing.mean, source.preprocessing.std
    assert (mean, std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert (source.padding, source.flip) == (4, True)


def test_the_held_out_images_are_those_of_one_seed_for_ever():
    """Whatever the seed of the run: published accuracies and the coefficients behind them are of these images."""
    whole = dataset(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hold_out(whole, 4).val.images, whole.train.images[order[:4].sort().values])


def test_folder_labels_and_resizing(tmp_path):
    write_images(tmp_path, classes=2, train=2, test=1)
    Image.fromarray(np.full((50, 40), 200, np.uint8)).save(tmp_path / "train" / "class1" / "grey.png")
    (tmp_path / "train" / "class1" / ".DS_Store").write_text("not an image, and hidden")
    data = load_dataset("folder", tmp_path)
    assert data.classes == ("class0", "class1") and data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert (data.train.images[4] == 200).all()


def test_cifar_from_class_folders(tmp_path):
    write_images(tmp_path / "cifar10", classes=10, train=2, test=1)
    data = load_dataset("cifar10", tmp_path)
    assert data.train.images.shape == (20, 3, 32, 32) and data.train.labels.tolist() == sorted([*range(10)] * 2)
    assert data.flip and data.std == (0.2023, 0.1994, 0.2010)


def test_cifar_from_torchvisions_files(tmp_path, monkeypatch):
    from torchvision import datasets

    class Official:
        base_folder = "cifar-10-batches-py"
        classes = ["x"] * 10

        def __init__(self, root, train, download):
            self.data = np.full((3, 32, 32, 3), 1 if train else 2, np.uint8)
            self.data[0, 5, 6] = (7, 8, 9)
            self.targets = [3, 1, 2]

    monkeypatch.setattr(datasets, "CIFAR10", Official)
    (tmp_path / Official.base_folder).mkdir()
    (tmp_path / "cifar10").mkdir()  # an empty class folder tree does not win over torchvision's files
    data = load_dataset("cifar10", tmp_path)
    assert data.train.images[0, :, 5, 6].tolist() == [7, 8, 9] and data.train.labels.tolist() == [3, 1, 2]
    assert data.test.images[1].unique().tolist() == [2]


def test_a_failed_download_says_how_to_place_the_files(tmp_path, monkeypatch):
    from torchvision import datasets

    def refuse(root, **_):
        Path(root, "raw").mkdir(parents=True, exist_ok=True)
        raise OSError("no route to host")

    refuse.base_folder = "cifar-100-python"
    monkeypatch.setattr(datasets, "CIFAR100", refuse)
    with pytest.raises(ValueError, match=r"no route to host.*cifar100/\{train,test\}.*by hand"):
        load_dataset("cifar100", tmp_path / "new")
    assert not (tmp_path / "new").exists()  # a path that was mistyped
    (tmp_path / "kept").mkdir()
    with pytest.raises(ValueError, match="no route to host"):
        load_dataset("cifar100", tmp_path / "kept")
    assert (tmp_path / "kept").exists()


@pytest.mark.parametrize("count", [0, 1, 5, 11])
def test_what_was_held_out_can_be_put_back(count):
    split = Split(torch.arange(12)[:, None, None, None].to(torch.uint8), torch.arange(12))
    data = load_dataset("digits", "", shape=(1, 28, 28))
    data = replace(data, train=split, val=None)
    whole = together(hold_out(data, count) if count else data)
    assert whole.val is None and torch.equal(whole.train.labels, split.labels)
    assert torch.equal(whole.train.images, split.images)


def fake_mnist(downloads, *, fails=()):
    """Return what stands for torchvision's MNIST: it takes what is there for whole, and writes where it reads."""

    class MNIST:
        def __init__(self, root, train, download):
            file = Path(root, "MNIST", "raw", "images")
            if not file.exists():
                if not download:
                    raise RuntimeError("Dataset not found")
                file.parent.mkdir(parents=True)
                file.write_bytes(b"half")
                downloads.append(root)
                time.sleep(0.05)
                if len(downloads) in fails:
                    raise KeyboardInterrupt
                file.write_bytes(b"whole")
            assert file.read_bytes() == b"whole"
            self.data, self.targets = torch.zeros(2, 28, 28, dtype=torch.uint8), torch.tensor([0, 9])

    return MNIST


def test_of_several_processes_one_downloads(tmp_path, monkeypatch):
    downloads = []
    monkeypatch.setattr("torchvision.datasets.MNIST", fake_mnist(downloads))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(load_dataset, "mnist", tmp_path / "new", shape=(1, 28, 28)) for _ in range(4)]
        assert all(len(job.result().train.labels) == 2 for job in jobs)
    assert len(downloads) == 1 and [path.name for path in (tmp_path / "new").iterdir()] == ["MNIST"]


def test_a_download_that_was_cut_short_is_not_taken_for_images(tmp_path, monkeypatch):
    downloads = []
    monkeypatch.setattr("torchvision.datasets.MNIST", fake_mnist(downloads, fails=[1]))
    with pytest.raises(KeyboardInterrupt):
        load_dataset("mnist", tmp_path, shape=(1, 28, 28))
    assert not list(tmp_path.iterdir())
    assert len(load_dataset("mnist", tmp_path, shape=(1, 28, 28)).train.labels) == 2 and len(downloads) == 2


@pytest.mark.parametrize("name, own", [("mnist", "MNIST"), ("cifar10", "cifar10")])
def test_the_folder_of_one_data_set_is_not_where_all_are(tmp_path, monkeypatch, name, own):
    """What somebody keeps there stays, no folder is added, and the message says what to name."""
    from torchvision import datasets

    def fails(root, train, download):
        (Path(root) / "MNIST" / "raw").mkdir(parents=True)
        raise OSError("no network")

    monkeypatch.setattr(datasets, "MNIST", fails)
    monkeypatch.setattr(datasets.CIFAR10, "__init__", lambda self, root, train, download: fails(root, train, download))
    (tmp_path / own / "kept").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"or name --data {tmp_path}$"):
        load_dataset(name, tmp_path / own, shape=(1, 28, 28) if name == "mnist" else (3, 32, 32))
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path(own), Path(own) / "kept"]


def damage(root, how):
    train = root / "train"
    if how == "missing":
        shutil.rmtree(train)
    elif how == "empty":
        shutil.rmtree(train)
        train.mkdir()
    elif how == "one class":
        shutil.rmtree(train / "class1")
        shutil.rmtree(train / "class2")
    elif how == "empty class":
        shutil.rmtree(train / "class1")
        (train / "class1").mkdir()
    elif how == "no image":
        (train / "class1" / "notes.txt").write_text("hello")
    elif how == "truncated":
        file = train / "class1" / "000.png"
        file.write_bytes(file.read_bytes()[:500])
    elif how == "other classes":
        (train / "class1").rename(train / "class9")


@pytest.mark.parametrize(
    "how, words",
    [
        ("missing", "train"),
        ("empty", "0 class folders"),
        ("one class", "1 class folders"),
        ("empty class", "class1 is empty"),
        ("no image", "notes.txt"),
        ("truncated", "000.png"),
        ("other classes", "class1"),
    ],
)
def test_a_bad_folder_is_named(tmp_path, fails, how, words):
    write_images(tmp_path / "images")
    damage(tmp_path / "images", how)
    status, line = fails("-d", "folder", "--data", tmp_path / "images", "--save_dir", tmp_path / "run")
    assert status == 1 and words in line and str(tmp_path / "images") in line


def test_cifar_with_the_wrong_number_of_classes(tmp_path):
    write_images(tmp_path / "cifar10", classes=3, train=1, test=1)
    with pytest.raises(ValueError, match="3 class folders, expected 10"):
        load_dataset("cifar10", tmp_path)
