"""Image folders: FOLDER/{train,test}/<class>/<image>, read into memory at one size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from utils.files.preprocessing import PIXELS, Preprocessing
from utils.training.dataset import Split

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # of PIL's many; EPS would start a program
MEMORY_SHARE = 0.5  # of the available memory that images may take: holding images out copies them once


def read_image(path: Path, preprocessing: Preprocessing) -> Tensor:
    """Read one image as uint8 (C, H, W), at the size that the preprocessing gives it.

    Raises:
        ValueError: the file is no image, damaged, or too large.
    """
    from PIL import Image

    if not path.is_file():
        raise ValueError(f"{path} is no file: remove it")  # a pipe would be waited for
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return preprocessing.pixels(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} has too many pixels: give images of {PIXELS:,} at most") from error
    except Exception as error:  # a damaged file makes the readers of PIL raise almost anything
        reason = f"{error}; readable are {', '.join(FORMATS)}"
        raise ValueError(f"{path} is no readable image ({reason}): remove or replace the file") from error


def visible(folder: Path) -> list[Path]:
    """List a folder in order of name, without hidden files such as .DS_Store.

    Raises:
        ValueError: the folder is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: expected {folder}/<class>/<image>; check --data")
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def list_split(folder: Path, *, num_classes: int | None) -> dict[str, list[Path]]:
    """Return the images of FOLDER/<class>/<image> by class.

    Args:
        folder: holds one folder a class; their sorted names give the labels 0, 1, ...
        num_classes: how many there must be; None for any number from 2 on.

    Raises:
        ValueError: a folder is missing or empty, or the number of classes is wrong.
    """
    folders = [path for path in visible(folder) if path.is_dir()]
    expected = num_classes or "at least 2"
    if len(folders) != (num_classes or max(len(folders), 2)):
        raise ValueError(f"{folder} has {len(folders)} class folders, expected {expected}: check --data")
    files = {path.name: visible(path) for path in folders}
    for name, inside in files.items():
        if not inside:
            raise ValueError(f"class folder {folder / name} is empty: add images or remove the folder")
    return files


def read_split(files: dict[str, list[Path]], preprocessing: Preprocessing) -> Split:
    """Read the images of a split into memory, in order of class.

    Raises:
        ValueError: a file is no image.
    """
    images = torch.empty(sum(map(len, files.values())), *preprocessing.shape, dtype=torch.uint8)
    paths = (path for inside in files.values() for path in inside)
    for index, path in enumerate(paths):
        images[index] = read_image(path, preprocessing)
    return Split(images, torch.tensor([label for label, inside in enumerate(files.values()) for _ in inside]))


def load_folder(
    root: Path, preprocessing: Preprocessing, *, num_classes: int | None = None
) -> tuple[Split, Split, tuple[str, ...]]:
    """Read ROOT/train/<class>/* and ROOT/test/<class>/*.

    Raises:
        ValueError: the folders are wrong, a file is no image, or the images do not fit into the memory.
    """
    train, test = (list_split(root / split, num_classes=num_classes) for split in ("train", "test"))
    if list(train) != list(test):
        differing = sorted(set(train) ^ set(test))
        raise ValueError(f"{root}: train and test do not have the same classes, they differ in {differing[0]!r}")
    check_memory(sum(len(inside) for split in (train, test) for inside in split.values()), preprocessing.shape)
    return read_split(train, preprocessing), read_split(test, preprocessing), tuple(train)


def check_memory(count: int, shape: tuple[int, int, int]) -> None:
    """Raise unless so many images fit into MEMORY_SHARE of the memory there is, a byte a pixel and channel.

    Raises:
        ValueError: with the size needed and the memory there is.
    """
    needed, there = count * shape[0] * shape[1] * shape[2], available_memory()
    if there is not None and needed > MEMORY_SHARE * there:
        size = "x".join(map(str, shape))
        raise ValueError(
            f"{count} images of {size} need {needed / 2**30:.2f} GiB of memory; {there / 2**30:.2f} GiB are available, "
            f"of which images may take {MEMORY_SHARE:.0%}: give a smaller --image_size or fewer images"
        )


def available_memory() -> int | None:
    """Return the bytes of memory that this process may still take; None where the system does not tell."""
    found = []
    lines = _lines("/proc/meminfo")
    found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    limit, used, parts = (
        _lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current", "stat")
    )  # a container's
    if limit and used and limit[0].isdigit():
        cached = [int(line.split()[1]) for line in parts if line.startswith("inactive_file ")]  # given back when needed
        found.append(int(limit[0]) - int(used[0]) + sum(cached))
    if not found and hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def pixel_statistics(images: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of pixels in [0, 1] per channel, to four digits.

    Counts of the 256 values are exact, so the result is the same on every machine.

    Args:
        images: uint8 (N, C, H, W), in parts.
    """
    counts = torch.stack([_counts(part) for part in images]).sum(0).double()  # (C, 256)
    values, total = torch.arange(256) / 255.0, counts.sum(1)
    mean = (counts * values).sum(1) / total
    std = (counts * (values - mean[:, None]) ** 2).sum(1).div(total).sqrt()
    rounded = [[round(value, 4) for value in row.tolist()] for row in (mean, std)]
    return tuple(rounded[0]), tuple(max(value, 1 / 255) for value in rounded[1])  # a constant image has no spread


def _counts(images: Tensor) -> Tensor:
    return torch.stack([images[:, c].reshape(-1).bincount(minlength=256) for c in range(images.shape[1])])
