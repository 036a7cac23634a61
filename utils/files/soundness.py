"""Whether a checkpoint that was read has the keys and types of one, whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import chain, islice

import torch
from torch import Tensor

from utils.files.archive import RefusedError

MOST_PARTS = 4_000_000  # of a checkpoint beside what its tensors hold; 10,000 epochs are 600,000
PART_OF_TEXT = 100  # characters that count as one more
DEEPEST = 50  # containers within each other; ours are 5


def check_state(state: object) -> None:
    """Raise unless this is a checkpoint; accuracies and epoch that are tensors, as in the release, become numbers.

    Only what every stage reads is looked at; what a resumed run needs beyond that is `utils.training.resume`'s.

    Raises:
        RefusedError: with the key and what to do.
    """
    _check_parts(state)
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), Mapping):
        raise RefusedError("holds no 'state_dict': it is no checkpoint of cifar.py")
    for name, value in state["state_dict"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise RefusedError("holds a 'state_dict' of other things than tensors by name: use another copy")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise RefusedError(f"holds {name} as a sparse or quantised tensor: use a dense one")
        if max(value.shape, default=0) > max(value.numel(), 1 << 16):
            raise RefusedError(f"holds {name} of shape {tuple(value.shape)}, which is nothing: use another copy")
        if value.is_floating_point() and not value.isfinite().all():
            raise RefusedError(f"holds NaN or infinity in {name}: use an earlier checkpoint")
    for key in ("epoch", "acc", "best_acc"):
        if key in state:
            state[key] = _number(key, state[key])
    epoch = state.get("epoch")
    if epoch is not None and (epoch < 0 or epoch != int(epoch)):
        raise RefusedError(f"holds {epoch} as 'epoch', where a whole number should be: use another copy")


def _check_parts(state: object) -> None:
    """Raise where a message that shows a value would never end: a few lists that hold each other twice are enough.

    Raises:
        RefusedError: it has too many parts, each counted as often as it is reached, or they lie too deep.
    """
    level, count = [state], 0
    for _ in range(DEEPEST):
        parts = chain.from_iterable(map(_parts_of, level))
        level = list(islice(parts, MOST_PARTS + 1))
        count += len(level) + sum(len(part) for part in level if isinstance(part, (str, bytes))) // PART_OF_TEXT
        if not level or count > MOST_PARTS:
            break
    if level:
        raise RefusedError(f"holds more than {MOST_PARTS:,} parts, or parts within {DEEPEST} others: use another copy")


def _parts_of(value: object) -> Iterable:
    """Return what a container of plain types holds; nothing of anything else."""
    if isinstance(value, dict):
        return chain(value, value.values())
    return value if isinstance(value, (list, tuple, set)) else ()


def _number(key: str, value: object) -> float | int | None:
    """Return a finite number or None."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or (type(value) in (int, float) and math.isfinite(value)):
        return value
    raise RefusedError(f"holds no number under {key!r}: use another copy")
