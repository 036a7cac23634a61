"""One epoch of a run and its row in log.csv."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import TYPE_CHECKING

import torch

from utils.distributed import average_buffers_, rank
from utils.logger import BatchBar, clock
from utils.seeds import seed_others
from utils.training.epoch import NonFiniteLossError, evaluate, train_one_epoch
from utils.training.meters import Metrics
from utils.training.statistics import near_zero, penalty_statistics
from utils.training.zeros import sparsity

if TYPE_CHECKING:
    from utils.training.experiment import Experiment


def seconds_an_epoch(run: Experiment) -> float | None:
    """Return how long an epoch takes, evaluation included: the median of the last five; None before the first."""
    return median(row["seconds"] for row in run.history[-5:]) if run.history else None


def time_left(run: Experiment, elapsed: float, done: int) -> tuple[float, float]:
    """Return the seconds until the epoch and the whole run will be done.

    Args:
        run: the run.
        elapsed: seconds since the epoch began.
        done: batches done in it, at least 1.
    """
    whole = elapsed / done * len(run.train_loader)
    later = run.args.epochs - run.epoch - 1
    return whole - elapsed, whole - elapsed + later * (seconds_an_epoch(run) or whole)


def _train(run: Experiment, start: float) -> dict[str, float]:
    """Train for one epoch, which began at `start`, under a bar; return its means."""
    bar = BatchBar(f"epoch {run.epoch + 1}/{run.args.epochs}", len(run.train_loader))

    def show(done: int, metrics: Metrics) -> None:
        if metrics.count and bar.wants(done):
            epoch, whole = time_left(run, time.perf_counter() - start, done)
            so_far = metrics.means()
            times = f"ETA {clock(epoch)}" + (f", run {clock(whole)}" if run.args.epochs > 1 else "")
            bar.update(done, [times, f"loss {so_far['loss']:.3f}", f"top-1 {so_far['top1']:.1f}%"])

    try:
        return train_one_epoch(
            run.model,
            run.train_loader,
            run.penalty,
            *run.optimizers,
            device=run.device,
            forward=run.forward,
            precision=run.precision,
            zeros=run.zeros,
            recorded=run.recorded,
            on_batch=show,
        )
    finally:
        bar.clear()


def run_epoch(run: Experiment) -> dict:
    """Train and evaluate once; return the row for log.csv. Nothing is written.

    Raises:
        NonFiniteLossError: the loss is infinite or NaN, in training or on the held-out images.
    """
    seed_others(run.args.seed, run.epoch, rank())
    start, lrs = time.perf_counter(), [scheduler.get_last_lr()[0] for scheduler in run.schedulers]
    train = _train(run, start)
    average_buffers_(run.model)
    training_seconds = time.perf_counter() - start
    for scheduler in run.schedulers:
        scheduler.step()
    held_out = evaluate(run.model, run.held_out_loader, device=run.device)
    if not math.isfinite(held_out["loss"]):
        raise NonFiniteLossError(f"the {run.held_out} loss after it is {held_out['loss']}: lower --lr")
    with torch.no_grad():
        penalty = run.penalty().item()
    return {
        "epoch": run.epoch + 1,
        "lr": lrs[0],
        "reg_lr": lrs[1] if len(lrs) > 1 else "",
        "train_loss": train["loss"],
        "train_loss_penalized": train["loss"] + penalty,
        "train_top1": train["top1"],
        "train_top5": train["top5"],
        **{f"{run.held_out}_{key}": value for key, value in held_out.items()},
        **near_zero(run.penalty.penalized),
        **sparsity(run),
        **penalty_statistics(run.penalty, run.zeros.masks if run.zeros else None),
        "seconds": time.perf_counter() - start,
        "images_per_second": len(run.data.train.labels) / training_seconds,
    }
