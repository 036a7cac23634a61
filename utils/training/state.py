"""The state of a run on disk: what its checkpoints hold, how they are written, and how a run goes on from one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.distributed import gathered, is_main, rank, require_equal
from utils.files.checkpoint import CheckpointError, load_weights, save_checkpoint
from utils.halo.memory import align_momenta_
from utils.logger import write_csv
from utils.options import check_gmp
from utils.run import END_FILES
from utils.training.fingerprint import check_images, fingerprint
from utils.training.optimizers import begin_at_rest_
from utils.training.resume import check_parts, damaged, usable
from utils.training.zeros import describe_zeros, restore

if TYPE_CHECKING:
    from utils.training.dataset import Dataset
    from utils.training.experiment import Experiment

# Options that a resumed run may change: none of them alters what an epoch computes, beyond the order of sums (but for
# device where a network of your own draws random numbers on it).
FREE_ON_RESUME = {
    *("epochs", "data", "save_dir", "device", "test_batch", "overwrite", "resume", "evaluate", "compile", "no_test")
}
# Options that a resumed run takes from its checkpoint where they are not given.
KEPT_ON_RESUME = {"start": str, "mask": str, "gmp_epochs": list}
# Options that shape training and that the checkpoints of older versions, or of other scripts, do not know.
LATER = ("mask", "gmp", "grow", "linear")


def network_state(run: Experiment) -> dict:
    """Return the part of a checkpoint that later stages need; its names are the release's, ours are added."""
    key = f"{run.held_out}_top1"
    return {
        "epoch": run.epoch,
        "state_dict": run.model.state_dict(),
        "acc": run.history[-1][key] if run.history else None,
        "best_acc": run.best[key] if run.history else None,
        "config": vars(run.args) | {"num_classes": len(run.data.classes)},
        **describe_images(run.data),
        "lambdas": {name: lam.detach() for name, lam in run.penalty.lambdas.items()},
        **describe_zeros(run),
    }


def describe_images(data: Dataset) -> dict:
    """Return what files say of the images, so that the accuracy can be repeated anywhere, and a change noticed."""
    known = {"preprocessing": data.preprocessing.record(), "class_names": list(data.classes)}
    return known | {"images": fingerprint(data)}


def generator_states(run: Experiment) -> dict[str, list[Tensor]]:
    """Return the states of torch's generators, of every process: Dropout in a network of your own draws from them."""
    on_cuda, on_mps = (run.device.type == kind for kind in ("cuda", "mps"))
    states = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(run.device) if on_cuda else None}
    states["mps"] = torch.mps.get_rng_state() if on_mps else None
    everywhere = gathered(states)
    return {key: [each[key] for each in everywhere if each[key] is not None] for key in states}


def run_state(run: Experiment, generators: dict[str, list[Tensor]]) -> dict:
    """Return all that a resumed run needs to go on as if it had never stopped.

    Args:
        run: the run.
        generators: from `generator_states`.
    """
    return network_state(run) | {
        "optimizer": run.optimizers[0].state_dict(),
        "reg_optimizer": run.optimizers[1].state_dict() if len(run.optimizers) > 1 else None,
        # without the milestones, which are no plain type and stand in the config
        "schedulers": [{k: v for k, v in s.state_dict().items() if k != "milestones"} for s in run.schedulers],
        "scaler": run.precision.scaler.state_dict(),
        "history": run.history,
        "zeros": run.zeros.state_dict() if run.zeros else None,
        "rng": {**generators, "data": run.generator.get_state()},
    }


def load_state(run: Experiment, state: dict, path: str | Path) -> None:
    """Continue from a checkpoint.

    Args:
        run: the run, freshly made.
        state: the checkpoint.
        path: where it came from, for the messages.

    Raises:
        CheckpointError: it is damaged, of another network, or of a run with other options or images.
        OptionError: its --gmp_epochs lie beyond --epochs.
    """
    with usable(path):
        check_same_run(run, state, path)
        for name, kind in KEPT_ON_RESUME.items():
            value = state["config"].get(name)
            if not isinstance(value, (kind, type(None))):
                raise damaged(path, f"no {name} under 'config'")
            if getattr(run.args, name) is None:
                setattr(run.args, name, value)
        check_gmp(run.args)
        load_weights(run.model, state["state_dict"], path=path)
        check_parts(run, state, path)
        _take_parts(run, state)


