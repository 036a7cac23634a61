"""The images: DATASETS, their loading into memory, and batched augmentation without worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RGB, GREY = (3, 32, 32), (1, 28, 28)  # the shapes of images, and so of what a network takes
SPLIT_SEED = 0  # the held-out images are the same whatever --seed says


class Split(NamedTuple):
    """Images (N, *shape), uint8, and labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Split:
        """Return the same split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


class Batch(NamedTuple):
    """What one process trains on in one step.

    Attributes:
        images: (N, *shape), fp32, normalised.
        labels: (N,), int64.
        weight: what its mean loss counts for in the mean over processes; 1 where there is one process.
    """

    images: Tensor
    labels: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        train, test: the official splits (train without the held-out images).
        val: the held-out training images; None unless asked for.
        classes: names in the order of the labels.
        mean, std: of the training pixels in [0, 1], per channel.
        padding: of the random crop, in pixels; 0 for none.
        flip: whether to mirror half of the images: their mirror image must still be of their class.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    val: Split | None = None


class Source(NamedTuple):
    """How to load one data set in one shape, normalise and augment it; see Dataset."""

    load: Callable[[Path], tuple[Split, Split, tuple[str, ...]]]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
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
            if image.size != RGB[1:]:
                image = image.resize(RGB[1:], Image.Resampling.BILINEAR)
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


def load_mnist(root: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """Load torchvision's MNIST files, downloaded when absent."""
    from torchvision import datasets

    try:
        splits = [datasets.MNIST(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"cannot download MNIST to {root} ({error}): place the four *-ubyte files in {root / 'MNIST' / 'raw'} "
            "by hand, or name another --data"
        ) from error
    train, test = (Split(split.data[:, None].contiguous(), split.targets) for split in splits)
    return train, test, tuple(str(digit) for digit in range(10))


def load_digits(root: Path, *, shape: tuple[int, int, int]) -> tuple[Split, Split, tuple[str, ...]]:
    """Load the 1,797 handwritten digits (8x8, 17 grey levels) that scikit-learn bundles, upscaled to a shape.

    Every fifth image in order of class is a test image: 360, stratified, always the same. `root` is not read.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError("-d digits needs scikit-learn: pip install -r requirements-dev.txt") from error
    digits = datasets.load_digits()
    order = torch.from_numpy(digits.target).long().argsort(stable=True)
    images = torch.from_numpy(digits.images).float()[order, None]
    images = F.interpolate(images, size=shape[1:], mode="bilinear", align_corners=False)
    images = images.mul(255 / 16).round().to(torch.uint8).expand(-1, shape[0], -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()[order]
    test = torch.arange(len(labels)) % 5 == 0
    classes = tuple(str(digit) for digit in range(10))
    return Split(images[~test], labels[~test]), Split(images[test], labels[test]), classes


CIFAR = {  # normalisation of the release, for both CIFARs, and its augmentation
    "shape": RGB,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "padding": 4,
    "flip": True,
}
PLAIN = {"shape": GREY, "mean": (0.0,), "std": (1.0,), "padding": 0, "flip": False}  # pixels in [0, 1] as they are

# A data set stands here once for each shape that it can be had in.
DATASETS: dict[str, tuple[Source, ...]] = {
    "cifar10": (Source(partial(load_cifar, num_classes=10), **CIFAR),),
    "cifar100": (Source(partial(load_cifar, num_classes=100), **CIFAR),),
    "digits": (
        Source(partial(load_digits, shape=RGB), RGB, mean=(0.3057,) * 3, std=(0.3238,) * 3, padding=4, flip=False),
        Source(partial(load_digits, shape=GREY), **PLAIN),
    ),
    "folder": (Source(load_folder, **CIFAR),),
    "mnist": (Source(load_mnist, **PLAIN),),
}


def datasets_of(shape: tuple[int, int, int]) -> list[str]:
    """Return the names of the data sets that can be had in a shape."""
    return [name for name, sources in DATASETS.items() if any(source.shape == shape for source in sources)]


def load_dataset(name: str, root: str | Path, *, shape: tuple[int, int, int] = RGB, val_split: int = 0) -> Dataset:
    """Load a data set into memory.

    Args:
        name: a key of DATASETS.
        root: folder that holds the images (`--data`).
        shape: of an image, as the network takes it: channels, height, width.
        val_split: number of training images to hold out, chosen at random, the same for every seed.

    Returns:
        The images as uint8 and how to augment and normalise them.

    Raises:
        ValueError: unknown name, no images of this shape, unusable files, or fewer than val_split + 1 training images.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}")
    source = next((source for source in DATASETS[name] if source.shape == shape), None)
    if source is None:
        size = "x".join(map(str, shape))
        raise ValueError(
            f"--dataset {name} has no {size} images, which --arch takes: use {', '.join(datasets_of(shape))}"
        )
    train, test, classes = source.load(Path(root))
    dataset = Dataset(train, test, classes, source.mean, source.std, source.padding, source.flip)
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
    epoch is all that a resumed run needs. Each of several processes draws the same and takes its share.

    Args:
        split: images and labels; they are used where they are.
        dataset: says how to normalise and augment.
        batch_size: images a batch, over all processes; the last one may be smaller.
        generator: of the host; None for the images in order, as they are.
        memory_format: of the batches.
        rank: number of this process, from 0.
        processes: how many share the batches. With a generator each takes every `processes`-th image of every
            batch, else every `processes`-th batch.
    """

    def __init__(
        self,
        split: Split,
        dataset: Dataset,
        *,
        batch_size: int,
        generator: torch.Generator | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.split, self.dataset, self.batch_size, self.generator = split, dataset, batch_size, generator
        self.memory_format, self.rank, self.processes = memory_format, rank, processes
        mean, std = (torch.tensor(v, device=split.images.device)[:, None, None] for v in (dataset.mean, dataset.std))
        self.factor, self.offset = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        """Return the number of batches, over all processes."""
        return -(-len(self.split.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's share of every batch."""
        yield from self._ordered() if self.generator is None else self._augmented()

    def _ordered(self) -> Iterator[Batch]:
        batches = [*zip(*(t.split(self.batch_size) for t in self.split), strict=True)]
        for images, labels in batches[self.rank :: self.processes]:
            yield Batch(self.normalize(images), labels)

    def _augmented(self) -> Iterator[Batch]:
        count, device = len(self.split.labels), self.split.images.device
        order = torch.randperm(count, generator=self.generator)
        offsets = torch.randint(2 * self.dataset.padding + 1, (2, count), generator=self.generator)
        mirrored = torch.rand(count, generator=self.generator) < 0.5
        drawn = [t.to(device).split(self.batch_size) for t in (order, offsets[0], offsets[1], mirrored)]
        for whole in zip(*drawn, strict=True):
            index, top, left, mirror = (t[self._share(t)] for t in whole)
            images = self.split.images[index]
            if self.dataset.padding:
                images = crop(images, top, left, padding=self.dataset.padding)
            if self.dataset.flip:
                images = flip(images, mirror)
            yield Batch(self.normalize(images), self.split.labels[index], self._weight(len(whole[0])))

    def _share(self, whole: Tensor) -> slice:
        # A process without an image of a small last batch takes the first one, with weight 0.
        return slice(self.rank, None, self.processes) if self.rank < len(whole) else slice(1)

    def _weight(self, size: int) -> float:
        return len(range(self.rank, size, self.processes)) * self.processes / size

    def normalize(self, images: Tensor) -> Tensor:
        """Turn pixels 0..255 into (pixel / 255 - mean) / std."""
        images = images.to(torch.float32, memory_format=self.memory_format)
        return images.mul_(self.factor).add_(self.offset)
