"""What a checkpoint says of itself: data set, network, classes, preprocessing; and the options that follow from it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from models import ARCHS, build_model, find_arch, guess_arch, resolve_depth
from models.widths import narrow_
from utils.files.checkpoint import CheckpointError
from utils.files.preprocessing import Preprocessing, unrecorded
from utils.options import OptionError, resolve_depth_option

MOST_CLASSES = 1 << 16  # the weights of a last layer are allocated before they are compared with the file's


@dataclass(frozen=True)
class Record:
    """What a file of ours states about the network it holds.

    Attributes:
        dataset, arch, depth, num_classes: as the options of its training had them.
        preprocessing: of its images; in files of older versions what they used.
        class_names: in the order of the outputs; None in files of older versions.
        padding, flip: of the augmentation; None and True where the data set decides.
    """

    dataset: str
    arch: str
    depth: int | None
    num_classes: int
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    padding: int | None
    flip: bool

    @property
    def network(self) -> str:
        """The options that name the network."""
        return f"-a {self.arch}" + (f" --depth {self.depth}" if self.depth else "")


def read_record(state: Mapping, path: str | Path) -> Record | None:
    """Return what a checkpoint records; None for a file of the authors, or of anybody else.

    Raises:
        CheckpointError: it records something that cannot be.
    """
    config = state.get("config")
    if not isinstance(config, Mapping) or not {"dataset", "arch", "num_classes"} <= set(config):
        return None
    try:
        dataset, arch, depth, count = config["dataset"], config["arch"], config.get("depth"), config["num_classes"]
        if not (isinstance(dataset, str) and isinstance(arch, str) and (arch in ARCHS or ":" in arch)):
            raise ValueError(f"data set {dataset!r}, network {arch!r}")
        if not isinstance(count, int) or not 2 <= count <= MOST_CLASSES or not isinstance(depth, (int, type(None))):
            raise ValueError(f"{count!r} classes, depth {depth!r}")
        padding, no_flip = config.get("padding"), config.get("no_flip", False)
        if not (padding is None or (type(padding) is int and padding >= 0)) or type(no_flip) is not bool:
            raise ValueError(f"padding {padding!r}, no_flip {no_flip!r}")
        names = state.get("class_names")
        if names is not None and (not isinstance(names, (list, tuple)) or len(names) != count):
            raise ValueError(f"'class_names' are not the names of {count} classes")
        if state.get("preprocessing") is not None:
            preprocessing = Preprocessing.of_record(state["preprocessing"])
        else:
            preprocessing = unrecorded(dataset, ARCHS[arch].shape[0] if arch in ARCHS else 3)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} records what cannot be ({error}): use another copy") from error
    names = None if names is None else tuple(map(str, names))
    return Record(dataset, arch, depth, count, preprocessing, names, padding, not no_flip)


def unseen_images(state: Mapping) -> int | None:
    """Return how many held-out images neither this run nor one that it began from has trained on.

    None where the file does not say: `unseen` is recorded of a run that began from one with fewer, else `val_split`.
    """
    config = state.get("config")
    config = config if isinstance(config, Mapping) else {}
    count = config.get("unseen", config.get("val_split"))
    return count if isinstance(count, int) else None


def recorded_widths(state: Mapping, path: str | Path) -> dict[str, list[int]] | None:
    """Return the widths of a network that `halo.shrink` has made narrower, None for one of full width.

    Raises:
        CheckpointError: what a checkpoint records of them cannot be.
    """
    config = state.get("config")
    widths = config.get("widths") if isinstance(config, Mapping) else None
    if widths is None:
        return None
    sound = isinstance(widths, Mapping) and all(
        isinstance(name, str) and isinstance(sizes, (list, tuple)) and all(type(n) is int for n in sizes)
        for name, sizes in widths.items()
    )
    if not sound:
        raise CheckpointError(f"{path} records widths that are no whole numbers by layer: use another copy")
    return {name: list(sizes) for name, sizes in widths.items()}


def classes_of(state_dict: Mapping[str, Tensor]) -> int:
    """Return the number of classes that weights speak of: the rows of the last matrix; 2 where there is none."""
    matrices = [tensor for tensor in state_dict.values() if tensor.dim() == 2]
    return len(matrices[-1]) if matrices else 2


def _with_shapes(model: nn.Module, state: Mapping, path: str | Path) -> nn.Module:
    """Run a network of lazy layers once, as they have no shape before, on an image as the file records them."""
    record = read_record(state, path) if any(map(is_lazy, model.parameters())) else None
    if record:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *record.preprocessing.shape))
    return model.train()


def build_recorded(arch: str, num_classes: int, depth: int | None, state: Mapping, path: str | Path) -> nn.Module:
    """Build the network of a checkpoint, as narrow as it records; its weights are still to be loaded.

    Raises:
        ValueError: there is no such network; see `build_model`.
        CheckpointError: the recorded widths do not fit it, or each other.
    """
    widths = recorded_widths(state, path)
    model = _with_shapes(build_model(arch, num_classes, depth), state, path)
    if widths is None:
        return model
    record = read_record(state, path)
    try:
        narrow_(model, widths)
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, *record.preprocessing.shape))
        if logits.shape[1:] != (num_classes,):
            raise ValueError(f"its outputs are not those of {num_classes} classes")
    except (ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} records widths that do not fit {arch} ({reason}): use another copy") from error
    return model.train()


def same_network(one: str, other: str) -> bool:
    """Tell whether two names are of one architecture."""
    return one == other or (one in ARCHS and ARCHS[one] is ARCHS.get(other))


def same_subject(one: Record | argparse.Namespace, other: Record | argparse.Namespace) -> bool:
    """Tell whether two records, or a record and options, name the same data set and network."""
    return (one.dataset, one.depth) == (other.dataset, other.depth) and same_network(one.arch, other.arch)


def take_from_file(args: argparse.Namespace, state: Mapping, path: str | Path, *, dataset: str | None = None) -> None:
    """Fill the options that name data set and network with what a checkpoint records, in place.

    Args:
        args: `dataset`, `arch` and `depth`, None where they were not given.
        state: the checkpoint.
        path: where it came from, for the messages.
        dataset: of a file that records none, unless it was given.

    Raises:
        OptionError: a given option contradicts the file, or the file records nothing and an option is missing.
        CheckpointError: the file records what cannot be.
    """
    record = read_record(state, path)
    if record is None:
        args.dataset = args.dataset or dataset
        missing = [flag for flag, value in (("-d", args.dataset), ("-a", args.arch)) if value is None]
        if missing:
            guess = guess_arch(state["state_dict"])
            fits = f"its weights fit {guess}" if guess else "its weights fit no network here"
            raise OptionError(f"{path} does not record data set and network: give {' and '.join(missing)}; {fits}")
    else:
        _take_record(args, record, path)
    resolve_depth_option(args, resolve_depth)


def _take_record(args: argparse.Namespace, record: Record, path: str | Path) -> None:
    if args.dataset is not None and args.dataset != record.dataset:
        raise OptionError(f"-d {args.dataset} contradicts {path}, which records -d {record.dataset}: leave it out")
    other = args.arch is not None and not same_network(args.arch, record.arch)
    if other or args.depth not in (None, record.depth):
        given = [f"-a {args.arch}"] if args.arch is not None else []
        given += [f"--depth {args.depth}"] if args.depth else []
        raise OptionError(f"{' '.join(given)} contradicts {path}, which records {record.network}: leave it out")
    if args.arch is None:
        require_known(record, path)
    args.dataset, args.arch, args.depth = record.dataset, args.arch or record.arch, record.depth


def require_known(record: Record, path: str | Path) -> None:
    """Make sure that the network of a file can be built without looking for its code beside the file.

    Raises:
        OptionError: it is a network of the user's own that is not on the Python path.
    """
    try:
        find_arch(record.arch, here=False)
    except ValueError as error:
        remedy = f"its code runs if you name it, -a {record.arch}"
        raise OptionError(f"{path} holds a network of your own that is not on the Python path: {remedy}") from error
