"""The jobs of a study: train, prune, measure; skipping what is done, continuing what was stopped."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from utils.files.lock import folder_lock, holder_of, wait_for
from utils.logger import say
from utils.run import read_json, write_json
from utils.stages.prune import prune_and_evaluate
from utils.studies.measurements import read_measured, read_summary
from utils.studies.methods import Config
from utils.studies.study import CONTROLS, Study, choose, pruning_arguments, run_folder, training_arguments
from utils.training.epoch import NonFiniteLossError
from utils.training.experiment import Experiment, train_or_evaluate
from utils.training.state import FREE_ON_RESUME, KEPT_ON_RESUME


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
        schemes: how to prune; none for a network that is only trained, for others to go on from.
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
        """Whether there is nothing to do: all is measured, or the run failed."""
        if self.failed:
            return True
        folders = [self.measurement(scheme) for scheme in self.schemes]
        return all(is_measured(f, self.percent) for f in folders) if folders else self.trained

    @property
    def failed(self) -> bool:
        """Whether the run diverged or was given up; before its cut only as long as what it goes on from has failed."""
        failed, before = read_json(self.folder / "failed.json"), self.before
        return failed is not None and not (before and failed.get("before_cut") and not before.failed)

    @property
    def trained(self) -> bool:
        """Whether the run is finished and its network there."""
        return is_trained(self.folder / "run")

    @property
    def before(self) -> Job | None:
        """The job that trains the network which this one goes on from; None where it begins anew."""
        config = self.config.before
        return replace(self, config=config, percent=(), images="val", schemes=()) if config else None

    def __str__(self) -> str:
        what = self.images if self.schemes else "before the cut"
        return f"{self.config.method} {self.config.name} seed {self.seed}, {what}"


def tuning_jobs(study: Study, out: Path, data: str) -> list[Job]:
    """Return the jobs that measure every configuration on the held-out images."""
    runs = {run: ratios for config in study.configs for run, ratios in config.runs(study.percent).items()}
    pairs = [(seed, run) for seed in study.tune_seeds for run in runs]
    return [Job(study, run, seed, out, data, runs[run], "val") for seed, run in pairs]


def jobs_before(jobs: list[Job]) -> list[Job]:
    """Return the jobs whose networks some others still have to go on from; those of several ratios share one."""
    return list(dict.fromkeys(job.before for job in jobs if job.before and not (job.done or job.trained)))


def final_jobs(study: Study, out: Path, data: str) -> list[Job]:
    """Return the jobs that measure the chosen configurations on the test images, each only where it was chosen."""
    jobs = []
    for method, choice in choose(study, out).items():
        schemes = ("global", *(CONTROLS if method in study.controls else ()))
        for config in dict.fromkeys(choice.values()):
            percent = tuple(ratio for ratio in study.percent if choice.get(ratio) == config)
            jobs += [Job(study, config, seed, out, data, percent, "test", schemes) for seed in study.seeds]
    return sorted(jobs, key=lambda job: job.seed)  # so that a study that is cut short has some of each


def run_job(job: Job, *, kind: Callable[..., Experiment] = Experiment) -> float | None:
    """Do what is not done of a job, alone in its folder. What it says goes to log.txt.

    Args:
        job: what to do; if another process is at it, that is waited for.
        kind: makes the experiment, as in `utils.training.experiment.train_or_evaluate`.

    Returns:
        The seconds it took; None if whoever was waited for has done it.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(job.folder / "log.txt", "a"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        stack.enter_context(folder_lock(job.folder, on_wait=say))
        wait_for(job.folder / "run", on_wait=say)  # of a lost machine: its last sign of life is another, or it is alone
        start = time.perf_counter()
        if job.done:
            return None
        (job.folder / "failed.json").unlink(missing_ok=True)
        try:
            training = train(job, kind=kind)
            for scheme in job.schemes:
                what = {"percent": job.percent, "scheme": scheme, "images": job.images}
                measure(training, job.measurement(scheme), of="all" if job.config.ratio else "nonzero", **what)
        except NonFiniteLossError as error:
            record_failure(job, str(error))
    return time.perf_counter() - start


def record_failure(job: Job, reason: str) -> None:
    """Write failed.json: why a job is not to be tried again, with which options, and whether it got beyond its cut."""
    args = training_arguments(job.study, job.config, seed=job.seed, folder=job.folder, data=job.data)
    before_cut = bool(job.before and job.before.failed)
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / "failed.json", {"reason": reason, "before_cut": before_cut, "arguments": vars(args)})


def train(job: Job, *, kind: Callable[..., Experiment] = Experiment) -> argparse.Namespace:
    """Train the run unless it is trained (again if its network was deleted to save space); return its options."""
    args = training_arguments(job.study, job.config, seed=job.seed, folder=job.folder, data=job.data)
    if not job.trained:
        if job.before and not args.resume:
            args.start = args.mask = str(cut(job))
        train_or_evaluate(args, kind=kind)
        shutil.rmtree(job.folder / "cut", ignore_errors=True)  # the checkpoint holds its zeros
    return args


