"""Which images a run is trained on, in a few hundred bytes, so that a resumed run notices that they changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.files.checkpoint import CheckpointError
from utils.logger import warn
from utils.training.data import hold_out, together

if TYPE_CHECKING:
    from utils.training.dataset import Dataset

SAMPLE = 64  # images of each split whose pixels are looked at


def fingerprint(data: Dataset) -> dict:
    """Return, of each split, the number of images and SHA-256 of its labels and of the pixels of SAMPLE images."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return {
        name: {
            "count": len(split.labels),
            "labels": hashlib.sha256(split.labels.cpu().numpy().tobytes()).hexdigest(),
            "pixels": hashlib.sha256(split.images[_sample(len(split.labels))].cpu().numpy().tobytes()).hexdigest(),
        }
        for name, split in splits.items()
        if split is not None
    }


def _sample(count: int) -> torch.Tensor:
    """Return positions spread evenly over a split."""
    return torch.linspace(0, count - 1, min(count, SAMPLE), dtype=torch.float64).round().long()


def had_images(data: Dataset, state: Mapping) -> bool:
    """Tell whether a run had these training images, however many it held out; True where its file does not say.

    Args:
        data: the images, of which `hold_out` may have taken some.
        state: the checkpoint.
    """
    before, count = state.get("images"), (state.get("config") or {}).get("val_split")
    if not isinstance(before, Mapping) or not isinstance(count, int):
        return True
    whole = together(data)
    if not 0 <= count < len(whole.train.labels):
        return False
    now = fingerprint(hold_out(whole, count) if count else whole)
    return all(before.get(split) == now.get(split) for split in ("train", "val"))


def check_images(
    data: Dataset, state: Mapping, path: str | Path, *, splits: Sequence[str] = ("train", "val", "test")
) -> None:
    """Raise if a run would go on with other images than it had; a checkpoint of an older version does not tell.

    Args:
        data: the images, split as they were for the run.
        state: the checkpoint.
        path: of its file.
        splits: the parts to compare.

    Raises:
        CheckpointError: with what differs.
    """
    check_classes(data, state, path)
    before, now = state.get("images"), fingerprint(data)
    compared = [split for split in splits if split in now] if isinstance(before, Mapping) else []
    parts = [(split, part) for split in compared for part in now[split]]
    changed = [(split, part) for split, part in parts if _part(before, split, part) != now[split][part]]
    if changed and changed[0][1] == "count":
        split = changed[0][0]
        differs = f"{_part(before, split, 'count')} in {split}, now {now[split]['count']}"
    elif changed:
        differs = f"other {changed[0][1]} in {changed[0][0]}"
    else:
        return
    raise _other_images(path, differs)


def check_classes(data: Dataset, state: Mapping, path: str | Path) -> None:
    """Raise if the classes of a folder of images are not those of a network; a file of others, or older, does not tell.

    Those of the data sets known by name may be called otherwise in class folders, as long as their order is the same.

    Raises:
        CheckpointError: with what differs.
    """
    names, config, now = state.get("class_names"), state.get("config"), list(data.classes)
    if not isinstance(config, Mapping) or names is None or list(names) == now:
        return
    one, other = next((a, b) for a, b in zip_longest(names, now, fillvalue="missing") if a != b)
    differs = f"a class was called {one!r} and is {other!r}"
    if config.get("dataset") == "folder":
        raise _other_images(path, differs)
    warn(f"{path}: {differs}; its outputs are meant in the order of its names, and folders are read in that of theirs")


def _other_images(path: str | Path, differs: str) -> CheckpointError:
    remedy = "name the same with --data, or train a new network on these"
    return CheckpointError(f"{path} was trained on other images ({differs}): {remedy}")


def _part(recorded: Mapping, split: str, part: str) -> object:
    of_split = recorded.get(split)
    return of_split.get(part) if isinstance(of_split, Mapping) else None
