"""Checkpoints that are written whole and load safely, or say why not."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from models import guess_arch
from utils.files.archive import RefusedError
from utils.files.atomic import atomic_write
from utils.files.inspection import inspect
from utils.files.soundness import check_state
from utils.files.unpack import KINDS, is_compact, load_compact


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


# What a file says of the run and the images of its network, whoever writes it again.
DESCRIPTION = ("epoch", "best_acc", "config", "preprocessing", "class_names", "images")


def described(state: Mapping, *more: str) -> dict:
    """Return what a checkpoint says of its network beside the weights: DESCRIPTION, and more if it is named."""
    return {key: state[key] for key in (*DESCRIPTION, *more) if key in state}


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
        The dict, with at least `state_dict`, whose keys in files of others have lost a `module.` prefix (DataParallel).

    Raises:
        CheckpointError: the file is missing, truncated or damaged (a byte that was changed is noticed), would run code,
            allocate more than it holds, or has no `state_dict` or keys of other types than ours.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the file, such as {path / 'checkpoint.pth.tar'}")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: check the path")
    try:
        state = _read(path, map_location)
        check_state(state)
    except RefusedError as error:
        raise CheckpointError(f"{path} {error}") from error
    except PermissionError as error:
        raise CheckpointError(f"cannot read {path}: change its permissions, or use a copy of your own") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file makes zipfile, pickle and torch raise almost anything
        raise CheckpointError(f"{path} is truncated, damaged or no checkpoint: use another copy") from error
    for key in ("config", "pruning"):  # a file of others may have something else by these names
        if not isinstance(state.get(key), Mapping):
            state.pop(key, None)
    tensors = state["state_dict"]
    ours = "arch" in state.get("config", {}) or "pruning" in state  # without it, and a network may have a `module`
    if not ours and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return state | {"state_dict": {name: value.to(map_location) for name, value in tensors.items()}}


def _read(path: Path, map_location: str | torch.device) -> object:
    """Return what a file of either kind holds."""
    if is_compact(path):
        return load_compact(path)
    inspect(path)
    return torch.load(path, map_location=map_location, weights_only=True)


def require_savable(arch: str, state_dict: Mapping[str, object]) -> None:
    """Raise unless a file of a network could be read again: better before its training than after.

    Args:
        arch: the name of the network, for the message.
        state_dict: what a file would hold of it.

    Raises:
        ValueError: it has something else than dense tensors of the types that files may hold.
    """
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"-a {arch}: its state has {name}, a {type(value).__name__}: keep tensors alone in it")
        kind = str(value.dtype).removeprefix("torch.")
        if kind not in KINDS or value.layout is not torch.strided:
            remedy = "register a constant with persistent=False, or as two real buffers"
            raise ValueError(f"-a {arch}: {name} is {kind}, which no file that is read here may hold: {remedy}")


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
    found = {name: tuple(t.shape) for name, t in state_dict.items()}
    wanted = {  # a lazy layer takes whatever shape it finds
        name: found.get(name, ()) if is_lazy(t) else tuple(t.shape) for name, t in model.state_dict().items()
    }
    names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if names:
        shown = [f"{n} {found.get(n, 'absent')} instead of {wanted.get(n, 'absent')}" for n in names[:3]]
        guess = guess_arch(state_dict)
        remedy = f"it fits {guess}" if guess else "no arch here fits it, check --arch, --depth and --dataset"
        raise CheckpointError(
            f"{path} is of another network ({len(names)} entries differ): {'; '.join(shown)}: {remedy}"
        )
    kinds = {name: t.is_floating_point() for name, t in model.state_dict().items()}
    other = next((name for name, t in state_dict.items() if t.is_floating_point() != kinds[name]), None)
    if other:
        raise CheckpointError(f"{path} holds {other} as {state_dict[other].dtype}: use a copy with its own type")
