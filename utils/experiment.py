"""One training run: what is trained, by what, how far it is, and the files it leaves."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from models import ARCHS, build_model
from utils import plots
from utils.atomic import atomic_write
from utils.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from utils.compiled import CompiledNetwork
from utils.data import Dataset, Loader, Split, load_dataset
from utils.distributed import (
    average_buffers_,
    is_main,
    lost,
    main_first,
    process_group,
    processes,
    rank,
    replicate,
    require_equal,
)
from utils.lambda_sgd import FusedHALO, LambdaSGD
from utils.logger import BatchBar, epoch_line, say, warn, write_csv
from utils.options import OptionError
from utils.parameters import penalized_parameters
from utils.penalties import HALO, Penalty, make_penalty
from utils.precision import Precision
from utils.run import (
    choose_device,
    clear_run,
    describe,
    interrupt_later,
    prepare_folder,
    set_seed,
    write_json,
)
from utils.statistics import flatten, near_zero, penalty_statistics
from utils.training import NonFiniteLossError, evaluate, train_one_epoch

# Options that a resumed run may change: none of them alters what an epoch computes, beyond the order of sums.
FREE_ON_RESUME = {"epochs", "data", "save_dir", "device", "test_batch", "overwrite", "resume", "evaluate", "compile"}


def milestones(schedule: Sequence[int], *, released: bool) -> tuple[list[int], list[int]]:
    """Return the epochs after which the learning rates of the weights and of lam are multiplied by gamma.

    Args:
        schedule: the epochs asked for.
        released: reproduce the release, which decays one shared variable for the weights and once more for lam:
            weights see 0.1 -> 0.01 -> 1e-4 and lam 0.1 -> 1e-3 -> 1e-5 where both should see 0.1 -> 0.01 -> 1e-3.

    Returns:
        Two lists; an epoch that stands twice decays twice.
    """
    schedule = sorted(schedule)
    if not released:
        return schedule, schedule
    return sorted([*schedule[:1], *schedule[1:] * 2]), sorted(schedule * 2)


class Experiment:
    """A run that can be stopped and continued bit for bit.

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
        self.held_out = "val" if args.val_split else "test"
        loader = partial(make_loader, data, device=device, arch=args.arch)
        self.train_loader = loader("train", batch_size=args.train_batch, generator=generator)
        self.held_out_loader = loader(self.held_out, batch_size=args.test_batch)
        self.precision = Precision(device, args.amp)
        self.forward = replicate(model, device)
        if args.compile:
            self.forward = CompiledNetwork(self.forward, batch_size=len(range(rank(), args.train_batch, processes())))
        weights = SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.wd, fused=True)
        self.optimizers = [weights, *make_lambda_sgd(penalty, weights, args)]
        both = milestones(args.schedule, released=args.released_lr)
        self.schedulers = [MultiStepLR(o, m, gamma=args.gamma) for o, m in zip(self.optimizers, both, strict=False)]

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    @property
    def best(self) -> dict | None:
        """The row of the best epoch on the held-out images (the first of equals)."""
        return max(self.history, key=lambda row: row[f"{self.held_out}_top1"], default=None)

    def result(self) -> dict:
        """Return the part of a checkpoint that later stages need; its names are the release's, ours are added."""
        key = f"{self.held_out}_top1"
        return {
            "epoch": self.epoch,
            "state_dict": self.model.state_dict(),
            "acc": self.history[-1][key] if self.history else None,
            "best_acc": self.best[key] if self.history else None,
            "config": vars(self.args) | {"num_classes": len(self.data.classes)},
            "lambdas": {name: lam.detach() for name, lam in self.penalty.lambdas.items()},
        }

    def state(self) -> dict:
        """Return all that a resumed run needs to go on as if it had never stopped."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return self.result() | {
            "optimizer": self.optimizers[0].state_dict(),
            "reg_optimizer": self.optimizers[1].state_dict() if len(self.optimizers) > 1 else None,
            # without the milestones, which are no plain type and stand in the config
            "schedulers": [{k: v for k, v in s.state_dict().items() if k != "milestones"} for s in self.schedulers],
            "scaler": self.precision.scaler.state_dict(),
            "history": self.history,
            "rng": {"torch": torch.get_rng_state(), "data": self.generator.get_state(), "cuda": cuda},
        }

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: the file is unusable, of another network, or of a run with other options.
        """
        state = load_checkpoint(path)
        self._check_same_run(state, path)
        load_weights(self.model, state["state_dict"], path=path)
        with torch.no_grad():
            for name, lam in self.penalty.lambdas.items():
                lam.copy_(state["lambdas"][name])
        saved = [state["optimizer"], state["reg_optimizer"]]
        for optimizer, value in zip(self.optimizers, saved, strict=False):
            optimizer.load_state_dict(value)
        for scheduler, value in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(value)
        self.precision.scaler.load_state_dict(state["scaler"])
        self.history = state["history"]
        torch.set_rng_state(state["rng"]["torch"])
        self.generator.set_state(state["rng"]["data"])
        if state["rng"]["cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])

    def _check_same_run(self, state: dict, path: str | Path) -> None:
        missing = [key for key in ("config", "optimizer", "schedulers", "scaler", "history", "rng") if key not in state]
        if missing:
            load_weights(self.model, state["state_dict"], path=path)  # another network is the better message
            raise CheckpointError(f"{path} holds no {missing[0]!r} to continue with: resume from a checkpoint.pth.tar")
        config, mine = state["config"], vars(self.args) | {"num_classes": len(self.data.classes)}
        changed = [key for key in config if key not in FREE_ON_RESUME and config[key] != mine.get(key)]
        if changed:
            was = ", ".join(f"{key} {config[key]} (now {mine.get(key)})" for key in changed[:3])
            raise CheckpointError(f"{path} is of another run: {was}; give the same options, or start a new run")
        if state["epoch"] > self.args.epochs:
            raise CheckpointError(f"{path} has {state['epoch']} epochs already: give --epochs {state['epoch']} or more")

    def run(self) -> dict:
        """Train until `--epochs`, saving after each; then write the arrays, the figures and the summary.

        Returns:
            The content of summary.json.

        Raises:
            NonFiniteLossError: the loss is not finite; the last good checkpoint stays.
            KeyboardInterrupt: Ctrl-C or a signal to end, with the command that continues.
            ConnectionError: another process of a distributed run ended; with the command that continues.
            ReplicasDifferError: lam is not the same in all processes.
            OSError: a file cannot be written; the last one written stays.
        """
        late = [epoch for epoch in self.args.schedule if epoch >= self.args.epochs]
        if late:
            warn(f"no decay at --schedule {' '.join(map(str, late))}: the run has only --epochs {self.args.epochs}")
        if self.epoch == 0:
            if is_main():
                save_checkpoint(self.folder / "init.pth.tar", self.result())
            self.save()
        while self.epoch < self.args.epochs:
            try:
                row = self.run_epoch()
                with interrupt_later():
                    self.history.append(row)
                    self.save()
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"epoch {self.epoch + 1}, {error}. {self._where_to_go_on()}") from error
            except KeyboardInterrupt as error:
                raise type(error)(f"stopped. {self._where_to_go_on()}") from error
            except RuntimeError as error:
                if processes() == 1:
                    raise
                raise ConnectionError(f"rank {rank()}: {lost(error)}. {self._where_to_go_on()}") from error
            say(epoch_line(self.history[-1], epochs=self.args.epochs))
        return self.finish()

    def run_epoch(self) -> dict:
        """Train and evaluate once; return the row for log.csv. Nothing is written."""
        start, lrs = time.perf_counter(), [scheduler.get_last_lr()[0] for scheduler in self.schedulers]
        bar = BatchBar(f"epoch {self.epoch + 1}/{self.args.epochs}", len(self.train_loader))

        def show(done: int, metrics) -> None:
            if bar.shown and metrics.count and done % 5 == 0:
                so_far = metrics.means()
                bar.update(done, f"loss {so_far['loss']:.3f}  top-1 {so_far['top1']:.1f}%")

        try:
            train = train_one_epoch(
                self.model,
                self.train_loader,
                self.penalty,
                *self.optimizers,
                device=self.device,
                forward=self.forward,
                precision=self.precision,
                on_batch=show,
            )
        finally:
            bar.close()
        average_buffers_(self.model)
        training_seconds = time.perf_counter() - start
        for scheduler in self.schedulers:
            scheduler.step()
        held_out = evaluate(self.model, self.held_out_loader, device=self.device)
        with torch.no_grad():
            penalty = self.penalty().item()
        return {
            "epoch": self.epoch + 1,
            "lr": lrs[0],
            "reg_lr": lrs[1] if len(lrs) > 1 else "",
            "train_loss": train["loss"],
            "train_loss_penalized": train["loss"] + penalty,
            "train_top1": train["top1"],
            "train_top5": train["top5"],
            **{f"{self.held_out}_{key}": value for key, value in held_out.items()},
            **near_zero(self.penalty.penalized),
            **penalty_statistics(self.penalty),
            "seconds": time.perf_counter() - start,
            "images_per_second": len(self.data.train.labels) / training_seconds,
        }

    def save(self) -> None:
        """Write the best model, the checkpoint and the log, each atomically, after a look at the other processes.

        The checkpoint is written after the best model: killed between the two, a resumed run repeats the epoch and
        writes the same best model again. log.csv follows from the checkpoint's history.
        """
        require_equal(self.penalty.lambdas, "lam")
        require_equal(self.model.state_dict(), "the network")
        if not is_main():
            return
        if self.history and self.best is self.history[-1]:
            save_checkpoint(self.folder / "model_best.pth.tar", self.result())
        save_checkpoint(self.folder / "checkpoint.pth.tar", self.state())
        write_csv(self.folder / "log.csv", self.history)

    def _where_to_go_on(self) -> str:
        arguments = [a for a in sys.argv[1:] if a != "--overwrite" and not a.startswith("--resume=")]
        if "--resume" in arguments:
            position = arguments.index("--resume")
            del arguments[position : position + 2]
        checkpoint = self.folder / "checkpoint.pth.tar"
        launcher = ["python"] if processes() == 1 else ["torchrun", "--nproc_per_node", str(processes())]
        command = shlex.join([*launcher, sys.argv[0], *arguments, "--resume", str(checkpoint)])
        epoch = f" ({self.epoch})" if processes() == 1 else ""  # rank 0 may have been lost while writing it
        return f"{checkpoint} holds the last finished epoch{epoch}; continue with: {command}"

    def finish(self) -> dict:
        """Write final.pth.tar, the arrays, the figures and summary.json; return the summary."""
        last, best = self.history[-1], self.best
        top1 = f"{self.held_out}_top1"
        summary = {
            "arguments": vars(self.args),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "penalized_parameters": sum(w.numel() for w in self.penalty.penalized.values()),
            "final": last,
            "best": {"epoch": best["epoch"], top1: best[top1]},
            "seconds": sum(row["seconds"] for row in self.history),
        }
        if not is_main():
            return summary | self._test_best()
        save_checkpoint(self.folder / "final.pth.tar", self.result())
        weights, lambdas = self._write_arrays()
        summary |= self._test_best()
        name = f"{self.args.dataset}, {self.args.arch}, penalty {self.args.penalty}, seed {self.args.seed}"
        result = f"{self.held_out} top-1 {last[top1]:.2f}% after {self.epoch} epochs"
        plots.plot_curves(self.history, self.folder / "curves.png", title=f"{result}\n{name}")
        near = f"{100 * last['fraction_1e-3']:.1f}% of the penalised weights have |w| <= 1e-3"
        correlation = last["rank_correlation"]
        adaptive = f"; rank correlation of |lam| with |w|: {correlation:.2f}" if correlation != "" else ""
        still = (self.args.xi, self.args.psi, self.args.reg_wd) if self.args.penalty == "halo" else None
        path = self.folder / "regularization.png"
        plots.plot_regularization(weights, lambdas, path, title=near + adaptive, still=still)
        write_json(self.folder / "summary.json", summary)
        say(f"{result}; best {best[top1]:.2f}% (epoch {best['epoch']}); outputs in {self.folder}")
        return summary

    def _write_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Write the arrays that the release writes; return the penalised weights and their lam as vectors."""
        weights = flatten(self.penalty.penalized).numpy()
        lambdas = flatten(self.penalty.lambdas).numpy() if self.penalty.lambdas else np.empty(0, np.float32)
        arrays = {"conv_params": weights, "reg_params": lambdas}
        for split, key in (("train", "train"), ("test", self.held_out)):
            arrays[f"{split}_accs"] = np.array([row[f"{key}_top1"] for row in self.history])
            arrays[f"{split}_losses"] = np.array([row[f"{key}_loss"] for row in self.history])
        for name, array in arrays.items():
            with atomic_write(self.folder / f"{name}.npy") as file:
                np.save(file, array, allow_pickle=False)
        return weights, lambdas

    def _test_best(self) -> dict:
        """With held-out images, evaluate the best epoch's weights on the test images, once."""
        if self.held_out == "test" or self.args.no_test:
            return {}
        path = self.folder / "model_best.pth.tar"
        result = evaluate_checkpoint(path, self.model, self.data, self.device, args=self.args)
        return {"test_of_best": result}


