"""Is HALO adaptive, or only an L1 that grows? Runs that differ from a finished HALO run in their lam alone."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models import find_arch
from utils import options
from utils.files.checkpoint import CheckpointError, load_checkpoint, load_weights
from utils.plot_methods import plot_study
from utils.run import read_json, write_json
from utils.studies.jobs import is_trained, measure
from utils.studies.measurements import read_log
from utils.training.epoch import NonFiniteLossError
from utils.training.experiment import Experiment, train_or_evaluate
from utils.training.state import FREE_ON_RESUME
from utils.training.statistics import flatten, rank_correlation

# Which older runs do not record.
NO_ZEROS = {"start": None, "mask": None, "gmp": None, "gmp_epochs": None, "linear": None}
LABELS = {
    "halo": "HALO",
    "averaged": "lam averaged per layer, each epoch",
    "growing_l1": "L1 growing as HALO's median",
    "last_l1": "L1 at HALO's last median",
    "then_kept": "HALO, then lam frozen",
    "then_averaged": "HALO, then lam averaged and frozen",
}


@dataclass(frozen=True)
class HaloRun:
    """A finished run of HALO with held-out images.

    Attributes:
        folder: it was written to.
        state: its final.pth.tar.
        medians: of the effective strength xi / lam^2 over all penalised weights, after each epoch.
        last_lr: learning rate of the last epoch.
    """

    folder: Path
    state: dict
    medians: tuple[float, ...]
    last_lr: float

    @property
    def seed(self) -> int:
        """The seed it was trained with."""
        return self.state["config"]["seed"]

    @property
    def identity(self) -> str:
        """SHA-256 of its log, whose times no other run has."""
        return hashlib.sha256((self.folder / "log.csv").read_bytes()).hexdigest()

    @property
    def setting(self) -> dict:
        """The options that shape its training, without the seed."""
        left_out = FREE_ON_RESUME - {"epochs"} | {"seed"}
        return {key: value for key, value in self.state["config"].items() if key not in left_out}


def load_run(folder: str | Path) -> HaloRun:
    """Read a finished run.

    Raises:
        ValueError: it is not finished, not of HALO, or has no held-out images to measure on; or its network is one of
            the user's own that is not on the Python path.
    """
    folder = Path(folder)
    state = load_checkpoint(folder / "final.pth.tar")
    config = state.get("config")
    if not isinstance(config, Mapping) or config.get("penalty") != "halo" or not config.get("val_split"):
        raise ValueError(f"{folder} is no run with --halo and --val_split: give the folder of one")
    _require_code(config["arch"], folder)
    _check_lambdas(state, folder)
    others = [f"--{name}" for name in (*NO_ZEROS, "grow") if config.get(name)]
    if others:
        raise ValueError(f"{folder} was trained with {others[0]}, which its controls cannot repeat: give a plain run")
    rows = read_log(folder, columns=("strength_q50", "lr"), epochs=state.get("epoch"))
    return HaloRun(folder, state, tuple(row["strength_q50"] for row in rows), rows[-1]["lr"])


def _require_code(arch: str, folder: Path) -> None:
    """Raise unless a network can be built without code from the current directory, which may have come with a file."""
    try:
        find_arch(arch, here=False)
    except ValueError as error:
        remedy = "if you trust its code, name the folder of that in PYTHONPATH"
        raise ValueError(f"{folder} trained {arch}, which is not on the Python path: {remedy}") from error


def _check_lambdas(state: Mapping, folder: Path) -> None:
    """Raise unless a checkpoint has one finite lam for each element of some of its weights."""
    lambdas, weights = state.get("lambdas"), state["state_dict"]

    def fits(name: object, lam: object) -> bool:
        there = isinstance(lam, Tensor) and name in weights and lam.shape == weights[name].shape
        return there and lam.is_floating_point() and bool(lam.isfinite().all())

    if not isinstance(lambdas, Mapping) or not all(fits(name, lam) for name, lam in lambdas.items()):
        raise CheckpointError(f"{folder}/final.pth.tar holds lam that do not fit its weights: use another copy")


def prepare(out: Path, setting: dict, runs: list[HaloRun]) -> None:
    """Let the folder of the outputs hold the controls of one setting and of these runs only.

    Raises:
        ValueError: it holds the controls of others.
        OSError: it cannot be written to.
    """
    before, own = read_json(out / "setting.json"), {str(run.seed): run.identity for run in runs}
    known = (before or {}).pop("runs", {})  # an older version has written none
    others = [seed for seed, identity in own.items() if known.get(seed, identity) != identity]
    was = f"seed {others[0]} was another run" if others else ""
    if before is not None and before != setting:
        changed = next((key for key in before | setting if setting.get(key) != before.get(key)), "their order")
        was = f"{changed} {before.get(changed)}, now {setting.get(changed)}"
    if was:
        raise ValueError(f"{out} holds the controls of other runs ({was}): choose another --save_dir")
    write_json(out / "setting.json", setting | {"runs": known | own})


@torch.no_grad()
def average_(tensor: Tensor) -> None:
    """Replace every element by the mean magnitude of all."""
    tensor.fill_(tensor.abs().mean())


class AveragedHALO(Experiment):
    """HALO whose lam, and their momentum, are averaged over each layer after every epoch."""

    def run_epoch(self) -> dict:
        """Train and evaluate once, then average; return the row for log.csv."""
        row = super().run_epoch()
        for lam in self.penalty.lambdas.values():
            average_(lam)
        for state in self.optimizers[1].state.values():
            state["momentum_buffer"].fill_(state["momentum_buffer"].mean())
        return row


class GrowingL1(Experiment):
    """L1 whose strength in each epoch is prescribed."""

    def __init__(self, *args, strengths: tuple[float, ...], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.strengths = strengths

    def run_epoch(self) -> dict:
        """Train and evaluate once at this epoch's strength; return the row for log.csv."""
        self.penalty.scale = self.strengths[self.epoch]
        return super().run_epoch()


