"""What a stage works on: the network of a checkpoint, on the device, and its images."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from models import check_own_output, find_arch, takes_linear
from utils.files.checkpoint import load_checkpoint, load_weights
from utils.files.preprocessing import Preprocessing, unrecorded
from utils.files.record import (
    Record,
    build_recorded,
    classes_of,
    read_record,
    take_from_file,
    unseen_images,
)
from utils.options import OptionError
from utils.run import choose_device
from utils.training.data import hold_out, load_dataset
from utils.training.dataset import Dataset
from utils.training.fingerprint import check_classes, check_images
from utils.training.loading import memory_format

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10, "mnist": 10}  # without reading the images


class Subject(NamedTuple):
    """A trained network and its images.

    Attributes:
        state: the checkpoint.
        model: its network, on the device, in the layout that is fastest there.
        data: the images; None where none were asked for.
        device: where the network is.
        linear: whether Linear layers are pruned too.
        preprocessing: of the images, as the file says, or as was usual where it does not.
    """

    state: dict
    model: nn.Module
    data: Dataset | None
    device: torch.device
    linear: bool
    preprocessing: Preprocessing


def load_subject(
    args: argparse.Namespace,
    path: str,
    *,
    val_split: int = 0,
    images: bool = True,
    data: Dataset | None = None,
    dataset: str | None = None,
) -> Subject:
    """Load what a stage works on; fill `dataset`, `arch` and `depth` of the options from the file, in place.

    Args:
        args: the options of the stage.
        path: the checkpoint.
        val_split: training images to hold out.
        images: whether to load them.
        data: the images, where they are loaded already.
        dataset: of a file that does not record it, unless it was given.

    Raises:
        ValueError, OSError: unusable checkpoint or images; held-out images that the network may have seen.
        OptionError: the options contradict the file, or it lacks what they do not say.
    """
    device, state = choose_device(args.device), load_checkpoint(path)
    take_from_file(args, state, path, dataset=dataset)
    record = read_record(state, path)
    held_out = check_held_out(state, path, val_split)
    if images and data is None:
        known = val_split and held_out and record  # which images it was trained without
        data = _images(args, record, val_split=0 if known else val_split)
        if known:
            check_images(hold_out(data, held_out), state, path, splits=("train", "val"))
            data = hold_out(data, val_split)
    if data is not None:
        check_classes(data, state, path)
    count = _num_classes(args, data, record, state)
    model = build_recorded(args.arch, count, args.depth, state, path)
    load_weights(model, state["state_dict"], path=path)
    if record or data:
        used = record.preprocessing if record else data.preprocessing
    else:
        used = unrecorded(args.dataset, find_arch(args.arch).shape[0])
    if record is None:  # else it was tried before its training
        check_own_output(args.arch, model, used.shape, count)
    model.to(device, memory_format=memory_format(args.arch, device))
    linear = takes_linear(args.arch, model, asked=bool((state.get("config") or {}).get("linear")))
    return Subject(state, model, data, device, linear, used)


def check_held_out(state: dict, path: str, val_split: int) -> int | None:
    """Raise unless a network was trained without as many images as are to be held out; fewer of them will do.

    Returns:
        How many it was trained without; None if its file does not say.

    Raises:
        OptionError: it was trained on some of them. A file that does not say so is taken at the user's word.
    """
    held_out, unseen = state.get("config", {}).get("val_split"), unseen_images(state)
    if not isinstance(held_out, int) or unseen is None:
        return None
    if val_split <= unseen:
        return held_out
    if not unseen:
        raise OptionError(f"--val_split {val_split}: {path} was trained on all images, none was held out: leave it out")
    remedy = f"give at most --val_split {unseen}"
    raise OptionError(f"--val_split {val_split}: {path} was trained on all but {unseen} images: {remedy}")


def _images(args: argparse.Namespace, record: Record | None, *, val_split: int) -> Dataset:
    """Load the images as the network was trained on them, as far as its file says."""
    recorded = {}
    if record:
        recorded = {"preprocessing": record.preprocessing, "padding": record.padding, "flip": record.flip}
    shape = find_arch(args.arch).shape
    return load_dataset(args.dataset, args.data, shape=shape, val_split=val_split, **recorded)


def _num_classes(args: argparse.Namespace, data: Dataset | None, record: Record | None, state: dict) -> int:
    """Return the number of classes: of the images, as recorded, of the data set, or the rows of the last matrix."""
    if data is not None:
        return len(data.classes)
    if record is not None:
        return record.num_classes
    return NUM_CLASSES.get(args.dataset) or classes_of(state["state_dict"])


def recorded_images(state: Mapping) -> str:
    """Return which images the accuracy in a checkpoint is of: val, which were held out, or test."""
    pruning, config = state.get("pruning"), state.get("config") or {}
    images = pruning.get("images", "test") if pruning else "val" if config.get("val_split") else "test"
    return state.get("acc_images", images)  # deploy.py measures anew