def cut(job: Job) -> Path:
    """Prune the network that a job goes on from; return the file.

    Raises:
        NonFiniteLossError: its training diverged.
    """
    before, ratio = job.before, job.config.ratio
    failed = before.folder / "failed.json"
    if before.failed:
        raise NonFiniteLossError(f"before the cut ({failed.relative_to(job.out)}), {read_json(failed)['reason']}")
    training = training_arguments(job.study, before.config, seed=job.seed, folder=before.folder, data=job.data)
    what = {"percent": (ratio,), "of": "all", "scheme": "global", "images": "val"}
    prune_and_evaluate(pruning_arguments(training, **what, folder=job.folder / "cut"))
    return job.folder / "cut" / f"pruned_{ratio:g}.pth.tar"


def is_trained(folder: Path) -> bool:
    """Return whether a folder holds a finished run and its network."""
    return all((folder / name).exists() for name in ("summary.json", "final.pth.tar"))


def has_lost_its_options(folder: Path) -> bool:
    """Tell whether the folder of a run holds its measurements, and nothing of the run that they are of.

    A run that just begins again, since its network was deleted, has none of its files for a moment, but is held.
    """
    run = folder / "run"
    if holder_of(run / ".lock"):
        return False
    begun = any((run / name).exists() for name in ("init.pth.tar", "checkpoint.pth.tar", "final.pth.tar"))
    return not begun and any(path.parent.name != "cut" for path in folder.glob("*/prune.json"))


def require_same_options(job: Job) -> None:
    """Make sure that what a folder holds, measured or not, is of this study.

    Raises:
        ValueError: it was trained with other options, or was measured and does not say with which it was trained.
    """
    run = job.folder / "run"
    recorded = read_summary(run / "summary.json") or read_json(job.folder / "failed.json")
    if recorded is None and has_lost_its_options(job.folder):
        raise ValueError(f"{job.folder} has lost its run/summary.json: bring it back, or remove the folder")
    if recorded is None and (run / "checkpoint.pth.tar").exists():  # it is to go on
        recorded = read_json(run / "config.json")
    if not (recorded or {}).get("arguments"):  # a failure of an older version
        return
    args = training_arguments(job.study, job.config, seed=job.seed, folder=job.folder, data=job.data)
    was, now = recorded["arguments"], vars(args)
    free = FREE_ON_RESUME - {"epochs"} | {key for key in KEPT_ON_RESUME if None in (was.get(key), now.get(key))}
    absent = {key for key in now if key not in was and (now[key] is None or now[key] is False)}  # of an older version
    changed = [key for key in was | now if key not in free | absent and was.get(key) != now.get(key)]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{job.folder} was trained with {key} {was.get(key)}, the study now says {now.get(key)}: "
            "give another --out, or remove the folder"
        )


def require_same_study(jobs: Iterable[Job]) -> None:
    """Do what `require_same_options` does for some jobs and for those before them."""
    for job in jobs:
        for some in filter(None, (job.before, job)):
            require_same_options(some)


def is_measured(folder: Path, percent: tuple[float, ...]) -> bool:
    """Return whether a folder holds the accuracies at all of these ratios."""
    report = read_measured(folder)
    return report is not None and {r["asked"] for r in report["results"]} >= set(percent)


def measure(
    training: argparse.Namespace, folder: Path, *, percent: tuple[float, ...], of: str, scheme: str, images: str
) -> None:
    """Prune a trained run and evaluate it, unless that is done; keep the numbers, not the pruned networks.

    Args:
        training: the options of the run.
        folder: where the numbers go.
        percent, of, scheme, images: as in `utils.studies.study.pruning_arguments`.
    """
    if is_measured(folder, percent):
        return
    what = {"percent": percent, "of": of, "scheme": scheme, "images": images}
    prune_and_evaluate(pruning_arguments(training, **what, folder=folder))
    remove_pruned(folder)


def remove_pruned(folder: Path) -> None:
    """Remove the pruned networks that a measurement has left, or one that was stopped."""
    for path in [*folder.glob("pruned_*.pth.tar"), *folder.glob(".pruned_*.tmp")]:
        path.unlink(missing_ok=True)


def remove_leftovers(job: Job) -> None:
    """Remove the networks that a job has no more use for when it is done: it may have been stopped just before."""
    for scheme in job.schemes:
        remove_pruned(job.measurement(scheme))
    shutil.rmtree(job.folder / "cut", ignore_errors=True)


def save_choice(study: Study, out: Path) -> None:
    """Write chosen.json: for each method and ratio the coefficients that were best on the held-out images."""
    choice = choose(study, out)
    content = {m: {f"{ratio:g}": dict(c.coefficients) for ratio, c in of.items()} for m, of in choice.items()}
    write_json(out / "chosen.json", content)
