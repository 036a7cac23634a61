"""The surroundings of a run: device, the folder it writes to, its config, and how errors end it."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from utils.distributed import is_main, processes
from utils.files.atomic import atomic_write, write_text
from utils.files.lock import Lock, folder_lock
from utils.files.texts import CHECKSUM, checksum, parse_json
from utils.interrupts import Terminated, raised_when_interrupted
from utils.logger import in_scripts, one_line, show_warnings_as_notes
from utils.options import OptionError
from utils.paths import REPOSITORY, labels_of, portable_arguments

END_FILES = """
    summary.json final.pth.tar curves.png regularization.png regularization.npz
    train_accs.npy train_losses.npy test_accs.npy test_losses.npy conv_params.npy reg_params.npy
""".split()  # that the end of a run writes
LONGEST_NAME = 200  # bytes of an output's name: file systems take 255, and temporary files have longer ones
RUN_FILES = [*"config.json log.csv init.pth.tar checkpoint.pth.tar model_best.pth.tar".split(), *END_FILES]


def run_script(
    main: Callable[[argparse.Namespace], dict], parser: argparse.ArgumentParser, *, distributed: bool = False
) -> NoReturn:
    """Run a script's main on the command line and end the process: what a user can cause is one line, no traceback.

    Exit status: 0; 2 for wrong options; 130 for Ctrl-C; 143 for SIGTERM; 1 for anything else that is wrong.

    Args:
        main: takes the options.
        parser: reads them.
        distributed: whether main shares its work between the processes of torchrun.
    """
    try:
        with raised_when_interrupted():
            args = parser.parse_args()
            show_warnings_as_notes()
            if processes() > 1 and not distributed:
                raise OptionError(f"{parser.prog} runs in one process: start it with python, not torchrun")
            main(args)
    except KeyboardInterrupt as error:
        parser.exit(143 if isinstance(error, Terminated) else 130, f"\n{parser.prog}: {str(error) or 'interrupted'}\n")
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_lack_of_memory(error):
            raise
        text = in_scripts(one_line(error, most=2000)) or type(error).__name__
        wrong_options = isinstance(error, OptionError)  # the same in all processes: the first says it
        message = f"{parser.prog}: error: {text}\n" if is_main() or not wrong_options else None
        parser.exit(2 if wrong_options else 1, message)
    sys.exit(0)


def is_lack_of_memory(error: RuntimeError) -> bool:
    """Tell whether torch found too little memory, or a GPU that others have taken; often it has no type for that."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "busy or unavailable")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def choose_device(name: str) -> torch.device:
    """Return the device: "auto" takes cuda, else mps, else cpu.

    Raises:
        OptionError: the device is not available here, or is none for as many processes as torchrun started.

    Note:
        fp32 is fp32 on CUDA too, where convolutions by default round their inputs to 10 bits (TF32), and matrix
        products may.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise OptionError(f"--device {name} is not available here: use --device auto or cpu")
    if name == "mps" and processes() > 1:
        raise OptionError(
            "--device mps is one process: gloo, which joins them, has no Apple GPU; start 1, or --device cpu"
        )
    if name == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        started = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if started > gpus:
            raise OptionError(f"{started} processes need a GPU each, only {gpus} seen: start {gpus}, or --device cpu")
        torch.cuda.set_device(local)  # torchrun: one GPU a process
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def require_writable(folder: Path, *, make: bool) -> None:
    """Find out before the work, not after it, whether files can be written to a folder.

    Args:
        folder: where files are to go.
        make: make it if it is missing.

    Raises:
        OSError: it cannot be made or written to.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / ".writable"):
            pass
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        remedy = "choose a folder" if folder.is_file() else "make it, or choose another folder"
        raise OSError(f"cannot write to the folder {folder} ({reason}): {remedy}") from error


def prepare_folder(folder: Path, *, resume: str | None, overwrite: bool) -> None:
    """Refuse a folder that holds another run, and remove what killed processes left half-written in it.

    Raises:
        ValueError: it holds a file of a run that is not the one to resume, and `overwrite` is off.
    """
    own = resume is not None and os.path.dirname(os.path.realpath(resume)) == os.path.realpath(folder)
    there = [name for name in RUN_FILES if (folder / name).exists()]
    if there and not own and not overwrite:
        checkpoint = folder / "checkpoint.pth.tar"
        go_on = f"continue it with --resume {checkpoint}, " if checkpoint.exists() else ""
        raise ValueError(
            f"{folder} holds another run or its files ({', '.join(there[:3])}): {go_on}"
            "replace them with --overwrite, or choose another --save_dir"
        )
    for name in RUN_FILES:
        for rest in folder.glob(f".{name}.*.tmp"):
            rest.unlink(missing_ok=True)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder for the block; if the block fails before it wrote anything, nothing is left of it.

    Raises:
        OSError: it cannot be made or written to.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        require_writable(folder, make=True)
        yield
    except BaseException:
        with suppress(OSError):  # it holds something
            for path in new:
                path.rmdir()
        raise


