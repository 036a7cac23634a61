"""The networks by name: ARCHS and build_model()."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.lenet import LeNet5, LeNet300
from models.own import build_network, check_network, check_output, import_network
from models.resnet import ResNet, blocks_per_stage
from models.vgg import VGG, VGG_LAYERS
from models.widths import narrow_


class Arch(NamedTuple):
    """How to build one architecture, and what it works on."""

    build: Callable[..., nn.Module]
    shape: tuple[int, int, int]  # of an image: channels, height, width
    linear: bool | None  # whether linear layers are penalised and pruned too; None: where there is no convolution
    depth: int | None  # what the name implies; None: the architecture has no depth to choose
    depths: tuple[int, ...] = ()  # other depths that --depth may choose
    channels_last: bool = False  # whether a step is faster in this layout, as a rule (benchmarks/README.md: layouts)
    sizes: tuple[int, int | None] = (1, None)  # heights and widths that it can take, from and to


RESNET_DEPTHS = tuple(depth for depth in range(8, 165) if blocks_per_stage(depth))
ARCHS: dict[str, Arch] = {
    f"vgg{depth}{suffix}": Arch(
        partial(VGG, depth, batch_norm=bool(suffix)), (3, 32, 32), False, depth, channels_last=True, sizes=(32, 63)
    )
    for depth in VGG_LAYERS
    for suffix in ("", "_bn")
}
ARCHS["resnet"] = Arch(ResNet, (3, 32, 32), False, 50, RESNET_DEPTHS, channels_last=True)
ARCHS["lenet_300_100"] = Arch(LeNet300, (1, 28, 28), True, None, sizes=(28, 28))
ARCHS["LeNet31"] = ARCHS["lenet_300_100"]
ARCHS["lenet_5"] = Arch(
    LeNet5, (1, 28, 28), True, None, channels_last=True, sizes=(28, 29)
)  # 29 pools to the same maps

CIFAR_ARCHS = [name for name, arch in ARCHS.items() if not arch.linear]
MNIST_ARCHS = [name for name, arch in ARCHS.items() if arch.linear]


def find_arch(name: str, *, here: bool = True) -> Arch:
    """Return the architecture of a name: a key of ARCHS, or `module:function` for a network of your own.

    Args:
        name: with a colon, a module on the Python path and a callable in it, which is imported now; it takes the
            number of classes, by the name `num_classes` where it has that, and returns a network for RGB images.
        here: also look into the current directory. Not for a name that a file brings: the code of that name may
            have come with the file.

    Raises:
        ValueError: there is no such architecture, or it cannot be imported.
    """
    if name in ARCHS:
        return ARCHS[name]
    if ":" not in name:
        raise ValueError(
            f"unknown arch {name!r}: choose from {', '.join(ARCHS)}, or name your own network as module:function"
        )
    return Arch(partial(build_network, name, import_network(name, here=here)), (3, 32, 32), None, None)


def takes_linear(arch: str, model: nn.Module, *, asked: bool = False) -> bool:
    """Return whether the Linear layers of a network are penalised and pruned beside its convolutions.

    Always in the LeNets, never in VGG and ResNet; in a network of your own where it has no convolution, or if `asked`.
    """
    linear = find_arch(arch).linear
    if asked and arch not in ARCHS:
        return True
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return linear if linear is not None else not any(isinstance(m, convolutions) for m in model.modules())


def check_image_size(arch: str, size: int) -> None:
    """Raise unless a named architecture can take images of a size; of a network of your own nothing is known.

    Raises:
        ValueError: it cannot; with the sizes that it can take.
    """
    low, high = find_arch(arch).sizes
    if size < low or size > (high or size):
        wanted = f"{low} or more"
        if high is not None:
            wanted = f"{low} to {high}" if high > low else f"{low}"
        raise ValueError(f"-a {arch} cannot take {size}x{size} images: give --image_size {wanted}")


def check_own_network(arch: str, model: nn.Module, shape: tuple[int, int, int], num_classes: int) -> None:
    """Run a network of your own once, so that a wrong one is noticed before the training; see `own.check_network`."""
    if arch not in ARCHS:
        check_network(arch, model, shape, num_classes)


def check_own_output(arch: str, model: nn.Module, shape: tuple[int, int, int], num_classes: int) -> None:
    """Run a trained network of your own once, so that a wrong one is an error in one line; see `own.check_output`."""
    if arch not in ARCHS:
        check_output(arch, model, shape, num_classes)


def resolve_depth(arch: str, depth: int | None) -> int | None:
    """Return the depth of a network: what the name states, or 50 for `resnet` unless another is given.

    Raises:
        ValueError: arch is unknown, depth contradicts it, or no network has this depth.
    """
    spec = find_arch(arch)
    if depth is None or depth == spec.depth or depth in spec.depths:
        return depth or spec.depth
    if spec.depths:
        raise ValueError(f"no {arch} has --depth {depth}: choose from {', '.join(map(str, spec.depths[:14]))}, ...")
    remedy = "leave --depth out" + (f" or give {spec.depth}" if spec.depth else "")
    raise ValueError(f"--depth {depth} contradicts --arch {arch}: {remedy}")


def with_depth(arch: str, depth: int | None) -> str:
    """Return the name of an architecture, with its depth where there is one to choose, such as "resnet 20"."""
    return f"{arch} {depth}" if depth and arch in ARCHS and ARCHS[arch].depths else arch


def build_model(
    arch: str, num_classes: int, depth: int | None = None, *, widths: Mapping[str, Sequence[int]] | None = None
) -> nn.Module:
    """Build a freshly initialised network.

    Args:
        arch: a key of ARCHS, or `module:function` (see `find_arch`).
        num_classes: number of outputs, at least 2.
        depth: number of weight layers; None takes the depth that the name states, 50 for `resnet`.
        widths: of the layers that `halo.shrink` has made narrower, as `models.widths.widths_of` gives them.

    Returns:
        A network that maps images (N, *find_arch(arch).shape) to logits (N, num_classes).

    Raises:
        ValueError: arch is unknown, depth contradicts it, there are fewer than 2 classes, or the widths do not fit.

    Note:
        `resnet --depth 50` is the CIFAR network of 3 x 8 BasicBlocks, as in the release, not the ImageNet ResNet-50.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    depth = resolve_depth(arch, depth)
    spec = find_arch(arch)
    model = spec.build(depth, num_classes) if spec.depths else spec.build(num_classes)
    if widths is not None:
        narrow_(model, widths)
    return model


