"""What does a job of a study cost beside its training? Run it with nothing else on the machine.

    pip install -r requirements-cluster.txt
    python benchmarks/cluster.py        # two minutes; the calls to the file system need strace

Sends jobs that are done already through a scheduler and two workers on this machine: what is left is the way there and
back, the lock and the look at the folders. Then traces small studies and counts what they ask of the file system, for
each job and for each epoch. docs/many_machines.md works out from both what many machines would meet.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import options  # noqa: E402
from utils.files.lock import folder_lock  # noqa: E402
from utils.run import run_script, write_json  # noqa: E402
from utils.studies.cluster import MISSING, cluster_workers, connect  # noqa: E402
from utils.studies.executors import run_jobs  # noqa: E402
from utils.studies.jobs import Job, tuning_jobs  # noqa: E402
from utils.studies.study import load_study  # noqa: E402

OPTIONS = {"dataset": "digits", "arch": "lenet_300_100", "epochs": 2, "schedule": [1], "val_split": 300}
STUDY = {"title": "Digits", "options": OPTIONS, "percent": [0.5], "seeds": [1], "controls": []}
STUDY |= {"methods": {"none": {"penalty": "none"}}}
CALL = re.compile(r"(\w+)\(.* = (-?\d+)")  # a line of strace: the name and the answer


def write_study(folder: Path, *, runs: int, epochs: int = 2) -> Path:
    """Write the file of a study with some runs of some epochs; return its path."""
    path = folder / f"study_{runs}_{epochs}.json"
    changes = {"options": OPTIONS | {"epochs": epochs}, "tune_seeds": list(range(1, runs + 1))}
    path.write_text(json.dumps(STUDY | changes))
    return path


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Run a scheduler and two workers; give its address and the process numbers by what they are."""
    file = folder / "scheduler.json"
    commands = {"scheduler": ["scheduler", "--port", "0"]}
    commands |= {f"worker {n}": ["worker", "--nthreads", "1", "--no-nanny"] for n in (1, 2)}
    started = {}
    try:
        for name, arguments in commands.items():
            command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard", "--scheduler-file", str(file)]
            with open(folder / "dask.log", "a") as log:
                started[name] = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
            while not file.exists():
                if started[name].poll() is not None:
                    raise OSError(f"the {name} ended: {(folder / 'dask.log').read_text().strip().splitlines()[-1:]}")
                time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        with connect(address) as client:
            client.wait_for_workers(2)
        yield address, {name: process.pid for name, process in started.items()}
    finally:
        for process in reversed(started.values()):
            process.send_signal(signal.SIGTERM)
            process.wait()


def processor_seconds(process: int) -> float:
    """Return the processor time that a process has used, in seconds."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def done_jobs(folder: Path, *, count: int) -> list[Job]:
    """Return jobs with nothing left to do."""
    jobs = tuning_jobs(load_study(write_study(folder, runs=count)), folder / "out", "")
    for job in jobs:
        job.folder.mkdir(parents=True)
        write_json(job.folder / "failed.json", {"reason": "nothing to do"})
    return jobs


def measure_scheduler(folder: Path, *, count: int) -> None:
    """Print what jobs without work cost, each, in seconds of wall clock and of each process."""
    jobs = done_jobs(folder, count=count + 20)
    with cluster(folder) as (address, processes), folder_lock(folder / "out") as lock:
        processes |= {"this command": os.getpid()}
        with cluster_workers(address, lock=lock, data=str(folder)) as workers:
            list(run_jobs(jobs[count:], workers))  # imports torch in the workers
            before, start = {name: processor_seconds(number) for name, number in processes.items()}, time.perf_counter()
            list(run_jobs(jobs[:count], workers))
            wall = time.perf_counter() - start
            print(f"{count} jobs without work, two workers: {1e3 * wall / count:.1f} ms a job")
            for name, number in processes.items():
                print(f"  {name}: {1e3 * (processor_seconds(number) - before[name]) / count:.2f} ms of processor a job")


def asked(folder: Path, *, runs: int, epochs: int) -> tuple[int, int]:
    """Return how many calls a study makes that name a file in its outputs, and how many bytes it writes there."""
    study, logs = write_study(folder, runs=runs, epochs=epochs), folder / f"logs_{runs}_{epochs}"
    out = folder / f"asked_{runs}_{epochs}"
    logs.mkdir()
    trace = ["strace", "-ff", "-y", "-s", "500", "-e", "trace=%file,write,fsync,getdents64", "-o", logs / "of"]
    command = [*trace, sys.executable, ROOT / "reproduce.py", study, "--out", out, "--jobs", "1"]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    calls = size = 0
    for log in logs.iterdir():  # one a thread
        for line in log.read_text(errors="replace").splitlines():
            found = CALL.match(line) if str(out) in line else None
            if found and found[1] == "write":
                size += int(found[2])
            elif found:
                calls += 1
    return calls, size


def measure_files(folder: Path) -> None:
    """Print the calls to the file system and the bytes written, for each epoch and for each job beside its epochs."""
    base, longer, more = (asked(folder, runs=r, epochs=e) for r, e in ((1, 2), (1, 4), (2, 2)))
    for what, a, b, c in zip(("calls", "bytes"), base, longer, more, strict=True):
        epoch = (b - a) / 2
        print(f"{what} below --out: {epoch:,.0f} an epoch, and {c - a - 2 * epoch:,.0f} a job")


def main(args: argparse.Namespace) -> None:
    """Measure both.

    Raises:
        OptionError: a package or program is missing.
    """
    if not importlib.util.find_spec("distributed"):
        raise options.OptionError(MISSING)
    if not shutil.which("strace"):
        raise options.OptionError("strace is not on the PATH: install it, it counts the calls to the file system")
    with tempfile.TemporaryDirectory() as folder:
        measure_scheduler(Path(folder).resolve(), count=args.count)
        measure_files(Path(folder).resolve())


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    text = "jobs to send (default %(default)s)"
    parser.add_argument("--count", type=options.whole(1), default=500, metavar="N", help=text)
    return parser


if __name__ == "__main__":
    run_script(main, get_parser())
