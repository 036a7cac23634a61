"""Whether the parts of a checkpoint that only a resumed run needs are what this run would have written itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from utils.files.checkpoint import CheckpointError
from utils.options import OptionError

if TYPE_CHECKING:
    from utils.training.experiment import Experiment


@contextmanager
def usable(path: str | Path) -> Iterator[None]:
    """Turn what the block raises on values of the wrong kind into one line that names the file.

    Raises:
        CheckpointError: the block raised.
    """
    try:
        yield
    except (CheckpointError, OptionError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise damaged(path, f"what cannot be continued from ({type(error).__name__} {error})") from error


def damaged(path: str | Path, what: str) -> CheckpointError:
    """Return the error that says what a checkpoint holds or lacks."""
    return CheckpointError(f"{path} holds {what}: resume from another copy, or start a new run")


def check_parts(run: Experiment, state: Mapping, path: str | Path) -> None:
    """Raise unless lam, optimizers, schedules, scaler, history and generators fit a run.

    Nothing may be broadcast, cast or taken over unseen: the state of this run, freshly made, says what each part
    has to look like.

    Raises:
        CheckpointError: with the part that does not fit.
    """
    epoch, lambdas = state.get("epoch"), {name: lam.detach() for name, lam in run.penalty.lambdas.items()}
    schedulers, saved = state["schedulers"], [state["optimizer"], state.get("reg_optimizer")]
    fits = {
        "lambdas": _fits(state.get("lambdas"), lambdas) or (not lambdas and not state.get("lambdas")),
        "history": _is_history(state["history"], epoch, f"{run.held_out}_top1"),
        "optimizer": _fits_optimizer(saved[0], run.optimizers[0]),
        "reg_optimizer": len(run.optimizers) < 2 or _fits_optimizer(saved[1], run.optimizers[1]),
        "schedulers": isinstance(schedulers, list)
        and len(schedulers) == len(run.schedulers)
        and all(_fits_scheduler(*pair, epoch) for pair in zip(schedulers, run.schedulers, strict=True)),
        "scaler": _fits(state["scaler"], run.precision.scaler.state_dict()),
        "rng": _is_rng(state["rng"], run.generator),
    }
    wrong = next((name for name, fit in fits.items() if not fit), None)
    if wrong:
        raise damaged(path, f"under {wrong!r} what does not fit this run")


def _fits(value: object, own: object) -> bool:
    """Tell whether a value has the keys, lengths, shapes and types of our own; numbers must be finite."""
    if isinstance(own, Mapping):
        return isinstance(value, Mapping) and [*value] == [*own] and all(_fits(value[key], own[key]) for key in own)
    if isinstance(own, (list, tuple)):
        same = isinstance(value, (list, tuple)) and len(value) == len(own)
        return same and all(_fits(*pair) for pair in zip(value, own, strict=True))
    if isinstance(own, Tensor):
        return isinstance(value, Tensor) and _is_like(value, own)
    if type(own) in (int, float):
        return _is_number(value)
    return type(value) is type(own) and value == own


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_like(value: Tensor, own: Tensor) -> bool:
    """Tell whether a tensor could be that one: its shape and type, dense, finite."""
    same = (value.shape, value.dtype, value.layout) == (own.shape, own.dtype, torch.strided)
    return same and (not value.is_floating_point() or bool(value.isfinite().all()))


def _fits_optimizer(saved: object, optimizer: Optimizer) -> bool:
    """Compare the state of an optimizer with a fresh one: settings but the learning rate are equal, buffers fit."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fresh = optimizer.state_dict()["param_groups"]
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
        return False
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(fresh):
        return False
    for group, own in zip(groups, fresh, strict=True):
        # versions of torch differ in the settings they know
        if not isinstance(group, Mapping) or not _is_number(group.get("lr")) or group.get("params") != own["params"]:
            return False
        if any(group[key] != own[key] for key in own if key in group and key != "lr"):
            return False
    moves = any(group["momentum"] for group in fresh)
    return all(_fits_buffers(key, buffers, parameters, moves=moves) for key, buffers in saved["state"].items())


def _fits_buffers(number: object, buffers: object, parameters: list[Tensor], *, moves: bool) -> bool:
    """Tell whether these are buffers of a parameter, which is known by its number, with momentum or without."""
    if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(buffers, Mapping):
        return False
    buffer, own = buffers.get("momentum_buffer"), parameters[number].detach()
    # a compiled step would write beyond a buffer that is smaller than its parameter
    fits = isinstance(buffer, Tensor) and _is_like(buffer, own)
    return {*buffers} <= {"momentum_buffer"} and (fits or (buffer is None and not moves))


def _fits_scheduler(saved: object, scheduler: object, epoch: int) -> bool:
    """Compare the state of a schedule with a fresh one; it is taken over whole, so it may hold nothing else."""
    own = {key: value for key, value in scheduler.state_dict().items() if key != "milestones"}
    if not isinstance(saved, Mapping) or saved.get("last_epoch") != epoch:
        return False
    if any(hasattr(scheduler, str(key)) for key in saved if key not in own):
        return False
    return all(_fits(saved[key], own[key]) for key in own if key in saved)


def _is_history(history: object, epoch: object, top1: str) -> bool:
    """Tell whether these are the rows of the epochs so far: numbers under names, the same in each."""
    if not isinstance(history, list) or len(history) != epoch:
        return False
    for number, row in enumerate(history, 1):
        if not isinstance(row, Mapping) or [*row] != [*history[0]] or row.get("epoch") != number:
            return False
        if not {"lr", "reg_lr", "train_loss", "train_top1", "seconds", top1} <= {*row}:
            return False
        if any(value != "" and type(value) not in (int, float) for value in row.values()) or row[top1] == "":
            return False
    return True


def _is_rng(rng: object, generator: torch.Generator) -> bool:
    """Tell whether these are the states of the generators: of torch's one a process, or one of an older version."""
    if not isinstance(rng, Mapping) or not isinstance(rng.get("cuda"), list):
        return False
    states = rng.get("torch") if isinstance(rng.get("torch"), list) else [rng.get("torch")]
    pairs = [(rng.get("data"), generator.get_state()), *((state, torch.get_rng_state()) for state in states)]
    return bool(states) and all(isinstance(value, Tensor) and _is_like(value, own) for value, own in pairs)