@torch.no_grad()
def _take_parts(run: Experiment, state: dict) -> None:
    for name, lam in run.penalty.lambdas.items():
        lam.copy_(state["lambdas"][name])
    saved = [state["optimizer"], state["reg_optimizer"]]
    for optimizer, value in zip(run.optimizers, saved, strict=False):
        optimizer.load_state_dict(value)
    align_momenta_(run.optimizers[0])  # that of lam does so by itself
    begin_at_rest_(run.optimizers[0])  # a checkpoint of an older version lacks those of blocks that no step has used
    for scheduler, value in zip(run.schedulers, state["schedulers"], strict=True):
        scheduler.load_state_dict(value)
    run.precision.scaler.load_state_dict(state["scaler"])
    restore(run, state)
    run.history = state["history"]
    _set_generators(run, state["rng"])


def _set_generators(run: Experiment, states: dict) -> None:
    """Give the generators of this process its states; of more processes than the run had, some share theirs."""
    run.generator.set_state(states["data"])
    own = states["torch"] if isinstance(states["torch"], list) else [states["torch"]]  # an older version kept one
    torch.set_rng_state(own[rank() % len(own)])
    if states["cuda"] and run.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][rank() % len(states["cuda"])], run.device)
    if states.get("mps") and run.device.type == "mps":  # an older version kept none
        torch.mps.set_rng_state(states["mps"][0])


def check_same_run(run: Experiment, state: dict, path: str | Path) -> None:
    """Raise unless a checkpoint is one of this run that still has epochs to come.

    Raises:
        CheckpointError: it lacks something, is of other options or images, or has more epochs than asked for.
    """
    missing = [key for key in ("config", "optimizer", "schedulers", "scaler", "history", "rng") if key not in state]
    if missing:
        load_weights(run.model, state["state_dict"], path=path)  # another network is the better message
        raise CheckpointError(f"{path} holds no {missing[0]!r} to continue with: resume from a checkpoint.pth.tar")
    config = state["config"]
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise damaged(path, "no names and values under 'config'")
    if type(state.get("epoch")) is not int:
        raise damaged(path, "no number under 'epoch'")
    mine = vars(run.args) | {"num_classes": len(run.data.classes)}
    kept = {key for key in KEPT_ON_RESUME if mine[key] is None}
    keys = [key for key in dict.fromkeys([*config, *LATER]) if key not in FREE_ON_RESUME | kept]
    changed = [key for key in keys if config.get(key) != mine.get(key)]
    if changed:
        was = ", ".join(f"{key} {config.get(key)} (now {mine.get(key)})" for key in changed[:3])
        raise CheckpointError(f"{path} is of another run: {was}; give the same options, or start a new run")
    if state["epoch"] > run.args.epochs:
        raise CheckpointError(f"{path} has {state['epoch']} epochs already: give --epochs {state['epoch']} or more")
    check_images(run.data, state, path)


def save_state(run: Experiment) -> None:
    """Write the checkpoint, the best model and the log, each atomically, after a look at the other processes.

    The checkpoint comes first, for the others follow from it: `stops.begin_folder` writes those that a kill left out.
    What an earlier end of the run has written is removed, for it is the end no more.
    """
    require_equal(run.penalty.lambdas, "lam")
    require_equal(run.model.state_dict(), "the network")
    require_equal(run.zeros.masks if run.zeros else {}, "the mask")
    generators = generator_states(run)
    if not is_main():
        return
    save_checkpoint(run.folder / "checkpoint.pth.tar", run_state(run, generators))
    run.saved = run.epoch
    save_what_follows(run)
    for name in END_FILES:
        (run.folder / name).unlink(missing_ok=True)


def save_what_follows(run: Experiment) -> None:
    """Write what follows from the checkpoint: the best model if it is of the last epoch, and the log."""
    if run.ends_with_best:
        save_checkpoint(run.folder / "model_best.pth.tar", network_state(run))
    write_csv(run.folder / "log.csv", run.history)
