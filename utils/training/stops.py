"""How a run can be continued whenever it stops: what is in its folder before the first epoch, and what it says."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from utils.command_line import OptionError, option
from utils.distributed import is_lost, is_main, lost, processes, rank
from utils.files.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.files.lock import LockedError
from utils.logger import one_line, warn
from utils.run import clear_run, describe, is_lack_of_memory, write_json
from utils.training.epoch import NonFiniteLossError
from utils.training.state import describe_images, network_state, save_state, save_what_follows
from utils.training.zeros import describe_zeros

if TYPE_CHECKING:
    from utils.training.experiment import Experiment

CONTINUED = ("cifar.py", "mnist.py", "growing_xi.py")  # scripts with --resume; the others go on by themselves


def begin_folder(run: Experiment) -> None:
    """Write config.json, and what makes the run one that can be continued from its folder, or nothing.

    Raises:
        OSError: they cannot be written.
        CheckpointError: the best network so far is not there.
        LockedError: another process has taken the folder over; it is left alone.
    """
    if run.lock:
        run.lock.require()
    checkpoint = run.folder / "checkpoint.pth.tar"
    source = Path(os.path.realpath(run.args.resume or checkpoint))
    own = bool(run.args.resume) and source == Path(os.path.realpath(checkpoint))
    run.saved = run.epoch if own else None
    best = _best_before(run) if is_main() else None
    try:
        if is_main():
            if not own and source.parent != run.folder.resolve():
                clear_run(run.folder)  # of the run that --overwrite replaces
            _write_first_files(run, None if own else best, source)
        if not own:
            save_state(run)
        elif is_main():  # killed behind the checkpoint, the others lack its epoch
            save_what_follows(run)
        if is_main() and not best and not run.ends_with_best:
            (run.folder / "model_best.pth.tar").unlink(missing_ok=True)  # of epochs that are trained anew
    except (OSError, CheckpointError):
        if is_main() and not checkpoint.exists():
            clear_run(run.folder)
        raise


def _write_first_files(run: Experiment, best: dict | None, source: Path) -> None:
    """Write config.json and the first network of the run.

    Args:
        run: that begins, or goes on.
        best: the best network so far, which a run that goes on in another folder brings along; None for none.
        source: the checkpoint that it goes on from, beside which its first network may lie.
    """
    described = describe(run.args, run.device) | describe_images(run.data) | describe_zeros(run)
    write_json(run.folder / "config.json", described)
    if run.epoch == 0:
        save_checkpoint(run.folder / "init.pth.tar", network_state(run))
    elif source.parent != run.folder.resolve() and source.with_name("init.pth.tar").is_file():
        save_checkpoint(run.folder / "init.pth.tar", load_checkpoint(source.with_name("init.pth.tar")))
    if best:
        save_checkpoint(run.folder / "model_best.pth.tar", best)


def _best_before(run: Experiment) -> dict | None:
    """Return the network of the best epoch so far, from the folder that a run comes from; None where it has none.

    Raises:
        CheckpointError: it is missing, and is to be tested at the end.
    """
    if not run.history or run.ends_with_best:
        return None
    source = Path(os.path.realpath(run.args.resume)).with_name("model_best.pth.tar")
    epoch = run.best["epoch"]
    best = load_checkpoint(source) if source.exists() else {}
    if (best.get("epoch"), best.get("acc")) == (epoch, run.best[f"{run.held_out}_top1"]):
        return best
    text = f"{source} with the best epoch so far ({epoch}) is not beside {run.args.resume}"
    if run.args.val_split and not run.args.no_test:
        raise CheckpointError(f"{text}, and is to be tested at the end: bring it, or give --no_test")
    warn(f"{text}: there will be no model_best.pth.tar unless a later epoch is better")
    return None


@contextmanager
def way_to_go_on(run: Experiment) -> Iterator[None]:
    """Let whatever stops a run say which checkpoint it left, and the command that continues it.

    Raises:
        NonFiniteLossError: the loss is not finite; the last good checkpoint stays.
        KeyboardInterrupt: Ctrl-C or a signal to end.
        LockedError: another process has taken the folder over; it is left alone.
        OSError: a file cannot be written; the last one written stays.
        OptionError: the backward pass cannot be compiled.
        ValueError: a last batch is too small for BatchNorm.
        ConnectionError: another process of a distributed run ended.
    """
    try:
        yield
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"epoch {run.epoch + 1}, {error}. {what_is_left(run)}") from error
    except KeyboardInterrupt as error:
        raise type(error)(f"stopped. {where_to_go_on(run)}") from error
    except LockedError:
        raise
    except OSError as error:
        raise type(error)(f"{error}. {where_to_go_on(run)}") from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        images = f"one of the {len(run.data.train.labels)} training images"
        remedy = f"choose another --train_batch than {run.args.train_batch}, and --overwrite"
        if run.epoch:  # so another number of processes has come so far
            remedy = f"change the number of processes. {where_to_go_on(run)}"
        raise ValueError(f"the last batch leaves {images} to a process, and BatchNorm needs two: {remedy}") from error
    except RuntimeError as error:
        if processes() > 1 and is_lost(error):
            raise ConnectionError(f"rank {rank()}: {lost(error)}. {where_to_go_on(run)}") from error
        if is_lack_of_memory(error) or not (run.args.compile and run.forward.in_first_batch):
            raise
        raise OptionError(f"--compile failed in the backward pass: {one_line(error)}: leave it out") from error


def what_is_left(run: Experiment) -> str:
    """Say what a run that diverged left: the same command would diverge again, and other options are another run."""
    checkpoint = run.folder / "checkpoint.pth.tar"
    if not checkpoint.exists():
        return "Nothing is kept of the run: start it again with other options"
    if not sys.argv[0].endswith(CONTINUED):  # a study leaves it so, and has no such options
        return f"The run ended after epoch {run.epoch}"
    start = shlex.join(option("--start", checkpoint))
    again = f"begin again with --overwrite, or from its weights with {start} in another --save_dir"
    return f"{checkpoint} holds the last finished epoch{_saved(run)}: {again}"


def _saved(run: Experiment) -> str:
    """Return in brackets which epoch the checkpoint holds; nothing where rank 0 may have been lost in writing it."""
    return f" ({run.saved})" if processes() == 1 and run.saved is not None else ""


def where_to_go_on(run: Experiment) -> str:
    """Say which checkpoint a stopped run left, and the command that continues it."""
    checkpoint = run.folder / "checkpoint.pth.tar"
    if not checkpoint.exists():
        return "Nothing is kept of the run: start it again"
    left = f"{checkpoint} holds the last finished epoch{_saved(run)}"
    if not sys.argv[0].endswith(CONTINUED):
        return f"{left}; the same command goes on"
    arguments = [a for a in sys.argv[1:] if a != "--overwrite" and not a.startswith(("--resume=", "--start="))]
    for name in {"--resume", "--start"} & {*arguments}:
        position = arguments.index(name)
        del arguments[position : position + 2]
    launcher = ["python"] if processes() == 1 else ["torchrun", "--nproc_per_node", str(processes())]
    command = shlex.join([*launcher, sys.argv[0], *arguments, *option("--resume", checkpoint)])
    return f"{left}; continue with: {command}"
