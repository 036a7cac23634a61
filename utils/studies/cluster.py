"""The jobs of a study on a Dask cluster, whose workers see the same folders."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import pickle
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from utils.files.lock import Lock
from utils.logger import say
from utils.options import OptionError
from utils.paths import REPOSITORY
from utils.run import require_writable
from utils.studies.executors import Workers, count_start, forget_starts, threads_each
from utils.studies.jobs import Job, run_job
from utils.training.experiment import Experiment

if TYPE_CHECKING:
    from distributed import Client

ANSWER = 8  # seconds in which a scheduler must answer
SETTLED = 3  # seconds without a new worker after which the cluster is taken for whole
MISSING = "a Dask cluster needs the package distributed: pip install -r requirements-cluster.txt"


def _code() -> str:
    """Return the SHA-256 of the code in this repository."""
    files = sorted(path for folder in ("models", "utils") for path in (REPOSITORY / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


CODE = _code()  # that this process runs, whatever becomes of the files


@dataclass(frozen=True)
class Command:
    """What workers know of the command that sends them jobs.

    Attributes:
        lock: of --out, which shows that a worker sees the same folder, and whether the command still runs.
        data: folder of the images.
        holds: the names in it.
        arguments: the command line, for config.json.
        code: which its process began with.
    """

    lock: Lock
    data: str
    holds: frozenset[str]
    arguments: tuple[str, ...]
    code: str = CODE

    @classmethod
    def here(cls, lock: Lock, data: str) -> Command:
        """Return what workers should know of this process."""
        return cls(lock, data, names_in(data), tuple(sys.argv))


class CommandEndedError(OSError):
    """Nobody waits for a job any more."""


class Followed(Experiment):
    """A run on another machine, which ends when the command that wants it has.

    Args:
        command: that wants it; the others are those of Experiment.
    """

    def __init__(self, *args, command: Command, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.command = command

    def run_epoch(self) -> dict:
        """Train and evaluate once, if anybody still wants it; return the row for log.csv."""
        if not self.command.lock.is_held():
            raise CommandEndedError(f"reproduce.py has ended: stopped after epoch {self.epoch}")
        return super().run_epoch()


def names_in(folder: str) -> frozenset[str]:
    """Return the names in a folder; none if it cannot be read."""
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def require_one_thread(threads: int) -> None:
    """Make sure that a worker does one job at a time.

    Raises:
        OSError: it does not.
    """
    if threads > 1:
        raise OSError(f"does {threads} jobs in one process, whose output each redirects: start it with --nthreads 1")


def look(command: Command) -> str:
    """Make sure, on a worker, that it sees the folders of the command and began with the same code.

    Returns:
        The name of the machine with the cores that the worker may use, which workers may share.

    Raises:
        OSError: it does not; with the folder.
    """
    if command.code != CODE:
        raise OSError("began with another version of this repository than the command: restart the older of the two")
    out = command.lock.path.parent
    if not command.lock.is_held():
        raise OSError(f"does not see --out {out} as this machine does: it must be on a shared file system")
    missing = command.holds - names_in(command.data)
    if missing:
        raise OSError(f"does not see {min(missing)} in --data {command.data}: it must be on a shared file system")
    require_writable(out, make=False)
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ""
    return f"{socket.gethostname()} {own}"


def work(command: Command, sharing: Counter[str], job: Job) -> float | None:
    """Do a job on a worker; see `run_job`.

    Args:
        command: that sent it.
        sharing: how many workers share a machine and its cores, as `look` names them.
        job: what to do.

    Raises:
        OSError: the worker cannot do it.
    """
    from distributed import get_worker

    worker = get_worker()
    try:
        require_one_thread(worker.state.nthreads)  # one that came later has not been looked at
        where = look(command)
    except OSError as error:
        raise OSError(f"worker {worker.address} {error}") from error
    torch.set_num_threads(threads_each(sharing[where] or 1))
    _forget_malloc()
    sys.argv[:] = command.arguments  # as for a process that this one starts
    count_start(job, command.lock.content)
    try:
        return run_job(job, kind=partial(Followed, command=command))
    finally:
        forget_starts(job)


def _forget_malloc() -> None:
    """Take the threshold of malloc that Dask's nanny sets out of the environment: training sets a better one."""
    import dask
    import distributed  # noqa: F401 (its settings are known from then on)

    name = "MALLOC_TRIM_THRESHOLD_"
    if os.environ.get(name) == str(dask.config.get("distributed.nanny.pre-spawn-environ", {}).get(name)):
        del os.environ[name]


