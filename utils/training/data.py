"""The images: DATASETS, and their loading into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from utils.files.lock import folder_lock
from utils.files.preprocessing import CIFAR, DIGITS, PLAIN, RGB, Preprocessing
from utils.logger import say
from utils.options import OptionError
from utils.training.dataset import Dataset, Split
from utils.training.folder import load_folder, pixel_statistics

SPLIT_SEED = 0  # the held-out images are the same whatever --seed says


class Source(NamedTuple):
    """How to load one data set in one shape, normalise and augment it; see Dataset."""

    load: Callable[[Path, Preprocessing], tuple[Split, Split, tuple[str, ...]]]
    preprocessing: Preprocessing
    padding: int
    flip: bool
    measured: bool = False  # whether size, mean and std are those of the images at hand, not of the data set

    def fits(self, shape: tuple[int, int, int]) -> bool:
        """Tell whether its images can be had in a shape."""
        own = self.preprocessing.shape
        return shape[0] == own[0] if self.measured else shape == own


def _cifar_split(dataset: object) -> Split:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(dataset.targets))


def _downloaded(dataset: Callable[..., object], root: Path) -> list:
    """Return torchvision's training and test images, downloaded by one process while others wait.

    Files come to their places whole, so that a download that was cut short is not taken for images. Where nothing can
    be had, no empty folders are left behind.
    """

    def read() -> list:
        return [dataset(str(root), train=train, download=False) for train in (True, False)]

    before = _folders(root)
    try:
        with suppress(RuntimeError):  # torchvision finds none
            return read()
        root.mkdir(parents=True, exist_ok=True)
        with folder_lock(root, name=".download.lock", on_wait=say):
            with suppress(RuntimeError):  # somebody else has downloaded them by now
                return read()
            with tempfile.TemporaryDirectory(dir=root, prefix=".download") as folder:
                dataset(folder, train=True, download=True)  # both
                _move_files(Path(folder), root)
            return read()
    except (OSError, RuntimeError):
        for folder in sorted(_folders(root) - before, reverse=True):
            with suppress(OSError):  # it holds something
                folder.rmdir()
        raise


def _move_files(source: Path, root: Path) -> None:
    """Move all files below a folder to the same places below another of the same file system."""
    for path in [path for path in source.rglob("*") if path.is_file()]:
        target = root / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _folders(root: Path) -> set[Path]:
    """Return a folder and those in it, as deep as torchvision makes any; empty where it is missing."""
    return {path for path in (root, *root.glob("*"), *root.glob("*/*")) if path.is_dir()}


def _instead(root: Path, name: str) -> str:
    """Return the place to name for a data set where somebody named its own folder in it."""
    root = root.absolute()
    return f"--data {root.parent}" if root.name == name else "another --data"


def load_cifar(root: Path, preprocessing: Preprocessing, *, num_classes: int) -> tuple[Split, Split, tuple[str, ...]]:
    """Load CIFAR: torchvision's files if they are there, else class folders, else torchvision's download."""
    from torchvision import datasets

    official = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[num_classes]
    folders = root / f"cifar{num_classes}"
    if folders.exists() and not (root / official.base_folder).exists():
        return load_folder(folders, preprocessing, num_classes=num_classes)
    try:
        splits = _downloaded(official, root)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"cannot download CIFAR-{num_classes} to {root} ({error}): place torchvision's files "
            f"{root / official.base_folder}/* or class folders {folders}/{{train,test}}/<class>/*.png there by hand, "
            f"or name {_instead(root, f'cifar{num_classes}')}"
        ) from error
    return _cifar_split(splits[0]), _cifar_split(splits[1]), tuple(splits[0].classes)


def load_mnist(root: Path, preprocessing: Preprocessing) -> tuple[Split, Split, tuple[str, ...]]:
    """Load torchvision's MNIST files, downloaded when absent."""
    from torchvision import datasets

    try:
        splits = _downloaded(datasets.MNIST, root)
    except Exception as error:  # torchvision looks at what is there by assertions
        raise ValueError(
            f"cannot read MNIST in {root} or download it ({error}): place the four *-ubyte files in "
            f"{root / 'MNIST' / 'raw'} by hand, or name {_instead(root, 'MNIST')}"
        ) from error
    train, test = (Split(split.data[:, None].contiguous(), split.targets) for split in splits)
    return train, test, tuple(str(digit) for digit in range(10))


