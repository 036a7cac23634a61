"""One training run, from its options to the files it leaves."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from models import MNIST_ARCHS, check_own_network, takes_linear
from utils.distributed import is_main, main_first, process_group, processes, rank, replicate
from utils.files.checkpoint import load_checkpoint, require_savable
from utils.files.lock import Lock
from utils.files.record import Record, build_recorded, read_record, recorded_widths, same_subject
from utils.halo.masks import FixedZeros
from utils.halo.parameters import penalized_parameters
from utils.halo.penalties import Penalty, make_penalty
from utils.interrupts import interrupt_later
from utils.logger import epoch_line, result_text, say, warn
from utils.options import OptionError
from utils.run import choose_device, clear_run, run_folder
from utils.seeds import seed_process, set_seed
from utils.training import loading
from utils.training.announce import compute_line, data_line, network_line
from utils.training.compiled import CompiledNetwork
from utils.training.dataset import Dataset
from utils.training.memory import keep_freed_memory
from utils.training.optimizers import make_optimizers
from utils.training.outputs import write_outputs
from utils.training.precision import Precision
from utils.training.recorded import RecordedStep, can_record
from utils.training.row import run_epoch, seconds_an_epoch
from utils.training.state import load_state, save_state
from utils.training.stops import begin_folder, way_to_go_on
from utils.training.zeros import begin


class Experiment:
    """A run that can be stopped and continued bit for bit.

    What it is made of stands here; its state on disk in state.py, an epoch in row.py, the last files in outputs.py.

    Args:
        args: the options, after `options.resolve`.
        data: the images.
        model: the network, on the device.
        penalty: the penalty on its parameters.
        device: where to compute.
        generator: of the data order and augmentation.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data: Dataset,
        model: nn.Module,
        penalty: Penalty,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.args, self.data, self.model, self.penalty, self.device = args, data, model, penalty, device
        self.generator = generator
        self.folder = Path(args.save_dir)
        self.history: list[dict] = []  # the rows of log.csv
        self.saved: int | None = None  # the epoch that checkpoint.pth.tar holds, where it is there
        self.held_out = "val" if args.val_split else "test"
        loader = partial(loading.make_loader, data, device=device, arch=args.arch)
        self.train_loader = loader("train", batch_size=args.train_batch, generator=generator)
        self.held_out_loader = loader(self.held_out, batch_size=args.test_batch)
        self.precision = Precision(device, args.amp)
        self.forward = replicate(model, device, skips=":" in args.arch)
        self.optimizers, self.schedulers = make_optimizers(model, penalty, args)
        batch_size = len(range(rank(), min(args.train_batch, len(data.train.labels)), processes()))
        self.recorded: RecordedStep | None = None
        if can_record(args, device):
            self.recorded = RecordedStep(self.optimizers, penalty, batch_size=batch_size)
        if args.compile:
            self.forward = CompiledNetwork(self.forward, batch_size=batch_size, round_casts=self.precision.in_fp32)
        self.zeros: FixedZeros | None = None  # set by begin() or load_state()
        self.lock: Lock | None = None  # of the folder, set by train()

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    @property
    def best(self) -> dict | None:
        """The row of the best epoch on the held-out images (the first of equals).

        With --gmp, of the epochs at whose end the mask is final; until then the last one.
        """
        final = min(math.ceil(self.args.gmp_epochs[1]), self.epoch) if self.args.gmp else 0
        rows = [row for row in self.history if row["epoch"] >= final]
        return max(rows, key=lambda row: row[f"{self.held_out}_top1"], default=None)

    @property
    def ends_with_best(self) -> bool:
        """Whether the last epoch is the best, so that its network is saved with the state."""
        return bool(self.history) and self.best is self.history[-1]

    def run_epoch(self) -> dict:
        """Train and evaluate once; return the row for log.csv. Nothing is written."""
        return run_epoch(self)

    def run(self) -> dict:
        """Train until `--epochs`: per epoch train, evaluate, log.csv, checkpoint; then the figures and summary.json.

        Returns:
            The content of summary.json.

        Raises:
            CheckpointError, OSError: nothing can be written; nothing is.
            Exception: as `stops.way_to_go_on` says, with the command that continues.
            ReplicasDifferError: lam is not the same in all processes.
            LockedError: another process has taken the folder over; it is left alone.
        """
        late = [epoch for epoch in self.args.schedule if epoch >= self.args.epochs]
        if late:
            warn(f"no decay at --schedule {' '.join(map(str, late))}: the run has only --epochs {self.args.epochs}")
        with way_to_go_on(self):
            with interrupt_later():
                begin_folder(self)
            while self.epoch < self.args.epochs:
                row = self.run_epoch()
                with interrupt_later():
                    if self.lock:
                        self.lock.require()
                    self.history.append(row)
                    save_state(self)
                left = (self.args.epochs - self.epoch) * seconds_an_epoch(self)
                say(epoch_line(self.history[-1], epochs=self.args.epochs, left=left))
            return write_outputs(self)


