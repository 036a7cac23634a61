"""From an image to what a network takes: the one definition, written into every file of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from utils.options import LARGEST_SIDE

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS = 1 << 26  # of one image: it takes four bytes a pixel, and is read a second time as RGB
RGB, GREY = (3, 32, 32), (1, 28, 28)  # the shapes of images of the data sets known by name


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a network: (pixel / 255 - mean) / std, at one size.

    Attributes:
        shape: channels (1 or 3), height and width.
        mean, std: of the training pixels in [0, 1], per channel.
        resize: "crop" resizes the shorter side and cuts the centre out; "squash" resizes both sides, as versions
            before 0.1.0 did with image folders.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "crop"

    def pixels(self, image: Image) -> Tensor:
        """Return a PIL image as uint8 (C, H, W), at the size of this network.

        Raises:
            ValueError: it has too many pixels, grey values of more than 8 bits, or pixels that one can see through.
        """
        channels, height, width = self.shape
        if image.width * image.height > PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are too many: give images of {PIXELS:,} at most")
        if image.mode in ("I", "F") or image.mode.startswith("I;"):  # which PIL clips to 255, and says nothing
            raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}): save it with 8 bits a channel")
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[0] < 255:  # what is behind them would be whatever the file holds
                raise ValueError("it has transparent pixels: flatten it onto a background")
        image = image.convert("RGB" if channels == 3 else "L")
        if image.size != (width, height):
            image = _resized(image, width, height, squash=self.resize == "squash")
        array = np.array(image)  # a copy: torch wants to own what it may write to
        return torch.from_numpy(array.reshape(height, width, channels)).permute(2, 0, 1)

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a and b of shape (C, 1, 1), such that a * pixel + b is the normalised pixel."""
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))
        return 1 / (255 * std), -mean / std

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images (N, C, H, W) normalised, in fp32."""
        factor, offset = self.factors(images.device)
        return images.to(torch.float32).mul_(factor).add_(offset)

    def __call__(self, images: Image | Tensor) -> Tensor:
        """Return the input of the network.

        Args:
            images: one PIL image of any size, or uint8 pixels (C, H, W) or (N, C, H, W) of the network's size.

        Returns:
            (N, C, H, W), fp32, normalised; N is 1 for one image.

        Raises:
            ValueError: pixels of another type or shape.
        """
        pixels = images if isinstance(images, Tensor) else self.pixels(images)
        pixels = pixels[None] if pixels.dim() == 3 else pixels
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != self.shape:
            found = f"{pixels.dtype} of shape {tuple(pixels.shape)}"
            raise ValueError(
                f"expected a PIL image or uint8 pixels (N, {', '.join(map(str, self.shape))}), got {found}"
            )
        return self.normalize(pixels)

    def record(self) -> dict:
        """Return it as plain types, for a file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def of_record(cls, record: Mapping) -> Preprocessing:
        """Return it from what a file holds.

        Raises:
            ValueError: it holds something else.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"'preprocessing' is of type {type(record).__name__}")
        try:
            shape = tuple(int(n) for n in record["shape"])
            mean, std = (tuple(float(value) for value in record[key]) for key in ("mean", "std"))
            sound = len(shape) == 3 and shape[0] in (1, 3) and 0 < min(shape) <= max(shape) <= LARGEST_SIDE
            sound = sound and all(map(math.isfinite, mean + std)) and len(mean) == len(std) == shape[0]
            if not sound or min(std) <= 0 or record["resize"] not in ("crop", "squash"):
                raise ValueError(f"'preprocessing' is {dict(record)}")
            return cls(shape, mean, std, record["resize"])
        except (TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"'preprocessing' lacks something ({error})") from error


def _resized(image: Image, width: int, height: int, *, squash: bool) -> Image:
    """Resize to (width, height): both sides, or the shorter one with the centre cut out of the longer."""
    from PIL.Image import Resampling

    if squash:
        return image.resize((width, height), Resampling.BILINEAR)
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if size[0] * size[1] > PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too long a strip: cut it")
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.resize(size, Resampling.BILINEAR).crop((left, top, left + width, top + height))


CIFAR = Preprocessing(RGB, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # the release's, for both CIFARs
PLAIN = Preprocessing(GREY, (0.0,), (1.0,))  # pixels in [0, 1] as they are
DIGITS = Preprocessing(RGB, (0.3057,) * 3, (0.3238,) * 3)
OLDER_FOLDER = Preprocessing(RGB, CIFAR.mean, CIFAR.std, "squash")  # what versions before 0.1.0 did with -d folder
BY_NAME = {"cifar10": (CIFAR,), "cifar100": (CIFAR,), "digits": (DIGITS, PLAIN), "mnist": (PLAIN,)}


def unrecorded(dataset: str | None, channels: int) -> Preprocessing:
    """Return what a network was trained with whose file does not say it: of an older version, or of the authors.

    Args:
        dataset: the data set, if the file records that; the authors' networks are of CIFAR or MNIST.
        channels: of the images.
    """
    choices = (OLDER_FOLDER,) if dataset == "folder" else BY_NAME.get(dataset, (CIFAR, PLAIN))
    return next((choice for choice in choices if choice.shape[0] == channels), choices[0])
