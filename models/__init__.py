"""The networks by name: ARCHS and build_model()."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.lenet import LeNet5, LeNet300
from models.resnet import ResNet, blocks_per_stage
from models.vgg import VGG, VGG_LAYERS


class Arch(NamedTuple):
    """How to build one architecture, and what it works on."""

    build: Callable[..., nn.Module]
    shape: tuple[int, int, int]  # of an image: channels, height, width
    linear: bool  # whether linear layers are penalised and pruned too
    depth: int | None  # what the name implies; None: the architecture has no depth to choose
    depths: tuple[int, ...] = ()  # other depths that --depth may choose
    channels_last: bool = False  # whether a step on CPU is faster in this layout (benchmarks/run.py --only layout)


RESNET_DEPTHS = tuple(depth for depth in range(8, 165) if blocks_per_stage(depth))
ARCHS: dict[str, Arch] = {
    f"vgg{depth}{suffix}": Arch(
        partial(VGG, depth, batch_norm=bool(suffix)), (3, 32, 32), False, depth, channels_last=True
    )
    for depth in VGG_LAYERS
    for suffix in ("", "_bn")
}
ARCHS["resnet"] = Arch(ResNet, (3, 32, 32), False, 50, RESNET_DEPTHS, channels_last=True)
ARCHS["lenet_300_100"] = Arch(LeNet300, (1, 28, 28), True, None)
ARCHS["LeNet31"] = ARCHS["lenet_300_100"]
ARCHS["lenet_5"] = Arch(LeNet5, (1, 28, 28), True, None, channels_last=True)

CIFAR_ARCHS = [name for name, arch in ARCHS.items() if not arch.linear]
MNIST_ARCHS = [name for name, arch in ARCHS.items() if arch.linear]


def resolve_depth(arch: str, depth: int | None) -> int | None:
    """Return the depth of a network: what the name states, or 50 for `resnet` unless another is given.

    Raises:
        ValueError: arch is unknown, depth contradicts it, or no network has this depth.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHS)}")
    spec = ARCHS[arch]
    if depth is None or depth == spec.depth or depth in spec.depths:
        return depth or spec.depth
    if spec.depths:
        raise ValueError(f"no {arch} has --depth {depth}: choose from {', '.join(map(str, spec.depths[:14]))}, ...")
    remedy = "leave --depth out" + (f" or give {spec.depth}" if spec.depth else "")
    raise ValueError(f"--depth {depth} contradicts --arch {arch}: {remedy}")


def build_model(arch: str, num_classes: int, depth: int | None = None) -> nn.Module:
    """Build a freshly initialised network.

    Args:
        arch: a key of ARCHS.
        num_classes: number of outputs, at least 2.
        depth: number of weight layers; None takes the depth that the name states, 50 for `resnet`.

    Returns:
        A network that maps images (N, *ARCHS[arch].shape) to logits (N, num_classes).

    Raises:
        ValueError: arch is unknown, depth contradicts it, or there are fewer than 2 classes.

    Note:
        `resnet --depth 50` is the CIFAR network of 3 x 8 BasicBlocks, as in the release, not the ImageNet ResNet-50.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    depth = resolve_depth(arch, depth)
    build = ARCHS[arch].build
    return build(depth, num_classes) if ARCHS[arch].depths else build(num_classes)


def guess_arch(state_dict: Mapping[str, Tensor]) -> str | None:
    """Return the options under which a state_dict fits, such as "-a resnet --depth 20 with 10 classes".

    Args:
        state_dict: tensors by name; the last matrix tells the number of classes.

    Returns:
        The options, or None if no architecture here fits.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    if not matrices or matrices[-1][0] < 2:
        return None
    for arch, spec in ARCHS.items():
        for depth in spec.depths or (spec.depth,):
            with torch.device("meta"):
                candidate = build_model(arch, matrices[-1][0], depth).state_dict()
            if {name: tuple(tensor.shape) for name, tensor in candidate.items()} == shapes:
                return f"-a {arch}" + (f" --depth {depth}" if depth else "") + f" with {matrices[-1][0]} classes"
            if len(candidate) > len(shapes):
                break  # deeper ones have still more entries
    return None
