"""Run a study: tune every method on held-out images, then measure the chosen ones on the test images.

    python reproduce.py mnist_lenet300 --data data --jobs 2     # results/studies/mnist_lenet300.json
    python reproduce.py mnist_lenet300 --dry_run                # what would run, and how long it would take
    python reproduce.py --list

Stop it whenever you like: the same command goes on where it was. Leaves in --out (default runs/studies/<study>)
a folder for every run, chosen.json, table.md, table.csv, accuracy_vs_sparsity.png and pareto.png.
"""

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

import argparse
import dataclasses
import os
import shlex
import time
from pathlib import Path

from utils import options
from utils.command_line import option
from utils.files.lock import folder_lock
from utils.logger import duration, say
from utils.run import portable_path, require_writable, run_script
from utils.studies.checks import check_numbers
from utils.studies.jobs import Job, final_jobs, require_same_options, run_jobs, save_choice, tuning_jobs
from utils.studies.progress import Progress, committed_seconds, to_come
from utils.studies.report import write_report
from utils.studies.study import Study, load_study

STUDIES = Path(__file__).resolve().parent / "results" / "studies"


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    parser.add_argument("study", metavar="STUDY", nargs="?", help="name of a study, or path of a study file")
    parser.add_argument("--list", action="store_true", help="list the studies and stop")
    parser.add_argument("--dry_run", action="store_true", help="say what would run and how long it would take")
    parser.add_argument(
        "--seeds",
        type=options.whole(0, high=options.MOST_SEED),
        nargs="+",
        metavar="N",
        help="seeds (default: the study's)",
    )
    parser.add_argument("--jobs", type=options.whole(1), metavar="N", help="runs at a time (default: one a core)")
    parser.add_argument("--out", metavar="DIR", help="the outputs (default: runs/studies/<study>)")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder that holds the images")
    return parser


def list_studies() -> dict:
    """Print the studies there are; return their titles by name."""
    titles = {path.stem: load_study(path).title for path in sorted(STUDIES.glob("*.json"))}
    for name, title in titles.items():
        say(f"{name:<20}{title}")
    return titles


def full_command(args: argparse.Namespace) -> str:
    """Return the command that repeats a study here or on another machine, for its table; DIR stands for the images."""
    parts = ["python", "reproduce.py", portable_path(args.study), "--data", "DIR"]
    parts += option("--out", portable_path(args.out)) if args.out else []
    parts += ["--jobs", str(args.jobs)] if args.jobs else []
    parts += ["--seeds", *map(str, args.seeds)] if args.seeds else []
    return shlex.join(parts)


def run_phase(jobs: list[Job], out: Path, *, processes: int, guess: float | None) -> None:
    """Run what is not done of some jobs, once it is clear that what is done belongs to them."""
    for job in jobs:
        require_same_options(job)
    progress = Progress(jobs, out, processes=processes, guess=guess)
    for number, (job, seconds) in enumerate(run_jobs(progress.left, processes=processes), start=1):
        progress.add(job, seconds, number)


def dry_run(study: Study, out: Path, data: str, *, processes: int) -> dict:
    """Say what would run; return the numbers of runs."""
    guess = committed_seconds(study)
    tuning = Progress(tuning_jobs(study, out, data), out, processes=processes, guess=guess)
    say(f"{study.name}: {study.title}")
    count = f"{len(tuning.jobs)} runs, {len(tuning.left)} to do, {len(tuning.untrained)} to train"
    say(f"tuning: {count}, {tuning.estimate()}")
    final = Progress(final_jobs(study, out, data), out, processes=processes, guess=guess)
    if tuning.left:
        fewest, most = to_come(study, out)
        count = f"{fewest} to {most}" if fewest < most else f"{most}"
        say(f"then {count} more to train, with the chosen coefficients")
    else:
        count = f"{len(final.jobs)} runs, {len(final.left)} to do, {len(final.untrained)} to train"
        say(f"chosen: {count}, {final.estimate()}")
    return {"tuning": len(tuning.left), "final": None if tuning.left else len(final.left)}


def main(args: argparse.Namespace) -> dict:
    """Run the study, or say what would run.

    Returns:
        The rows of table.csv by scheme; with --list or --dry_run what they print.
    """
    if args.list:
        return list_studies()
    if args.study is None:
        raise options.OptionError("name a study, such as mnist_lenet300; --list shows those there are")
    path = Path(args.study) if args.study.endswith(".json") else STUDIES / f"{args.study}.json"
    study = load_study(path)
    if args.seeds:
        check_numbers("--seeds", args.seeds, low=0, high=options.MOST_SEED, whole=True)
        study = dataclasses.replace(study, seeds=tuple(args.seeds))
    out = Path(args.out or f"runs/studies/{study.name}")
    processes = args.jobs or os.cpu_count() or 1
    if args.dry_run:
        return dry_run(study, out, args.data, processes=processes)
    require_writable(out, make=True)
    start = time.perf_counter()
    guess = committed_seconds(study)
    with folder_lock(out, remedy="choose another --out"):
        try:
            run_phase(tuning_jobs(study, out, args.data), out, processes=processes, guess=guess)
            save_choice(study, out)
            run_phase(final_jobs(study, out, args.data), out, processes=processes, guess=guess)
        except KeyboardInterrupt as error:
            raise type(error)(f"stopped; the same command goes on, {out} holds what is done") from error
        finally:
            rows = write_report(study, out, command=full_command(args))
    say(f"{duration(time.perf_counter() - start)}; {out}/table.md, table.csv, accuracy_vs_sparsity.png, pareto.png")
    return rows


if __name__ == "__main__":
    run_script(main, get_parser())