def at_worker(function: Callable, *arguments: object) -> Callable:
    """Return a call of ours as something that a worker can unpack without having our modules on its path."""
    repository, content = str(REPOSITORY), pickle.dumps((function, arguments))

    def study_job(*more: bytes) -> object:  # pickled whole, because it is nested
        import pickle
        import sys

        if repository not in sys.path:
            sys.path.insert(0, repository)
        function, arguments = pickle.loads(content)
        return function(*arguments, *map(pickle.loads, more))

    return study_job


async def kind_at(address: str) -> str:
    """Ask what answers at an address, such as "Scheduler"."""
    from distributed import Security, rpc

    async with rpc(address, connection_args=Security().get_connection_args("client")) as other:
        return (await other.identity())["type"]


def connect(address: str) -> Client:
    """Return a client of a running scheduler.

    Raises:
        OptionError: the package is missing.
        OSError: no scheduler answers.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise OptionError(MISSING) from error
    for name in ("distributed", "distributed.client", "asyncio", "tornado"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters of a lost connection is said in one line
    try:
        # asked first: a client that gets no answer, or another program's, takes its time to give up
        kind = asyncio.run(asyncio.wait_for(kind_at(address), ANSWER))
    except Exception as error:  # whatever is at that port may answer anything
        kind, why = None, error
    if kind != "Scheduler":
        found = f"{kind} is" if kind else f"no scheduler answers ({type(why).__name__})"
        raise OSError(f"{found} at --scheduler {address}: give the address that `dask scheduler` prints")
    return Client(address, timeout=ANSWER, set_as_default=False)


def look_at_workers(client: Client, command: Command) -> Counter[str]:
    """Make sure that all workers can do jobs; return how many share a machine and its cores.

    Raises:
        OSError: one of them cannot, with its address and the reason.
    """
    found = client.run(at_worker(look, command), on_error="return")
    for address, threads in client.nthreads().items():
        try:
            require_one_thread(threads)
            if isinstance(found.get(address), Exception):
                raise found[address]
        except ImportError as error:
            raise OSError(f"worker {address} cannot import {REPOSITORY} ({error}): it needs that folder") from error
        except OSError as error:
            raise OSError(f"worker {address} {error}") from error
    return Counter(found.values())


def wait_for_workers(client: Client) -> None:
    """Wait for a worker, and until no more come: those of one machine are to share its cores."""
    client.wait_for_workers(1)
    before = 0
    while before < (now := len(client.nthreads())):
        before = now
        time.sleep(SETTLED)


@contextmanager
def cluster_workers(address: str, *, lock: Lock, data: str) -> Iterator[Workers]:
    """Use the workers of a running Dask cluster.

    Args:
        address: of its scheduler.
        lock: of --out, as an absolute path.
        data: folder of the images, as an absolute path.

    Raises:
        OptionError: the package `distributed` is missing.
        OSError: no scheduler answers, or a worker cannot do jobs.
    """
    client = connect(address)
    from distributed import KilledWorker

    executor = client.get_executor(pure=False)
    try:
        if not client.nthreads():
            say(f"{address} has no worker yet: waiting for one")
            wait_for_workers(client)
        command = Command.here(lock, data)
        sharing = look_at_workers(client, command)
        call = at_worker(work, command, sharing)
        lost = f"the scheduler at {address} was lost; when it runs again, the same command continues"
        yield Workers(lambda job: executor.submit(call, pickle.dumps(job)), sharing.total(), lost, (KilledWorker,))
    finally:
        executor.shutdown(wait=False)
        client.close()
