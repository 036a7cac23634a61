"""Where the jobs of a study run: side by side in processes of this machine, or wherever else a future comes from."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import Synchronized

import torch

from utils.interrupts import deaf_children
from utils.run import cores, read_json, write_json
from utils.studies.jobs import Job, record_failure, run_job

AGAIN = 3  # times that a job whose worker has died is run once more


@dataclass(frozen=True)
class Workers:
    """What runs jobs.

    Attributes:
        submit: queues a job; the future holds what `run_job` returns.
        count: jobs at a time, for the estimate of the time left.
        died: exceptions of a job that was given up since its workers died.
        lost: what happened when the future is cancelled or the pool broken, for the message.
    """

    submit: Callable[[Job], Future]
    count: int
    lost: str
    died: tuple[type[Exception], ...] = ()


def gpus() -> list[str]:
    """Return the CUDA devices that this process may use, each as the variable CUDA_VISIBLE_DEVICES names it.

    Of the MIG instances of a GPU CUDA shows one to a process; each worker can have another.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if count and named[0].startswith("MIG-"):
        return named
    return named[:count] if named[0] else [str(number) for number in range(count)]


def processes_here() -> int:
    """Return how many runs this machine should do at a time unless told: one a GPU, without any one a core."""
    return len(gpus()) or cores()


def threads_each(processes: int) -> int:
    """Return how many threads each of some processes on the cores of this one should compute with."""
    return max(1, cores() // processes)


def prepare_worker(threads: int, started: Synchronized, devices: list[str]) -> None:
    """Set a worker process up: its share of the cores, a GPU, no Ctrl-C of its own, an end when its parent is killed.

    Args:
        threads: to compute with.
        started: counts the workers of a machine, which take its GPUs in turn.
        devices: the names of these GPUs; empty without any.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    if devices:
        with started.get_lock():
            number, started.value = started.value, started.value + 1
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]  # read when CUDA is first used
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """End this process, at once, when the one that started it is gone: nobody would wait for its results."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextmanager
def local_workers(processes: int) -> Iterator[Workers]:
    """Start processes on this machine, which share its cores equally and its GPUs in turn; they end with the block.

    Args:
        processes: how many.
    """
    context = multiprocessing.get_context("spawn")
    shares = (threads_each(processes), context.Value("i", 0), gpus())
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=prepare_worker, initargs=shares)
    try:
        lost = "a worker process was lost (killed, or out of memory); the same command continues"
        yield Workers(partial(pool.submit, run_job), processes, lost)
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:  # after a good end the workers leave by themselves, and take with them what --compile has started
        pool.shutdown(cancel_futures=True)


def count_start(job: Job, command: str) -> int:
    """Return how often a command has started a job, this time included; `forget_starts` when it has ended.

    Args:
        job: about to start.
        command: what tells this run of reproduce.py from all others.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / "starts.json"
    before = read_json(path) or {}
    starts = 1 + (before["starts"] if before.get("command") == command else 0)
    write_json(path, {"command": command, "starts": starts})
    return starts


def forget_starts(job: Job) -> None:
    """Remove the count of starts of a job that has ended, however it did."""
    (job.folder / "starts.json").unlink(missing_ok=True)


def _is_worth_a_try(job: Job, tries: int) -> bool:
    """Tell whether to run a job again whose worker has died; if not, record it as failed.

    A pool also gives up jobs that merely waited for a worker that died, so their own starts count.
    """
    count = read_json(job.folder / "starts.json")
    starts = count["starts"] if count else 0
    if starts <= AGAIN and tries < AGAIN:
        return True
    reason = f"its worker died {max(starts, tries + 1)} times, see log.txt; remove this file to try again"
    record_failure(job, reason)
    forget_starts(job)
    return False


def _at_work(jobs: list[Job]) -> str:
    """Return which jobs have begun and not ended, now that their workers are lost, as the end of a message."""
    begun = sorted(str(job.folder) for job in jobs if (job.folder / ".lock").exists())
    return f"; begun and not ended: {', '.join(begun)}" if begun else ""


def run_jobs(jobs: list[Job], workers: Workers) -> Iterator[tuple[Job, float | None]]:
    """Run jobs side by side; yield each with its seconds when it is done.

    A job whose worker has died often enough is recorded as failed and yielded without seconds.

    Args:
        jobs: what to do.
        workers: what runs them.

    Raises:
        OSError: the workers were lost, all of them.
        KeyboardInterrupt: Ctrl-C.
    """
    tries = dict.fromkeys(jobs, 0)
    with deaf_children():  # the pool starts its processes when it is given jobs
        waiting = {workers.submit(job): job for job in jobs}
    while waiting:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            job = waiting.pop(future)
            try:
                seconds = future.result()
            except workers.died:
                seconds = None
                if _is_worth_a_try(job, tries[job]):
                    tries[job] += 1
                    waiting[workers.submit(job)] = job
                    continue
            except (BrokenProcessPool, CancelledError) as error:
                raise OSError(f"{workers.lost}{_at_work([job, *waiting.values()])}") from error
            yield job, seconds
