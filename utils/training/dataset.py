"""A data set in memory: its splits and how its images are normalised and augmented."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from utils.files.preprocessing import Preprocessing


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
        classes: names in the order of the labels.
        mean, std: of the training pixels in [0, 1], per channel.
        padding: of the random crop, in pixels; 0 for none.
        flip: whether to mirror half of the images: their mirror image must still be of their class.
        val: the held-out training images; None unless asked for.
        resize: how images of another size became these; see Preprocessing.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    val: Split | None = None
    resize: str = "crop"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.train.images.shape[1:])

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the input of a network."""
        return Preprocessing(self.shape, tuple(self.mean), tuple(self.std), self.resize)
