"""Batches from memory: crop, flip and normalisation on whole batches, without worker processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.training.dataset import Batch, Dataset, Split


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
        self.factor, self.offset = dataset.preprocessing.factors(split.images.device)

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