def continued(
    args: argparse.Namespace, data, model, penalty, *, start: HaloRun, averaged: bool, **kwargs
) -> Experiment:
    """Return an experiment that starts from the end of a run, with its lam frozen, averaged per layer or not."""
    load_weights(model, start.state["state_dict"], path=start.folder / "final.pth.tar")
    for name, lam in penalty.lambdas.items():
        lam.requires_grad_(False).copy_(start.state["lambdas"][name])
        if averaged:
            average_(lam)
    return Experiment(args, data, model, penalty, **kwargs)


def control(run: HaloRun, name: str) -> tuple[dict, Callable[..., Experiment]]:
    """Return the options in which a control differs from the run, and what makes its experiment."""
    last = run.medians[-1]
    l1 = {"penalty": "l1", "xi": last, "psi": None, "lambda_init": 1.0, "reg_lr": None, "reg_wd": None}
    after = {"lr": run.last_lr, "schedule": []}
    return {
        "averaged": ({}, AveragedHALO),
        "growing_l1": (l1, partial(GrowingL1, strengths=run.medians)),
        "last_l1": (l1, Experiment),
        "then_kept": (after, partial(continued, start=run, averaged=False)),
        "then_averaged": (after, partial(continued, start=run, averaged=True)),
    }[name]


def train_control(run: HaloRun, name: str, folder: Path, *, data: str, epochs: int) -> argparse.Namespace:
    """Train a control unless it is trained, or go on where it was stopped; return its options.

    Args:
        run: what it is a control of.
        name: a key of LABELS; "halo" is the run itself, which needs no training.
        folder: where it goes.
        data: folder of the images.
        epochs: of those that go on from the end of the run.
    """
    config = {key: value for key, value in run.state["config"].items() if key != "num_classes"}
    config = options.NO_IMAGE_OPTIONS | NO_ZEROS | config  # an older version has none of them
    fixed = {"data": data, "no_test": True, "evaluate": False, "overwrite": False, "resume": None, "device": "auto"}
    if name == "halo":
        return argparse.Namespace(**config | fixed | {"save_dir": str(run.folder)})
    changes, kind = control(run, name)
    if name.startswith("then"):
        changes = changes | {"epochs": epochs}
    checkpoint = folder / "checkpoint.pth.tar"
    resume = str(checkpoint) if checkpoint.exists() else None
    place = {"save_dir": str(folder), "resume": resume, "overwrite": not resume}
    args = argparse.Namespace(**config | fixed | changes | place)
    if not is_trained(folder):
        train_or_evaluate(args, kind=kind)
    return args


def measure_control(
    run: HaloRun, name: str, folder: Path, *, data: str, epochs: int, percent: tuple[float, ...]
) -> Path:
    """Train a control and measure it on the held-out images; return its prune.json. What it says goes to log.txt.

    Raises:
        NonFiniteLossError: it diverged.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            args = train_control(run, name, folder / "run", data=data, epochs=epochs)
            measure(args, folder / "val", percent=percent, of="nonzero", scheme="global", images="val")
    except KeyboardInterrupt as error:
        raise type(error)(f"stopped; the same command goes on, {folder} holds the last finished epoch") from error
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{LABELS[name]!r} diverged ({folder}/log.txt): leave it out with --only") from error
    return folder / "val" / "prune.json"


def describe_lambdas(run: HaloRun) -> dict[str, float]:
    """Return how far lam got, and how much it differs from weight to weight.

    Returns:
        `median_lambda`; `median_strength`, xi / lam^2; `rank_correlation` of |lam| with |w|; `within_layers`, the
        share of the variance of log |lam| over all weights that is not between the means of the layers, in [0, 1].
    """
    lambdas = {name: lam.abs().clamp_min(torch.finfo(lam.dtype).tiny) for name, lam in run.state["lambdas"].items()}
    everything = flatten(lambdas)
    logs = [lam.double().log() for lam in lambdas.values()]
    within = sum(log.numel() * log.var(correction=0) for log in logs) / len(everything)
    weights = {name: run.state["state_dict"][name].abs() for name in lambdas}
    return {
        "median_lambda": everything.median().item(),
        "median_strength": run.medians[-1],
        "rank_correlation": rank_correlation(everything, flatten(weights)),
        "within_layers": (within / everything.double().log().var(correction=0)).item(),
    }


def costless(rows: list[dict]) -> float:
    """Return the highest ratio that costs HALO at most a point."""
    halo = {row["ratio"]: row["top1_mean"] for row in rows if row["method"] == LABELS["halo"]}
    return max(ratio for ratio, top1 in halo.items() if top1 >= halo[0.0] - 1)


def draw(rows: list[dict], path: str | Path, *, title: str) -> None:
    """Draw HALO and its controls; the title speaks of the highest ratio that costs HALO at most a point.

    Args:
        rows: of adaptivity.json.
        path: PNG to write.
        title: what was asked.
    """
    plot_study(rows, path, title=title, ratio=costless(rows), images="held-out")
