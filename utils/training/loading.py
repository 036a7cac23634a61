"""From images to batches on the device, and the accuracy of a checkpoint on the test images."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from models import check_image_size, find_arch
from utils.distributed import processes, rank
from utils.files.checkpoint import load_checkpoint, load_weights
from utils.files.preprocessing import OLDER_FOLDER
from utils.files.record import Record, read_record
from utils.logger import warn
from utils.options import OptionError
from utils.training.augment import Loader
from utils.training.data import load_dataset
from utils.training.dataset import Dataset, Split
from utils.training.epoch import evaluate
from utils.training.fingerprint import check_classes


def load_images(args: argparse.Namespace, record: Record | None) -> Dataset:
    """Load the images of a training script's options.

    Args:
        args: the options, after `options.resolve`.
        record: of the checkpoint that the run goes on from; its preprocessing stays that of the run.

    Raises:
        ValueError: unusable images.
        OptionError: an option contradicts the others, or the checkpoint.
    """
    shape, size = find_arch(args.arch).shape, args.image_size
    augmentation = {"padding": args.padding, "flip": not args.no_flip}
    preprocessing = record.preprocessing if record and record.dataset == args.dataset else None
    if size and preprocessing and size not in preprocessing.shape[1:]:
        raise OptionError(f"--image_size {size} contradicts {args.resume}, which has {preprocessing.shape[1]}")
    if args.dataset == "folder" and not preprocessing:
        if size is None:  # as options say that an older version has written
            preprocessing = OLDER_FOLDER
        else:
            shape = (shape[0], size, size)
            require_size(args.arch, size)
    options = {"shape": shape, "val_split": args.val_split, "preprocessing": preprocessing}
    return load_dataset(args.dataset, args.data, **options, **augmentation)


def take_from_resumed(args: argparse.Namespace, state: Mapping) -> None:
    """Let what goes on from a checkpoint have the size of its images where the options name none, in place.

    What else the run has had from the file of --start or --mask, which the command to go on does not name, it keeps.
    """
    config = state.get("config", {"image_size": 32})
    if args.dataset == "folder" and args.image_size is None:
        size = config.get("image_size")
        args.image_size = size if isinstance(size, int) else None
    if not (config.get("start") or config.get("mask")):
        return
    if args.padding is None and type(config.get("padding")) is int:
        args.padding = config["padding"]
    if ":" in args.arch and config.get("linear") is True:
        args.linear = True
    if "unseen" in config:
        args.unseen = config["unseen"]


def take_from_start(args: argparse.Namespace, state: Mapping, path: str) -> None:
    """Let a run that begins from a file treat images and Linear layers as that does where no option says, in place.

    Args:
        args: the options, after `options.resolve`.
        state: the checkpoint of --start, or of --mask alone; empty without either.
        path: where it lies.
    """
    record, config = read_record(state, path), state.get("config", {})
    if ":" in args.arch and config.get("linear") is True:
        args.linear = True
    same = record if record and record.dataset == args.dataset == "folder" else None
    if args.dataset == "folder" and args.image_size is None:
        args.image_size = same.preprocessing.shape[1] if same else 32
    if same and args.padding is None:
        args.padding = same.padding
    if same and not (same.flip or args.no_flip):
        warn(f"{path} was trained without mirror images: --no_flip leaves them out here too")


def require_size(arch: str, size: int) -> None:
    """Make sure that an architecture takes images of a size.

    Raises:
        OptionError: it does not; with those that it takes.
    """
    try:
        check_image_size(arch, size)
    except ValueError as error:
        raise OptionError(str(error)) from error


def make_loader(
    data: Dataset,
    split: str,
    device: torch.device,
    *,
    arch: str,
    batch_size: int,
    generator: torch.Generator | None = None,
    only: torch.Tensor | None = None,
) -> Loader:
    """Return this process's share of the batches of one split, on the device.

    Args:
        data: the images.
        split: "train", "val" or "test".
        device: where the network is.
        arch: the architecture, whose layout the batches have.
        batch_size: images a batch, over all processes.
        generator: shuffles and augments; None for the images in order, as they are.
        only: positions of the images to take; None for all.
    """
    images = getattr(data, split)
    if only is not None:
        images = Split(images.images[only], images.labels[only])
    images = images.to(device)
    layout, share = memory_format(arch, device), {"rank": rank(), "processes": processes()}
    return Loader(images, data, batch_size=batch_size, generator=generator, memory_format=layout, **share)


def memory_format(arch: str, device: torch.device) -> torch.memory_format:
    """Return the layout of images and convolutions in which this architecture is fastest on this device.

    On CUDA, where convolutions were measured in bf16, as on a CPU; elsewhere nothing was measured.
    """
    known = device.type in ("cpu", "cuda")
    return torch.channels_last if known and find_arch(arch).channels_last else torch.contiguous_format


def evaluate_checkpoint(
    path: str | Path, model: nn.Module, data: Dataset, device: torch.device, *, args: argparse.Namespace
) -> dict:
    """Load a checkpoint into the network and evaluate it on the test images.

    Returns:
        `loss`, `top1` and `top5` (percent), and the `epoch` of the checkpoint.

    Raises:
        CheckpointError: the file is unusable, or of another network or other classes.
    """
    state = load_checkpoint(path)
    load_weights(model, state["state_dict"], path=path)
    check_classes(data, state, path)
    loader = make_loader(data, "test", device, arch=args.arch, batch_size=args.test_batch)
    result = evaluate(model, loader, device=device)
    return result | {"epoch": state.get("epoch")}
