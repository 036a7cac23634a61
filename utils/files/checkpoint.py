"""Checkpoints that are written whole and load safely, or say why not."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models import guess_arch
from utils.files.atomic import atomic_write
from utils.files.compact import is_compact, load_compact


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file to write; its folder must exist.
        state: `epoch`, `state_dict`, `acc`, `best_acc` and more; tensors and plain types only.

    Raises:
        OSError: the file cannot be written (disk full, no permission); the previous file is untouched.
    """
    # Through memory, because torch.save hides the reason when the disk is full.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: str | Path, *, map_location: str | torch.device = "cpu") -> dict:
    """Read a checkpoint without running any code that the file may hold.

    Args:
        path: a file written by `save_checkpoint`, `save_compact` or by the authors' release.
        map_location: device of the tensors.

    Returns:
        The dict, with at least `state_dict`, whose keys have lost a `module.` prefix (DataParallel).

    Raises:
        CheckpointError: the file is missing, truncated, would run code, or holds no `state_dict`.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the file, such as {path / 'checkpoint.pth.tar'}")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: check the path")
    try:
        compact = is_compact(path)
        state = load_compact(path) if compact else torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            remedy = "use a file of tensors and plain types"
            raise CheckpointError(f"{path} is refused, it holds objects that could run code: {remedy}") from error
        raise CheckpointError(f"{path} is damaged or no checkpoint: use another copy") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path} is truncated, damaged or no checkpoint: use another copy") from error
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), Mapping):
        raise CheckpointError(f"{path} holds no 'state_dict': it is no checkpoint of cifar.py")
    tensors = {key.removeprefix("module."): value for key, value in state["state_dict"].items()}
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} holds a 'state_dict' of other things than tensors: use another copy")
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(f"{path} holds NaN or infinity in {bad[0]}: use an earlier checkpoint")
    for key in ("epoch", "acc", "best_acc"):  # the release may have stored tensors
        if isinstance(state.get(key), Tensor):
            state[key] = state[key].item()
    return state | {"state_dict": {name: value.to(map_location) for name, value in tensors.items()}}


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], *, path: str | Path) -> None:
    """Copy a state_dict into a network, changed in place, or say how the two differ; see `check_network`."""
    check_network(model, state_dict, path=path)
    model.load_state_dict(state_dict)


def check_network(model: nn.Module, state_dict: Mapping[str, Tensor], *, path: str | Path) -> None:
    """Raise unless a state_dict is of this network.

    Args:
        model: the network.
        state_dict: values by name.
        path: where they came from, for the message.

    Raises:
        CheckpointError: names or shapes differ; the message shows the first three.
    """
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state_dict.items()}
    names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if names:
        shown = [f"{n} {found.get(n, 'absent')} instead of {wanted.get(n, 'absent')}" for n in names[:3]]
        guess = guess_arch(state_dict)
        remedy = f"it fits {guess}" if guess else "no arch here fits it, check --arch, --depth and --dataset"
        raise CheckpointError(
            f"{path} is of another network ({len(names)} entries differ): {'; '.join(shown)}: {remedy}"
        )