def make_lambda_sgd(penalty: Penalty, weights: SGD, args: argparse.Namespace) -> list[LambdaSGD]:
    """Return the optimizer of lam, in the fastest form there is here; none if nothing is learned, or lam is frozen."""
    if not any(lam.requires_grad for lam in penalty.parameters()):
        return []
    factors = {"lr": args.reg_lr, "momentum": args.momentum, "weight_decay": args.reg_wd}
    if not isinstance(penalty, HALO):
        return [LambdaSGD(penalty, **factors)]
    on_cpu = next(penalty.parameters()).device.type == "cpu"  # where the kernel is faster
    # With fp16, whether the weights are stepped is decided after lam is.
    weights = None if args.amp == "fp16" else weights
    optimizer = FusedHALO(penalty, **factors, weights=weights, compiled=args.compile and not on_cpu)
    if optimizer.slow_because:
        warn(f"HALO's step goes without its compiled kernel and takes longer: {optimizer.slow_because}")
    return [optimizer]


def make_loader(
    data: Dataset,
    split: str,
    device: torch.device,
    *,
    arch: str,
    batch_size: int,
    generator: torch.Generator | None = None,
    only: torch.Tensor | None = None,
) -> Loader:
    """Return this process's share of the batches of one split, on the device.

    Args:
        data: the images.
        split: "train", "val" or "test".
        device: where the network is.
        arch: the architecture, whose layout the batches have.
        batch_size: images a batch, over all processes.
        generator: shuffles and augments; None for the images in order, as they are.
        only: positions of the images to take; None for all.
    """
    images = getattr(data, split)
    if only is not None:
        images = Split(images.images[only], images.labels[only])
    images = images.to(device)
    layout, share = memory_format(arch, device), {"rank": rank(), "processes": processes()}
    return Loader(images, data, batch_size=batch_size, generator=generator, memory_format=layout, **share)


