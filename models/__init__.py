"""The networks by name: ARCHS and build_model()."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from models.resnet import ResNet, blocks_per_stage
from models.vgg import VGG, VGG_LAYERS


class Arch(NamedTuple):
    """How to build one architecture, and the depth it has unless the user chooses another."""

    build: Callable[[int, int], nn.Module]  # (depth, num_classes) -> network
    depth: int
    fixed_depth: bool  # the name already states the depth


ARCHS: dict[str, Arch] = {
    f"vgg{depth}{suffix}": Arch(partial(VGG, batch_norm=bool(suffix)), depth, True)
    for depth in VGG_LAYERS
    for suffix in ("", "_bn")
}
ARCHS["resnet"] = Arch(ResNet, 50, False)


def resolve_depth(arch: str, depth: int | None) -> int:
    """Return the depth of a network: what the name states, or 50 for `resnet` unless another is given.

    Raises:
        ValueError: arch is unknown, depth contradicts it, or no network has this depth.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHS)}")
    spec = ARCHS[arch]
    depth = spec.depth if depth is None else depth
    if spec.fixed_depth and depth != spec.depth:
        raise ValueError(f"--depth {depth} contradicts --arch {arch}: leave --depth out or give {spec.depth}")
    if not spec.fixed_depth:
        blocks_per_stage(depth)
    return depth


def build_model(arch: str, num_classes: int, depth: int | None = None) -> nn.Module:
    """Build a freshly initialised network.

    Args:
        arch: a key of ARCHS.
        num_classes: number of outputs, at least 2.
        depth: number of weight layers; None takes the depth that the name states, 50 for `resnet`.

    Returns:
        A network that maps images (N, 3, 32, 32) to logits (N, num_classes).

    Raises:
        ValueError: arch is unknown, depth contradicts it, or there are fewer than 2 classes.

    Note:
        `resnet --depth 50` is the CIFAR network of 3 x 8 BasicBlocks, as in the release, not the ImageNet ResNet-50.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    depth = resolve_depth(arch, depth)
    return ARCHS[arch].build(depth, num_classes)
