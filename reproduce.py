"""Run a study: tune every method on held-out images, then measure the chosen ones on the test images.

    python reproduce.py mnist_lenet300 --data data --jobs 2     # results/studies/mnist_lenet300.json
    python reproduce.py mnist_lenet300 --dry_run                # what would run, and how long it would take
    python reproduce.py mnist_lenet300 --out DIR --shard 1/4    # a quarter of it; the others on other machines
    python reproduce.py --list

Stop it whenever you like: the same command goes on where it was. Leaves in --out (default runs/studies/<study>)
a folder for every run, chosen.json, table.md, table.csv, accuracy_vs_sparsity.png and pareto.png.
"""

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

import argparse
import contextlib
import dataclasses
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from utils import options
from utils.command_line import option
from utils.files.lock import Lock
from utils.logger import duration, say
from utils.paths import REPOSITORY, portable_path
from utils.run import made_folder, run_script
from utils.studies.checks import check_numbers
from utils.studies.cluster import cluster_workers
from utils.studies.executors import Workers, local_workers, processes_here
from utils.studies.phases import dry_run, run_shard, run_study
from utils.studies.report import tables
from utils.studies.shards import Shard, parse_shard, study_lock
from utils.studies.study import load_study

STUDIES = REPOSITORY / "results" / "studies"


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    parser.add_argument("study", metavar="STUDY", nargs="?", help="name of a study, or path of a study file")
    parser.add_argument("--list", action="store_true", help="list the studies and stop")
    parser.add_argument("--dry_run", action="store_true", help="say what would run and how long it would take")
    seed = options.whole(0, high=options.MOST_SEED)
    parser.add_argument("--seeds", type=seed, nargs="+", metavar="N", help="seeds (default: the study's)")
    parser.add_argument("--jobs", type=options.whole(1), metavar="N", help="runs at a time (default: one a GPU/core)")
    text = "run the jobs on the workers of this Dask cluster (docs/many_machines.md)"
    parser.add_argument("--scheduler", metavar="ADDRESS", help=text)
    text = "do part I of N, the others elsewhere at the same time (docs/many_machines.md)"
    parser.add_argument("--shard", metavar="I/N", help=text)
    parser.add_argument("--out", metavar="DIR", help="the outputs (default: runs/studies/<study>)")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder that holds the images")
    return parser


def list_studies() -> dict:
    """Print the studies there are; return their titles by name."""
    titles = {path.stem: load_study(path).title for path in sorted(STUDIES.glob("*.json"))}
    for name, title in titles.items():
        say(f"{name:<{max(map(len, titles))}}  {title}")
    return titles


def full_command(args: argparse.Namespace) -> str:
    """Return the command that repeats a study here or on another machine, for its table; DIR stands for the images."""
    parts = ["python", "reproduce.py", portable_path(args.study), "--data", "DIR"]
    parts += option("--out", portable_path(args.out)) if args.out else []
    parts += ["--jobs", str(args.jobs)] if args.jobs else []
    parts += ["--seeds", *map(str, args.seeds)] if args.seeds else []
    return shlex.join(parts)


@contextlib.contextmanager
def workers_of(args: argparse.Namespace, lock: Lock) -> Iterator[Workers]:
    """Have the jobs run where the options say, for the length of the block."""
    if args.scheduler:
        with cluster_workers(args.scheduler, lock=lock, data=args.data) as workers:
            yield workers
    else:
        with local_workers(args.jobs or processes_here()) as workers:
            yield workers


def check_places(args: argparse.Namespace) -> Shard | None:
    """Make sure that the options which say where jobs run go together; return the part that --shard means.

    Raises:
        OptionError: they do not.
    """
    if args.scheduler:
        for name in ("shard", "jobs", "dry_run"):
            if getattr(args, name):
                raise options.OptionError(
                    f"--{name} does nothing with --scheduler, whose workers share all jobs: leave one out"
                )
    return parse_shard(args.shard) if args.shard else None


def main(args: argparse.Namespace) -> dict:
    """Run the study, or say what would run.

    Returns:
        The rows of table.csv by scheme; with --list or --dry_run what they print.
    """
    if args.list:
        return list_studies()
    if args.study is None:
        raise options.OptionError("name a study, such as mnist_lenet300; --list shows those there are")
    shard = check_places(args)
    path = Path(args.study) if args.study.endswith(".json") else STUDIES / f"{args.study}.json"
    study = load_study(path)
    if args.seeds:
        check_numbers("--seeds", args.seeds, low=0, high=options.MOST_SEED, whole=True)
        study = dataclasses.replace(study, seeds=tuple(args.seeds))
    out = Path(args.out or f"runs/studies/{study.name}")
    if args.dry_run:
        return dry_run(study, out, args.data, processes=args.jobs or processes_here(), shard=shard)
    if args.scheduler:  # whose workers start in folders of their own
        out, args.data = out.absolute(), os.path.abspath(args.data)
    start = time.perf_counter()
    with made_folder(out), study_lock(out, shard) as lock, tables(study, out, command=full_command(args)) as rows:
        try:
            with workers_of(args, lock) as workers:  # so that nothing is still written when the tables are
                if shard:
                    run_shard(study, out, args.data, workers, shard=shard)
                else:
                    run_study(study, out, args.data, workers)
        except KeyboardInterrupt as error:
            raise type(error)(f"stopped; the same command goes on, {out} holds what is done") from error
    say(f"all of it took {duration(time.perf_counter() - start)}")
    return rows


if __name__ == "__main__":
    run_script(main, get_parser())
