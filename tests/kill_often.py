"""Kill training with kill -9 a hundred times, wherever it is, and compare what is left with runs nobody disturbed.

    python tests/kill_often.py                                # 100 kills; states where they fell
    python tests/kill_often.py --kills 20 --torchrun          # one of two processes, started by torchrun

Each run is a LeNet on digits. It is killed at moments chosen at random within what it does: in the middle of an epoch,
between two, while it saves, while it draws. Every kill must leave a checkpoint that loads, and every finished run
must be equal, bit for bit, to the same run without a kill.
"""

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from forked import CONTEXT

import mnist.mnist
import utils.training.experiment
import utils.training.outputs
from utils.files.checkpoint import load_checkpoint

EPOCHS, KILLS_A_RUN = 8, 5
OPTIONS = f"-d digits -a lenet_300_100 --halo --xi 1e-4 --psi 1e-4 --lr 0.05 --epochs {EPOCHS} --schedule 4".split()
WEIGHTS = {"epoch": 5, "between": 2, "save": 2, "figure": 1}  # how often a kill waits for which moment
LENGTHS = {"epoch": 0.15, "between": 0.003, "save": 0.02, "figure": 0.5}  # seconds, within which it falls


def watch(module: object, name: str, what: str, tell: Callable[[str], object]) -> None:
    """Let a function say when it begins and ends; what it does is unchanged."""
    original = getattr(module, name)

    def call(*args, **kwargs):
        tell(what)
        try:
            return original(*args, **kwargs)
        finally:
            tell("between")

    setattr(module, name, call)


def work(folder: str) -> None:
    """Train, or go on where an earlier call was killed; say in FOLDER.events what is being done."""
    events = os.open(f"{folder}.events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    rank = os.environ.get("RANK", "0")
    parts = utils.training.experiment, utils.training.outputs
    moments = {"run_epoch": (0, "epoch"), "save_state": (0, "save"), "save_checkpoint": (1, "save")}
    moments |= {"draw_curves": (1, "figure"), "draw_regularization": (1, "figure")}
    for name, (part, what) in moments.items() if rank == "0" else ():
        watch(parts[part], name, what, lambda text: os.write(events, f"{text}\n".encode()))
    checkpoint = Path(folder) / "checkpoint.pth.tar"
    resume = ["--resume", str(checkpoint)] if checkpoint.exists() else []
    os.dup2(os.open(f"{folder}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
    mnist.mnist.main(mnist.mnist.get_parser().parse_args([*OPTIONS, "--save_dir", folder, *resume]))


class Run:
    """The run of a folder as a process of its own, or as two processes of torchrun."""

    def __init__(self, folder: Path, *, torchrun: bool) -> None:
        self.folder, self.torchrun = folder, torchrun
        self.events = folder.with_name(f"{folder.name}.events")
        self.events.write_text("")
        if torchrun:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
            log = open(f"{folder}.log", "a")  # noqa: SIM115  (the process has it to its end)
            self.process = subprocess.Popen([*launcher, __file__, "--work", str(folder)], stderr=log, stdout=log)
        else:  # forked from one that has imported torch but not used it: that saves the import
            self.process = CONTEXT.Process(target=work, args=(str(folder),), daemon=True)
            self.process.start()

    def status(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self.process.poll() if self.torchrun else self.process.exitcode

    def wait(self) -> int:
        """Wait for the end; return the exit status."""
        self.process.wait() if self.torchrun else self.process.join()
        return self.status()

    def kill(self, choose: random.Random) -> None:
        """Kill the run, or one of the processes of torchrun, which then ends the other, and wait."""
        victim = self.process.pid
        if self.torchrun:
            victim = int(choose.choice(Path(f"/proc/{victim}/task/{victim}/children").read_text().split()))
        os.kill(victim, signal.SIGKILL)
        self.wait()

    def reaches(self, wanted: str, count: int) -> bool:
        """Wait until it does something for the count-th time; tell whether it did before its end."""
        while self.status() is None:
            if self.events.read_text().split("\n").count(wanted) >= count:
                return True
            time.sleep(0.002)
        return False


def kill_once(run: Run, choose: random.Random) -> str | None:
    """Wait for a moment, kill; return where it was, None if the run ended before."""
    wanted = choose.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
    if not run.reaches(wanted, 1 if wanted == "figure" else choose.randint(1, 2)):
        return None
    time.sleep(choose.random() * LENGTHS[wanted])
    doing = run.events.read_text().split()[-1]  # which may have changed meanwhile
    if run.status() is not None:
        return None
    run.kill(choose)
    return doing


def equal(one: dict, other: dict) -> bool:
    """Compare the weights, lam and history of two runs bit for bit, apart from the times."""
    same = all(torch.equal(one[k][n], other[k][n]) for k in ("state_dict", "lambdas") for n in one[k])
    times = ("seconds", "images_per_second")
    rows = [[{k: v for k, v in row.items() if k not in times} for row in run["history"]] for run in (one, other)]
    return same and rows[0] == rows[1]


def main() -> int:
    """Kill as often as asked, state the counts; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="how often")
    parser.add_argument("--torchrun", action="store_true", help="kill one of two processes of torchrun")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", metavar="FOLDER", help="be what is killed")
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return 0
    choose, counts, kills, equals = random.Random(args.seed), collections.Counter(), 0, []
    with tempfile.TemporaryDirectory() as place:
        Run(Path(place) / "straight", torchrun=args.torchrun).wait()
        expected = load_checkpoint(Path(place) / "straight" / "checkpoint.pth.tar")
        while kills < args.kills:
            folder = Path(place) / f"run{len(equals)}"
            checkpoint = folder / "checkpoint.pth.tar"
            for _ in range(min(KILLS_A_RUN, args.kills - kills)):
                where = kill_once(Run(folder, torchrun=args.torchrun), choose)
                if where is None:
                    break
                kills, counts[where] = kills + 1, counts[where] + 1
                if checkpoint.exists():
                    load_checkpoint(checkpoint)  # raises if it is unreadable
            status = Run(folder, torchrun=args.torchrun).wait()
            logged = len((folder / "log.csv").read_text().splitlines()) == EPOCHS + 1  # a title, and a row an epoch
            equals.append(status == 0 and logged and equal(load_checkpoint(checkpoint), expected))
            print(
                f"run {len(equals)}, {kills} kills: {'equal' if equals[-1] else f'NOT EQUAL, {folder}.log'}", flush=True
            )
    where = ", ".join(f"{count} in '{name}'" for name, count in counts.most_common())
    print(
        f"{kills} kills ({where}); {sum(equals)} of {len(equals)} finished runs bit-identical, no checkpoint unreadable"
    )
    return int(not all(equals))


if __name__ == "__main__":
    sys.exit(main())
