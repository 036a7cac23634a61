"""The files that a finished run leaves: network, arrays, figures, summary."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from models import with_depth
from utils import plot_lambda, plots
from utils.distributed import is_main, wait_for_all
from utils.files.atomic import atomic_write
from utils.files.checkpoint import save_checkpoint
from utils.logger import say
from utils.plot_style import WORDS
from utils.run import write_json
from utils.training import loading
from utils.training.announce import next_command
from utils.training.state import network_state
from utils.training.statistics import flatten, without_held

if TYPE_CHECKING:
    from utils.training.experiment import Experiment


def write_outputs(run: Experiment) -> dict:
    """Write final.pth.tar, the arrays, the figures and summary.json; return the summary.

    Raises:
        LockedError: another process has taken the folder over; it is left alone.
    """
    if run.lock:
        run.lock.require()
    last, best, top1 = run.history[-1], run.best, f"{run.held_out}_top1"
    summary = {
        "arguments": vars(run.args),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "penalized_parameters": sum(w.numel() for w in run.penalty.penalized.values()),
        "final": last,
        "best": {"epoch": best["epoch"], top1: best[top1]},
        "seconds": sum(row["seconds"] for row in run.history),
        "device": str(run.device),
    }
    if is_main():
        _write_final(run)
    summary |= test_best(run)  # last, for it puts the weights of another epoch into the network
    if not is_main():
        return summary
    summary["log_sha256"] = hashlib.sha256((run.folder / "log.csv").read_bytes()).hexdigest()
    write_json(run.folder / "summary.json", summary)
    result = f"{run.held_out} top-1 {last[top1]:.2f}% after {run.epoch} epochs"
    test = f"; its test top-1 {summary['test_of_best']['top1']:.2f}%" if "test_of_best" in summary else ""
    say(f"{result}; best {best[top1]:.2f}% (epoch {best['epoch']}){test}")
    say(f"outputs in {run.folder}; next, prune: {next_command(run.args, run.folder / 'final.pth.tar')}")
    return summary


def _write_final(run: Experiment) -> None:
    """Write and draw the network as it is after the last epoch."""
    save_checkpoint(run.folder / "final.pth.tar", network_state(run))
    write_arrays(run)
    held = run.zeros.masks if run.zeros else {}
    drawn = (_vector(without_held(t, held)) for t in (run.penalty.penalized, run.penalty.lambdas))
    with atomic_write(run.folder / "regularization.npz") as file:
        np.savez_compressed(file, **plot_lambda.histograms(*drawn))
    draw_curves(run.folder, run.history, vars(run.args))
    draw_regularization(run.folder, run.history[-1], vars(run.args))


def _name(arguments: Mapping) -> str:
    network = with_depth(arguments["arch"], arguments["depth"])
    coefficients = "".join(f", {key} {arguments[key]:g}" for key in ("xi", "psi") if arguments[key] is not None)
    penalty = "no penalty" if arguments["penalty"] == "none" else f"{WORDS[arguments['penalty']]}{coefficients}"
    return f"{arguments['dataset']}, {network}, {penalty}, seed {arguments['seed']}"


def draw_curves(folder: Path, history: Sequence[dict], arguments: Mapping) -> None:
    """Draw curves.png of a run from the rows of its log.csv and its options."""
    held_out = "val" if "val_top1" in history[-1] else "test"
    count = f" ({arguments['val_split']:,} images)" if held_out == "val" else ""
    title = f"{held_out} top-1{count} {history[-1][f'{held_out}_top1']:.2f}% after {len(history)} epochs"
    plots.plot_curves(history, folder / "curves.png", title=f"{title}\n{_name(arguments)}")


def draw_regularization(folder: Path, last: Mapping, arguments: Mapping) -> None:
    """Draw regularization.png of a run from its regularization.npz, the last row of its log.csv and its options."""
    still = tuple(arguments[key] for key in ("xi", "psi", "reg_wd")) if arguments["penalty"] == "halo" else None
    title = f"{plot_lambda.regularization_title(last)}\n{_name(arguments)}"
    with np.load(folder / "regularization.npz") as counts:
        plot_lambda.plot_regularization(counts, folder / "regularization.png", title=title, still=still)


def _vector(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Return tensors as one vector of numpy: bf16, which it lacks, as fp32; none as a vector of length 0."""
    if not tensors:
        return np.empty(0, np.float32)
    vector = flatten(tensors)
    return (vector.float() if vector.dtype is torch.bfloat16 else vector).cpu().numpy()


def write_arrays(run: Experiment) -> None:
    """Write the arrays that the release writes."""
    arrays = {"conv_params": _vector(run.penalty.penalized), "reg_params": _vector(run.penalty.lambdas)}
    for split, key in (("train", "train"), ("test", run.held_out)):
        arrays[f"{split}_accs"] = np.array([row[f"{key}_top1"] for row in run.history])
        arrays[f"{split}_losses"] = np.array([row[f"{key}_loss"] for row in run.history])
    for name, array in arrays.items():
        with atomic_write(run.folder / f"{name}.npy") as file:
            np.save(file, array, allow_pickle=False)


def test_best(run: Experiment) -> dict:
    """With held-out images, evaluate the best epoch's weights on the test images, once."""
    if run.held_out == "test" or run.args.no_test:
        return {}
    wait_for_all()  # until rank 0 has written the file
    path = run.folder / "model_best.pth.tar"
    result = loading.evaluate_checkpoint(path, run.model, run.data, run.device, args=run.args)
    return {"test_of_best": result}