class Fit(NamedTuple):
    """The arguments of `build_model` under which a state_dict fits."""

    arch: str
    num_classes: int
    depth: int | None


def guess_arch(state_dict: Mapping[str, Tensor]) -> str | None:
    """Return the options under which a state_dict fits, such as "-a resnet --depth 20 with 10 classes".

    Args:
        state_dict: tensors by name; the last matrix tells the number of classes.

    Returns:
        The options, or None if no architecture here fits.
    """
    fit = fitting_arch(state_dict)
    if fit is None:
        return None
    return f"-a {fit.arch}" + (f" --depth {fit.depth}" if fit.depth else "") + f" with {fit.num_classes} classes"


def fitting_arch(state_dict: Mapping[str, Tensor]) -> Fit | None:
    """Return the named network that a state_dict is of, None if there is none."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    if not matrices or matrices[-1][0] < 2:
        return None
    for arch, spec in ARCHS.items():
        for depth in spec.depths or (spec.depth,):
            with torch.device("meta"):
                candidate = build_model(arch, matrices[-1][0], depth).state_dict()
            if {name: tuple(tensor.shape) for name, tensor in candidate.items()} == shapes:
                return Fit(arch, matrices[-1][0], depth)
            if len(candidate) > len(shapes):
                break  # deeper ones have still more entries
    return None
