"""From images to batches on the device, and the accuracy of a checkpoint on the test images."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from models import ARCHS
from utils.distributed import processes, rank
from utils.files.checkpoint import load_checkpoint, load_weights
from utils.training.data import Dataset, Loader, Split
from utils.training.epoch import evaluate


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
    """Return the layout of images and convolutions in which this architecture is fastest on this device."""
    on_cpu = device.type == "cpu"  # nothing else was measured
    return torch.channels_last if on_cpu and ARCHS[arch].channels_last else torch.contiguous_format


def evaluate_checkpoint(
    path: str | Path, model: nn.Module, data: Dataset, device: torch.device, *, args: argparse.Namespace
) -> dict:
    """Load a checkpoint into the network and evaluate it on the test images.

    Returns:
        `loss`, `top1` and `top5` (percent), and the `epoch` of the checkpoint.

    Raises:
        CheckpointError: the file is unusable or of another network.
    """
    state = load_checkpoint(path)
    load_weights(model, state["state_dict"], path=path)
    loader = make_loader(data, "test", device, arch=args.arch, batch_size=args.test_batch)
    result = evaluate(model, loader, device=device)
    return result | {"epoch": state.get("epoch")}