def require_same_subject(args: argparse.Namespace, record: Record) -> None:
    """Raise unless --evaluate names the data set and the network that its checkpoint is of.

    Raises:
        OptionError: it does not; with the options that do.
    """
    if not same_subject(record, args):
        script = ", to mnist/mnist.py" if record.arch in MNIST_ARCHS and args.arch not in MNIST_ARCHS else ""
        given = f"-d {args.dataset} -a {args.arch}" + (f" --depth {args.depth}" if args.depth else "")
        raise OptionError(f"{given} is not what {args.resume} is of: give -d {record.dataset} {record.network}{script}")


def train_or_evaluate(args: argparse.Namespace, *, kind: Callable[..., Experiment] = Experiment) -> dict:
    """Do what the options of a training script say: train, resume, or with --evaluate only evaluate.

    Args:
        args: the options, after `options.resolve`.
        kind: makes the experiment from what `Experiment` takes; another one may change what an epoch does.

    Returns:
        The content of summary.json; with --evaluate, `loss`, `top1`, `top5` and `epoch`.

    Raises:
        OptionError: --train_batch has no image for one of the processes, or --evaluate gets another data set.
        ValueError, OSError: unusable checkpoint, images or folder; and as `Experiment.run` says.
    """
    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if args.train_batch < processes():
        raise OptionError(f"--train_batch {args.train_batch} is shared by {processes()} processes: give at least that")
    generator = set_seed(args.seed)
    with process_group(device), run_folder(args) as lock:
        with main_first():
            begun = read_beginning(args)
        say(data_line(args, begun.data))
        model = make_network(args, begun, device)
        if not args.evaluate:
            return train(args, begun, model, device=device, generator=generator, kind=kind, lock=lock)
        result = loading.evaluate_checkpoint(args.resume, model, begun.data, device, args=args)
        say(f"{args.resume}: test {result_text(result, classes=len(begun.data.classes))}")
        return result


class Beginning(NamedTuple):
    """What a run begins from.

    Attributes:
        state: the checkpoint of --resume, None without.
        first: the file that says what the network is: of --resume, --start or --mask; empty without.
        path: of that file.
        data: the images.
    """

    state: dict | None
    first: dict
    path: str | None
    data: Dataset


def read_beginning(args: argparse.Namespace) -> Beginning:
    """Read the file that a run begins from, and its images; fill in the options that the file decides, in place.

    Raises:
        CheckpointError: the file is unusable.
        OptionError: the options contradict it.
        ValueError, OSError: there are no usable images.
    """
    state = load_checkpoint(args.resume) if args.resume else None
    path = args.resume or args.start or args.mask
    first = state or (load_checkpoint(path) if path else {})
    record = read_record(state, path) if state else None
    if args.evaluate and record:
        require_same_subject(args, record)
    if state:
        loading.take_from_resumed(args, state)
    else:
        loading.take_from_start(args, first, path)
    return Beginning(state, first, path, loading.load_images(args, record))


def make_network(args: argparse.Namespace, begun: Beginning, device: torch.device) -> nn.Module:
    """Return the network of a run on its device, as narrow as its file says; its weights are still to be loaded.

    Raises:
        ValueError: it cannot be built or saved, or does not take the images.
    """
    classes = len(begun.data.classes)
    model = build_recorded(args.arch, classes, args.depth, begun.first, begun.path)
    if widths := recorded_widths(begun.first, begun.path):
        args.widths = widths  # with the options, so that all that this run writes records them
    model.to(device)
    require_savable(args.arch, model.state_dict())
    check_own_network(args.arch, model, begun.data.shape, classes)  # makes the parameters of lazy layers
    return model.to(memory_format=loading.memory_format(args.arch, device))


def train(
    args: argparse.Namespace,
    begun: Beginning,
    model: nn.Module,
    *,
    device: torch.device,
    generator: torch.Generator,
    kind: Callable[..., Experiment],
    lock: Lock | None,
) -> dict:
    """Train a network as the options say, from the start or from the state of a checkpoint; see Experiment.

    Returns:
        The content of summary.json.
    """
    coefficients = {"xi": args.xi, "psi": args.psi, "lambda_init": args.lambda_init}
    linear = takes_linear(args.arch, model, asked=bool(args.linear))
    penalty = make_penalty(args.penalty, penalized_parameters(model, linear=linear), **coefficients)
    say(network_line(args, model, penalty))
    say(compute_line(args, penalty, device))
    experiment = kind(args, begun.data, model, penalty, device=device, generator=generator)
    experiment.lock = lock
    if begun.state is not None:
        load_state(experiment, begun.state, args.resume)
    else:
        begin(experiment)
        seed_process(args.seed, rank())
        if lock:
            lock.require()
        if is_main():
            clear_run(experiment.folder)
    begun.first.clear()  # the file has been read: its tensors need not stay until the end
    return experiment.run()
