"""The images: DATASETS, their loading into memory, and batched augmentation without worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32  # images are SIZE x SIZE
PADDING = 4  # of the random crop
SPLIT_SEED = 0  # the held-out images are the same whatever --seed says


class Split(NamedTuple):
    """Images (N, 3, 32, 32), uint8, and labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Split:
        """Return the same split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        train, test: the official splits (train without the held-out images).
        val: the held-out training images; None unless asked for.
        classes: names in the order of the labels.
        mean, std: of the training pixels in [0, 1], per channel.
        flip: whether the mirror image of an image is still of its class.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    val: Split | None = None


class Source(NamedTuple):
    """How to load one data set, and its normalisation."""

    load: Callable[[Path], tuple[Split, Split, tuple[str, ...]]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool


def read_image(path: Path) -> np.ndarray:
    """Read one image as (32, 32, 3), uint8, resized if it has another size.

    Raises:
        ValueError: the file is no image, or damaged.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            if image.size != (SIZE, SIZE):
                image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no readable image: remove or replace the file") from error


def visible(folder: Path) -> list[Path]:
    """List a folder in order of name, without hidden files such as .DS_Store.

    Raises:
        ValueError: the folder is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: expected {folder}/<class>/<image>; check --data")
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def read_split(folder: Path, *, num_classes: int | None) -> tuple[Split, tuple[str, ...]]:
    """Read FOLDER/<class>/<image> into memory.

    Args:
        folder: holds one folder a class; their sorted names give the labels 0, 1, ...
        num_classes: how many there must be; None for any number from 2 on.

    Raises:
        ValueError: a folder is missing or empty, the number of classes is wrong, or a file is no image.
    """
    folders = [path for path in visible(folder) if path.is_dir()]
    expected = num_classes or "at least 2"
    if len(folders) != (num_classes or max(len(folders), 2)):
        raise ValueError(f"{folder} has {len(folders)} class folders, expected {expected}: check --data")
    files = [visible(path) for path in folders]
    for path, inside in zip(folders, files, strict=True):
        if not inside:
            raise ValueError(f"class folder {path} is empty: add images or remove the folder")
    pixels = np.stack([read_image(file) for inside in files for file in inside])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label for label, inside in enumerate(files) for _ in inside])
    return Split(images, labels), tuple(path.name for path in folders)


def load_folder(root: Path, *, num_classes: int | None = None) -> tuple[Split, Split, tuple[str, ...]]:
    """Read ROOT/train/<class>/* and ROOT/test/<class>/*."""
    train, classes = read_split(root / "train", num_classes=num_classes)
    test, test_classes = read_split(root / "test", num_classes=num_classes)
    if classes != test_classes:
        differing = sorted(set(classes) ^ set(test_classes))
        raise ValueError(f"{root}: train and test do not have the same classes, they differ in {differing[0]!r}")
    return train, test, classes


def _cifar_split(dataset: object) -> Split:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(dataset.targets))


def load_cifar(root: Path, *, num_classes: int) -> tuple[Split, Split, tuple[str, ...]]:
    """Load CIFAR: torchvision's files if they are there, else class folders, else torchvision's download."""
    from torchvision import datasets

    official = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[num_classes]
    folders = root / f"cifar{num_classes}"
    if folders.exists() and not (root / official.base_folder).exists():
        return load_folder(folders, num_classes=num_classes)
    try:
        splits = [official(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"cannot download CIFAR-{num_classes} to {root} ({error}): place torchvision's files "
            f"{root / official.base_folder}/* or class folders {folders}/{{train,test}}/<class>/*.png there by hand, "
            "or name another --data"
        ) from error
    return _cifar_split(splits[0]), _cifar_split(splits[1]), tuple(splits[0].classes)


def load_digits(root: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """Load the 1,797 handwritten digits (8x8, 17 grey levels) that scikit-learn bundles, upscaled to 32x32 RGB.

    Every fifth image in order of class is a test image: 360, stratified, always the same. `root` is not read.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError("-d digits needs scikit-learn: pip install -r requirements-dev.txt") from error
    digits = datasets.load_digits()
    order = torch.from_numpy(digits.target).long().argsort(stable=True)
    images = torch.from_numpy(digits.images).float()[order, None]
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    images = images.mul(255 / 16).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()[order]
    test = torch.arange(len(labels)) % 5 == 0
    classes = tuple(str(digit) for digit in range(10))
    return Split(images[~test], labels[~test]), Split(images[test], labels[test]), classes


CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the release's, for both CIFARs

DATASETS: dict[str, Source] = {
    "cifar10": Source(lambda root: load_cifar(root, num_classes=10), CIFAR_MEAN, CIFAR_STD, True),
    "cifar100": Source(lambda root: load_cifar(root, num_classes=100), CIFAR_MEAN, CIFAR_STD, True),
    "digits": Source(load_digits, (0.3057,) * 3, (0.3238,) * 3, False),
    "folder": Source(load_folder, CIFAR_MEAN, CIFAR_STD, True),
}


def load_dataset(name: str, root: str | Path, *, val_split: int = 0) -> Dataset:
    """Load a data set into memory.

    Args:
        name: a key of DATASETS.
        root: folder that holds the images (`--data`).
        val_split: number of training images to hold out, chosen at random, the same for every seed.

    Returns:
        The images as uint8 and how to augment and normalise them.

    Raises:
        ValueError: unknown name, unusable files, or fewer than val_split + 1 training images.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}")
    source = DATASETS[name]
    train, test, classes = source.load(Path(root))
    dataset = Dataset(train, test, classes, source.mean, source.std, source.flip)
    if not val_split:
        return dataset
    if val_split >= len(train.labels):
        raise ValueError(f"--val_split {val_split} leaves nothing to train on: give less than {len(train.labels)}")
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, kept = order[:val_split].sort().values, order[val_split:].sort().values
    return replace(
        dataset,
        train=Split(train.images[kept], train.labels[kept]),
        val=Split(train.images[held_out], train.labels[held_out]),
    )


def crop(images: Tensor, top: Tensor, left: Tensor, *, padding: int) -> Tensor:
    """Pad every image with black and cut a window of its own size out of it, each at its own offset.

    Args:
        images: (N, C, H, W), any type.
        top, left: (N,), int64, in [0, 2 * padding]; both equal to padding leave an image as it is.
        padding: black pixels added on each side.

    Returns:
        (N, C, H, W): for each image what torchvision's pad and crop give.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, 2p + 1, 2p + 1, H, W)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images (N, C, H, W) for which `mirrored` (N,), bool, is true."""
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


class Loader:
    """Batches of normalised images from memory, in a random order and augmented if there is a generator.

    Order, offsets and flips of an epoch are drawn at its start from `generator`, so its state at the end of an
    epoch is all that a resumed run needs.

    Args:
        split: images and labels; they are used where they are.
        dataset: gives normalisation and whether to flip.
        batch_size: images a batch; the last one may be smaller.
        generator: of the host; None for the images in order, as they are.
        memory_format: of the batches.
    """

    def __init__(
        self,
        split: Split,
        dataset: Dataset,
        *,
        batch_size: int,
        generator: torch.Generator | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.split, self.batch_size, self.generator, self.flip = split, batch_size, generator, dataset.flip
        self.memory_format = memory_format
        mean, std = (torch.tensor(v, device=split.images.device)[:, None, None] for v in (dataset.mean, dataset.std))
        self.factor, self.offset = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.split.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (N, 3, 32, 32), fp32, and labels (N,)."""
        yield from self._ordered() if self.generator is None else self._augmented()

    def _ordered(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(*(t.split(self.batch_size) for t in self.split), strict=True):
            yield self.normalize(images), labels

    def _augmented(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, device = len(self.split.labels), self.split.images.device
        order = torch.randperm(count, generator=self.generator)
        offsets = torch.randint(2 * PADDING + 1, (2, count), generator=self.generator)
        mirrored = torch.rand(count, generator=self.generator) < 0.5
        drawn = [t.to(device).split(self.batch_size) for t in (order, offsets[0], offsets[1], mirrored)]
        for index, top, left, mirror in zip(*drawn, strict=True):
            images = crop(self.split.images[index], top, left, padding=PADDING)
            images = flip(images, mirror) if self.flip else images
            yield self.normalize(images), self.split.labels[index]

    def normalize(self, images: Tensor) -> Tensor:
        """Turn pixels 0..255 into (pixel / 255 - mean) / std."""
        images = images.to(torch.float32, memory_format=self.memory_format)
        return images.mul_(self.factor).add_(self.offset)
