"""The jobs of a study: train, prune, measure; side by side, skipping what is done, continuing what was stopped."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.interrupts import deaf_children
from utils.run import write_json
from utils.stages.prune import prune_and_evaluate
from utils.studies.measurements import read_measurement, read_summary
from utils.studies.study import CONTROLS, Config, Study, choose, pruning_arguments, run_folder, training_arguments
from utils.training.epoch import NonFiniteLossError
from utils.training.experiment import train_or_evaluate
from utils.training.state import FREE_ON_RESUME


@dataclass(frozen=True)
class Job:
    """One run to train, and what to measure on it.

    Attributes:
        study: it belongs to this.
        config: method and coefficients.
        seed: of the run.
        out: folder of the study's outputs.
        data: folder of the images.
        percent: fractions to remove.
        images: "val" to measure on the held-out images, "test" on the test images.
        schemes: how to prune.
    """

    study: Study
    config: Config
    seed: int
    out: Path
    data: str
    percent: tuple[float, ...]
    images: str
    schemes: tuple[str, ...] = ("global",)

    @property
    def folder(self) -> Path:
        """Where the run and its measurements go."""
        return run_folder(self.out, self.config, self.seed)

    def measurement(self, scheme: str) -> Path:
        """Return the folder of one measurement."""
        return self.folder / (self.images if scheme == "global" else f"{self.images}_{scheme}")

    @property
    def done(self) -> bool:
        """Whether there is nothing to do: all is measured, or the run diverged."""
        folders = [self.measurement(scheme) for scheme in self.schemes]
        return (self.folder / "failed.json").exists() or all(is_measured(f, self.percent) for f in folders)

    def __str__(self) -> str:
        return f"{self.config.method} {self.config.name} seed {self.seed}, {self.images}"


def tuning_jobs(study: Study, out: Path, data: str) -> list[Job]:
    """Return the jobs that measure every configuration on the held-out images."""
    pairs = [(config, seed) for seed in study.tune_seeds for config in study.configs]
    return [Job(study, config, seed, out, data, study.percent, "val") for config, seed in pairs]


def final_jobs(study: Study, out: Path, data: str) -> list[Job]:
    """Return the jobs that measure the chosen configurations on the test images, each only where it was chosen."""
    jobs = []
    for method, choice in choose(study, out).items():
        schemes = ("global", *(CONTROLS if method in study.controls else ()))
        for config in dict.fromkeys(choice.values()):
            percent = tuple(ratio for ratio in study.percent if choice[ratio] == config)
            jobs += [Job(study, config, seed, out, data, percent, "test", schemes) for seed in study.seeds]
    return sorted(jobs, key=lambda job: job.seed)  # so that a study that is cut short has some of each


def run_job(job: Job) -> float:
    """Do what is not done of a job; return the seconds it took. What it says goes to log.txt."""
    start = time.perf_counter()
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            training = train(job)
            for scheme in job.schemes:
                measure(training, job.measurement(scheme), percent=job.percent, scheme=scheme, images=job.images)
        except NonFiniteLossError as error:
            write_json(job.folder / "failed.json", {"reason": str(error)})
    return time.perf_counter() - start


def train(job: Job) -> argparse.Namespace:
    """Train the run unless it is trained (again if its network was deleted to save space); return its options."""
    args = training_arguments(job.study, job.config, seed=job.seed, folder=job.folder, data=job.data)
    if not is_trained(job.folder / "run"):
        train_or_evaluate(args)
    return args


def is_trained(folder: Path) -> bool:
    """Return whether a folder holds a finished run and its network."""
    return all((folder / name).exists() for name in ("summary.json", "final.pth.tar"))


def require_same_options(job: Job) -> None:
    """Make sure that what a folder holds, measured or not, is of this study.

    Raises:
        ValueError: it was trained with other options.
    """
    summary = read_summary(job.folder / "run" / "summary.json")
    if summary is None:
        return
    args = training_arguments(job.study, job.config, seed=job.seed, folder=job.folder, data=job.data)
    was, now = summary["arguments"], vars(args)
    changed = [key for key in was if key not in FREE_ON_RESUME - {"epochs"} and was[key] != now.get(key)]
    if changed:
        raise ValueError(
            f"{job.folder} was trained with {changed[0]} {was[changed[0]]}, the study now says {now.get(changed[0])}: "
            "give another --out, or remove the folder"
        )


def is_measured(folder: Path, percent: tuple[float, ...]) -> bool:
    """Return whether a folder holds the accuracies at all of these ratios."""
    report = read_measurement(folder / "prune.json")
    return report is not None and {r["asked"] for r in report["results"]} >= set(percent)


def measure(
    training: argparse.Namespace, folder: Path, *, percent: tuple[float, ...], scheme: str, images: str
) -> None:
    """Prune a trained run and evaluate it, unless that is done; keep the numbers, not the pruned networks.

    Args:
        training: the options of the run.
        folder: where the numbers go.
        percent, scheme, images: as in `utils.studies.study.pruning_arguments`.
    """
    if is_measured(folder, percent):
        return
    prune_and_evaluate(pruning_arguments(training, percent=percent, scheme=scheme, images=images, folder=folder))
    for path in folder.glob("pruned_*.pth.tar"):
        path.unlink()


def prepare_worker(threads: int) -> None:
    """Set a worker process up: its share of the cores, no Ctrl-C of its own, and an end when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """End this process, at once, when the one that started it is gone: nobody would wait for its results."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def run_jobs(jobs: list[Job], *, processes: int) -> Iterator[tuple[Job, float]]:
    """Run jobs side by side; yield each with its seconds when it is done.

    Args:
        jobs: what to do.
        processes: how many at a time; the cores are shared equally between them.

    Raises:
        OSError: a worker process was lost.
        KeyboardInterrupt: Ctrl-C; the workers are ended.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=prepare_worker, initargs=(threads,))
    try:
        with deaf_children():
            waiting = {pool.submit(run_job, job): job for job in jobs}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenProcessPool as error:
        raise OSError("a worker process was lost (killed, or out of memory); the same command continues") from error
    finally:
        for worker in multiprocessing.active_children():
            worker.terminate()
        pool.shutdown(cancel_futures=True)


def save_choice(study: Study, out: Path) -> None:
    """Write chosen.json: for each method and ratio the coefficients that were best on the held-out images."""
    choice = choose(study, out)
    content = {m: {f"{ratio:g}": dict(c.coefficients) for ratio, c in of.items()} for m, of in choice.items()}
    write_json(out / "chosen.json", content)
