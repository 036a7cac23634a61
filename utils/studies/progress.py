"""How far a study is: what is done, what is to train, and how long that may take."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

from utils.logger import duration, say
from utils.run import REPOSITORY, write_json
from utils.studies.jobs import Job, is_trained
from utils.studies.measurements import read_accuracies, read_seconds
from utils.studies.study import Config, Study, run_folder


def committed_seconds(study: Study) -> float | None:
    """Return the mean seconds of a run in the committed table of a study; None where there is none."""
    path = REPOSITORY / "results" / "replication" / study.name / "table.csv"
    if not path.exists():
        return None
    with open(path, newline="") as file:
        runs = {(row["method"], row["coefficients"]): float(row["seconds"]) for row in csv.DictReader(file)}
    return mean(runs.values()) if runs else None


def is_to_train(study: Study, out: Path, config: Config, seed: int) -> bool:
    """Tell whether a run that will be chosen has yet to be trained; tuning will have trained those of its seeds."""
    return seed not in study.tune_seeds and not is_trained(run_folder(out, config, seed) / "run")


def to_come(study: Study, out: Path) -> tuple[int, int]:
    """Return how many runs training the chosen coefficients will take, at least and at most, before they are chosen.

    At least where all ratios share the coefficients with the most finished runs, at most where each has its own.
    """
    fewest = most = 0
    for method in study.methods:
        configs = study.of_method(method)
        left = sorted(sum(is_to_train(study, out, config, seed) for seed in study.seeds) for config in configs)
        fewest, most = fewest + left[0], most + sum(left[-len(study.percent) :])
    return fewest, most


class Progress:
    """Counts what is done of a phase and estimates the rest: training takes the time, pruning hardly any.

    Args:
        jobs: of the phase.
        out: folder of the outputs, which keeps the seconds of earlier runs.
        processes: runs at a time.
        guess: seconds of a run where none was finished yet, from committed measurements.
    """

    def __init__(self, jobs: list[Job], out: Path, *, processes: int, guess: float | None = None) -> None:
        self.jobs, self.path, self.processes = jobs, out / "seconds.json", processes
        self.left, self.guess = [job for job in jobs if not job.done], guess
        self.untrained = {job for job in self.left if not is_trained(job.folder / "run")}
        self.seconds = read_seconds(self.path)

    def estimate(self) -> str:
        """Say how long the runs to train will take, going by the mean of those trained here, else by the guess."""
        each = mean(self.seconds.values()) if self.seconds else self.guess
        if each is None:
            return "unknown time (no run is finished yet)"
        source = "" if self.seconds else ", by the runs of results/replication"
        return f"about {duration(len(self.untrained) * each / self.processes)}{source}"

    def add(self, job: Job, seconds: float, number: int) -> None:
        """Record a finished job and say so."""
        if job in self.untrained:
            self.untrained.remove(job)
            self.seconds[str(job)] = seconds
            write_json(self.path, self.seconds)
        accuracies = read_accuracies(job.measurement("global") / "prune.json")
        text = ", ".join(f"{ratio:g}: {value:.2f}" for ratio, value in accuracies.items()) or "diverged"
        left = len(self.left) - number
        say(f"[{len(self.jobs) - left}/{len(self.jobs)}] {job}: {text}; {seconds:.0f} s; {self.estimate()} left")