def memory_format(arch: str, device: torch.device) -> torch.memory_format:
    """Return the layout of images and convolutions in which this architecture is fastest on this device."""
    on_cpu = device.type == "cpu"  # nothing else was measured
    return torch.channels_last if on_cpu and ARCHS[arch].channels_last else torch.contiguous_format


def evaluate_checkpoint(
    path: str | Path, model: nn.Module, data: Dataset, device: torch.device, *, args: argparse.Namespace
) -> dict:
    """Load a checkpoint into the network and evaluate it on the test images.

    Returns:
        `loss`, `top1` and `top5` (percent), and the `epoch` of the checkpoint.

    Raises:
        CheckpointError: the file is unusable or of another network.
    """
    state = load_checkpoint(path)
    load_weights(model, state["state_dict"], path=path)
    loader = make_loader(data, "test", device, arch=args.arch, batch_size=args.test_batch)
    result = evaluate(model, loader, device=device)
    return result | {"epoch": state.get("epoch")}


def train_or_evaluate(args: argparse.Namespace, *, kind: Callable[..., Experiment] = Experiment) -> dict:
    """Do what the options of a training script say: train, resume, or with --evaluate only evaluate.

    Args:
        args: the options, after `options.resolve`.
        kind: makes the experiment from what `Experiment` takes; another one may change what an epoch does.

    Returns:
        The content of summary.json; with --evaluate, `loss`, `top1`, `top5` and `epoch`.

    Raises:
        OptionError: --train_batch has no image for one of the processes.
    """
    device = choose_device(args.device)
    if args.train_batch < processes():
        raise OptionError(f"--train_batch {args.train_batch} is shared by {processes()} processes: give at least that")
    generator = set_seed(args.seed)
    with process_group(device):
        with main_first():
            if is_main() and not args.evaluate:
                prepare_folder(Path(args.save_dir), resume=args.resume, overwrite=args.overwrite)
            data = load_dataset(args.dataset, args.data, shape=ARCHS[args.arch].shape, val_split=args.val_split)
        model = build_model(args.arch, len(data.classes), args.depth)
        model.to(device, memory_format=memory_format(args.arch, device))
        if not args.evaluate:
            return train(args, data, model, device=device, generator=generator, kind=kind)
        result = evaluate_checkpoint(args.resume, model, data, device, args=args)
        say(f"{args.resume}: test loss {result['loss']:.4f}  top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%")
        return result


def train(
    args: argparse.Namespace,
    data: Dataset,
    model: nn.Module,
    *,
    device: torch.device,
    generator: torch.Generator,
    kind: Callable[..., Experiment] = Experiment,
) -> dict:
    """Train a network as the options say; see Experiment.

    Returns:
        The content of summary.json.
    """
    coefficients = {"xi": args.xi, "psi": args.psi, "lambda_init": args.lambda_init}
    penalty = make_penalty(args.penalty, penalized_parameters(model, linear=ARCHS[args.arch].linear), **coefficients)
    experiment = kind(args, data, model, penalty, device=device, generator=generator)
    if args.resume:
        experiment.load(args.resume)
    elif is_main():
        clear_run(experiment.folder)
    if is_main():
        write_json(experiment.folder / "config.json", describe(args, device))
    return experiment.run()
