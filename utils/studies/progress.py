"""How far a study is: what is done, what is to train, and how long that may take."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from utils.logger import duration, say
from utils.paths import REPOSITORY
from utils.run import read_json, write_json
from utils.studies.jobs import Job, final_jobs, is_trained, jobs_before, tuning_jobs
from utils.studies.measurements import read_accuracies, read_seconds
from utils.studies.methods import Config
from utils.studies.study import Study, run_folder, training_arguments

LEAST_SHARE = 0.5  # of a run's epochs: the seconds of fewer, beginning and measuring included, tell little


def committed_seconds(study: Study) -> float | None:
    """Return the mean seconds of a run in the committed table of a study; None where there is none for this machine."""
    folder = REPOSITORY / "results" / "replication" / study.name
    path = folder / "table.csv"
    devices = [read_json(summary).get("device", "cpu") for summary in folder.glob("*/*/seed*/run/summary.json")]
    if not path.exists() or (any("cuda" in device for device in devices) and not torch.cuda.is_available()):
        return None
    with open(path, newline="") as file:
        runs = {(row["method"], row["coefficients"]): row["seconds"] for row in csv.DictReader(file)}
    known = [float(seconds) for seconds in runs.values() if seconds]
    return mean(known) if known else None


def is_to_train(study: Study, out: Path, config: Config, seed: int) -> bool:
    """Tell whether a run that will be chosen has yet to be trained; tuning will have trained those of its seeds."""
    return seed not in study.tune_seeds and not is_trained(run_folder(out, config, seed) / "run")


def to_come(study: Study, out: Path) -> tuple[int, int]:
    """Return how many runs training the chosen coefficients will take, at least and at most.

    Where a method is not tuned yet: at least if its ratios share what can be shared with the most finished runs, at
    most if each has its own.
    """
    fewest = most = 0
    for method in study.methods:
        own = replace(study, configs=tuple(study.of_method(method)))
        if all(job.done for job in tuning_jobs(own, out, "")):
            jobs = final_jobs(own, out, "")
            low = high = sum(not (job.done or job.trained) for job in [*jobs_before(jobs), *jobs])
        else:
            low, high = _before_tuning(own, out)
        fewest, most = fewest + low, most + high
    return fewest, most


def _before_tuning(study: Study, out: Path) -> tuple[int, int]:
    """Return what `to_come` does, of one method whose coefficients are not chosen yet."""

    def left(runs: Iterable[Config]) -> list[int]:
        return sorted(sum(is_to_train(study, out, run, seed) for seed in study.seeds) for run in runs)

    ratios = [ratio for own in study.configs[0].runs(study.percent).values() for ratio in own]
    if study.configs[0].kind == "once":
        each = left(study.configs)
        return each[0], sum(each[-len(ratios) :])
    own = [left(config.at(ratio) for config in study.configs) for ratio in ratios]
    before = left({config.before for config in study.configs} - {None}) or [0]
    fewest, most = sum(each[0] for each in own), sum(each[-1] for each in own)
    return fewest + (before[0] if fewest else 0), most + sum(before[-len(ratios) :])


def share_left(job: Job) -> float:
    """Return the share of a run's epochs that are still to train: it goes on from its checkpoint, if there is one."""
    folder = job.folder / "run"
    try:
        rows = len((folder / "log.csv").read_text(errors="replace").splitlines()) - 1
    except OSError:
        return 1.0
    if not (folder / "checkpoint.pth.tar").exists():  # its network was deleted, so it is trained again
        return 1.0
    epochs = training_arguments(job.study, job.config, seed=job.seed, folder=job.folder, data=job.data).epochs
    return 1 - min(max(rows, 0) / epochs, 1)


class Progress:
    """Counts what is done of a phase and estimates the rest: training takes the time, pruning hardly any.

    Args:
        jobs: of the phase.
        out: folder of the outputs, which keeps the seconds of earlier runs.
        processes: runs at a time.
        guess: seconds of a run where none was finished yet, from committed measurements.
        part: of the study, for the name of its own file of seconds; others write theirs at the same time.
    """

    def __init__(
        self, jobs: list[Job], out: Path, *, processes: int, guess: float | None = None, part: str = ""
    ) -> None:
        self.jobs, self.path, self.processes = jobs, out / f"seconds{part}.json", processes
        self.left, self.guess, self.added = [job for job in jobs if not job.done], guess, 0
        self.untrained = {job: share_left(job) for job in self.left if not job.trained}
        self.mine = read_seconds(self.path)
        self.seconds = {key: value for path in out.glob("seconds*.json") for key, value in read_seconds(path).items()}

    def estimate(self) -> str:
        """Say how long the runs to train will take, going by the mean of those trained here, else by the guess."""
        each = mean(self.seconds.values()) if self.seconds else self.guess
        if each is None:
            return "unknown time (no run was timed on such a machine yet)"
        shares = [job.config.part * share_left(job) for job in self.untrained]  # of the epochs of the study
        epochs = max(sum(shares) / self.processes, max(shares, default=0))
        source = "" if self.seconds else ", by the runs of results/replication"
        return f"about {duration(epochs * each)}{source}"

    def add(self, job: Job, seconds: float | None) -> None:
        """Record a finished job and say so; without seconds it was done elsewhere, or given up."""
        self.added += 1
        share = self.untrained.pop(job, 0)
        failed = read_json(job.folder / "failed.json")
        if seconds is not None and share >= LEAST_SHARE and not failed:
            whole = seconds / (job.config.part * share)  # as of a run of all epochs
            self.mine[str(job)] = self.seconds[str(job)] = whole
            write_json(self.path, self.mine)
        accuracies = read_accuracies(job.measurement("global") / "prune.json")
        text = ", ".join(f"{ratio:g}: {value:.2f}" for ratio, value in accuracies.items()) or "trained"
        if failed:
            text = f"failed ({failed['reason']})"
        took = f"; {seconds:.0f} s" if seconds is not None else ""
        left = len(self.left) - self.added
        say(f"[{len(self.jobs) - left}/{len(self.jobs)}] {job}: {text}{took}; {self.estimate()} left of this phase")