def load_digits(root: Path, preprocessing: Preprocessing) -> tuple[Split, Split, tuple[str, ...]]:
    """Load the 1,797 handwritten digits (8x8, 17 grey levels) that scikit-learn bundles, upscaled to a shape.

    Every fifth image in order of class is a test image: 360, stratified, always the same. `root` is not read.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError("-d digits needs scikit-learn: pip install scikit-learn") from error
    digits, shape = datasets.load_digits(), preprocessing.shape
    order = torch.from_numpy(digits.target).long().argsort(stable=True)
    images = torch.from_numpy(digits.images).float()[order, None]
    images = F.interpolate(images, size=shape[1:], mode="bilinear", align_corners=False)
    images = images.mul(255 / 16).round().to(torch.uint8).expand(-1, shape[0], -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()[order]
    test = torch.arange(len(labels)) % 5 == 0
    classes = tuple(str(digit) for digit in range(10))
    return Split(images[~test], labels[~test]), Split(images[test], labels[test]), classes


# A data set stands here once for each shape that it can be had in.
DATASETS: dict[str, tuple[Source, ...]] = {
    "cifar10": (Source(partial(load_cifar, num_classes=10), CIFAR, padding=4, flip=True),),
    "cifar100": (Source(partial(load_cifar, num_classes=100), CIFAR, padding=4, flip=True),),
    "digits": (
        Source(load_digits, DIGITS, padding=4, flip=False),
        Source(load_digits, PLAIN, padding=0, flip=False),
    ),
    "folder": (Source(load_folder, CIFAR, padding=4, flip=True, measured=True),),
    "mnist": (Source(load_mnist, PLAIN, padding=0, flip=False),),
}


def datasets_of(shape: tuple[int, int, int]) -> list[str]:
    """Return the names of the data sets that can be had in a shape."""
    return [name for name, sources in DATASETS.items() if any(source.fits(shape) for source in sources)]


def load_dataset(
    name: str,
    root: str | Path,
    *,
    shape: tuple[int, int, int] = RGB,
    val_split: int = 0,
    preprocessing: Preprocessing | None = None,
    padding: int | None = None,
    flip: bool = True,
) -> Dataset:
    """Load a data set into memory.

    Args:
        name: a key of DATASETS.
        root: folder that holds the images (`--data`).
        shape: of an image, as the network takes it: channels, height, width.
        val_split: number of training images to hold out, chosen at random, the same for every seed.
        preprocessing: what a trained network was trained with, instead of shape; None for that of the data set, or
            of an image folder: mean and std of its training images without those held out.
        padding: of the random crop; None for what the data set has.
        flip: whether mirror images may be shown, where the data set has them.

    Returns:
        The images as uint8 and how to augment and normalise them.

    Raises:
        ValueError: unknown name, no images of this shape, unusable files, or fewer than val_split + 1 training images.
        OptionError: an option of the augmentation does nothing, or too much.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}")
    shape = preprocessing.shape if preprocessing else shape
    source = next((source for source in DATASETS[name] if source.fits(shape)), None)
    if source is None:
        size = "x".join(map(str, shape))
        raise ValueError(
            f"--dataset {name} has no {size} images, which --arch takes: use {', '.join(datasets_of(shape))}"
        )
    if not flip and not source.flip:
        raise OptionError(f"--no_flip does nothing with -d {name}, whose images are never mirrored: leave it out")
    if padding is not None and padding > min(shape[1:]):
        raise OptionError(f"--padding {padding} exceeds the image: give at most {min(shape[1:])}")
    used = preprocessing or replace(source.preprocessing, shape=shape)
    train, test, classes = source.load(Path(root), used)
    padding = source.padding if padding is None else padding
    data = Dataset(train, test, classes, used.mean, used.std, padding, source.flip and flip, resize=used.resize)
    data = hold_out(data, val_split) if val_split else data
    if source.measured and preprocessing is None:
        mean, std = pixel_statistics(data.train.images.split(1024))
        data = replace(data, mean=mean, std=std)
    return data


def _order(total: int) -> torch.Tensor:
    """Return the positions of the training images in the order in which they are held out."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(SPLIT_SEED))


def together(data: Dataset) -> Dataset:
    """Return the data set as it was before `hold_out`."""
    if data.val is None:
        return data
    total, count = len(data.train.labels) + len(data.val.labels), len(data.val.labels)
    order = _order(total)
    back = torch.cat([order[count:].sort().values, order[:count].sort().values]).argsort()
    images, labels = (torch.cat(parts)[back] for parts in zip(data.train, data.val, strict=True))
    return replace(data, train=Split(images, labels), val=None)


def hold_out(data: Dataset, count: int) -> Dataset:
    """Return the data set with `count` of its training images as `val`.

    Raises:
        ValueError: nothing is left to train on.
    """
    total = len(data.train.labels)
    if count >= total:
        raise ValueError(f"--val_split {count} leaves nothing to train on: give less than {total}")
    order = _order(total)
    held_out, kept = order[:count].sort().values, order[count:].sort().values
    images, labels = data.train
    return replace(data, train=Split(images[kept], labels[kept]), val=Split(images[held_out], labels[held_out]))