@contextmanager
def run_folder(args: argparse.Namespace) -> Iterator[Lock | None]:
    """Make the folder of a run and hold it for the length of the block; of several processes the first does.

    Yields its lock; None in the other processes.

    Args:
        args: with `save_dir`, `resume`, `overwrite` and `evaluate`, which needs no folder.

    Raises:
        LockedError: another process works in it.
        ValueError: it holds another run.
        OSError: it cannot be made or written to.
    """
    if not is_main() or args.evaluate:
        yield None
        return
    folder = Path(args.save_dir)
    with made_folder(folder), folder_lock(folder, remedy="choose another --save_dir") as lock:
        prepare_folder(folder, resume=args.resume, overwrite=args.overwrite)
        yield lock


def refuse_existing(paths: Iterable[Path], *, overwrite: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse to replace outputs, or to write where nothing can be written.

    Args:
        paths: the files to come.
        overwrite: whether they may replace others.
        inputs: files that are read, which no output may replace.

    Raises:
        ValueError: a file exists already, is read, is named twice, or is no file (a device would be replaced by one).
        OSError: a folder is missing, or cannot be written to.
    """
    read, named = {os.path.realpath(path) for path in inputs}, set()
    for path in paths:
        place = os.path.realpath(path)
        if place in read | named:
            other = "is to be read" if place in read else "is named for two outputs"
            raise ValueError(f"{path} {other}: give each file a name of its own")
        named.add(place)
        if len(os.fsencode(Path(path).name)) > LONGEST_NAME:
            raise ValueError(
                f"{Path(path).name[:30]}... is too long for a name: give one of at most {LONGEST_NAME} bytes"
            )
        if os.path.lexists(path) and not overwrite:
            raise ValueError(f"{path} exists already: give --overwrite or another place")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is a folder or a device: give the name of a file")
        require_writable(path.parent, make=False)


@contextmanager
def all_or_none(paths: Iterable[Path]) -> Iterator[None]:
    """Leave files as they were if the block fails: none new, so that the same command can run again, none replaced.

    For its length those that exist have the name .NAME.before. A process that is killed leaves them there; the next
    with the same outputs takes them, not what the killed one wrote in part, for what was.
    """
    kept = {place: place.with_name(f".{place.name}.before") for place in map(Path, map(os.path.realpath, paths))}
    there = [place for place in kept if place.exists()]
    try:
        for place in there:
            if not kept[place].exists():
                place.replace(kept[place])
        yield
    except BaseException:
        for place, before in kept.items():
            if before.exists():
                before.replace(place)
            elif place not in there:
                place.unlink(missing_ok=True)
        raise
    for before in kept.values():
        before.unlink(missing_ok=True)


def clear_run(folder: Path) -> None:
    """Remove the files of a run from its folder, and nothing else."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cores() -> int:
    """Return the number of cores that this process may use: a batch system grants fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """Return the name of the processor and the number of its cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores()} cores"


def describe(args: argparse.Namespace, device: torch.device) -> dict:
    """Return what config.json holds: arguments, command line, commit, versions and hardware."""
    status = _git("status", "--porcelain")
    cuda = device.type == "cuda"
    return {
        "arguments": vars(args),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": str(device),
        "processes": processes(),
        "hardware": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
    }


def read_json(path: str | Path) -> dict | None:
    """Read a JSON file that holds an object; None if there is none.

    Raises:
        ValueError: it is damaged, does not have the checksum that it states, or is no object.
    """
    try:
        return parse_json(path)
    except FileNotFoundError:
        return None


def write_json(path: str | Path, content: dict) -> None:
    """Write a JSON file atomically, with a checksum; NaN and infinity, which JSON lacks, become null.

    Every text that is an absolute path is written as portable_path names it: such files are kept, committed and read
    on other machines, so none of them may be needed to find a file again.

    Raises:
        OSError: the file cannot be written; what it held before is untouched.
    """

    def clean(value: object) -> object:
        if isinstance(value, dict):
            paths = [str(key) for key in value if Path(str(key)).is_absolute()]
            names = dict(zip(paths, labels_of(paths), strict=True))
            return {names.get(str(key), str(key)): clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        if isinstance(value, (str, Path)):
            return portable_arguments([str(value)])[0]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    cleaned = clean({key: value for key, value in content.items() if key != CHECKSUM})  # that of an older content
    write_text(path, json.dumps(cleaned | {CHECKSUM: checksum(cleaned)}, indent=2) + "\n")
