"""Ctrl-C and SIGTERM at any moment of a script: one line, the usual exit status, no traceback."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from functools import partial

import pytest
from conftest import PATIENCE, ROOT

from utils.interrupts import deaf_children, interrupt_later
from utils.studies import executors

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SCRIPTS = [*sorted(path.name for path in ROOT.glob("*.py")), "mnist/mnist.py", "results/redraw.py"]
SCRIPTS += ["results/replication/short_runs/growing_xi.py"]
SLOW = "import os, time\nos.write(1, b'loading')\ntime.sleep(100)\n"  # in the place of torch


def started(script, folder, *, ignored=()):
    """Start a script that stands still where it imports torch, and wait until it does."""
    (folder / "torch.py").write_text(SLOW)

    def heed():  # as a terminal does; a shell in the background ignores SIGINT
        signal.signal(signal.SIGINT, signal.SIG_IGN if signal.SIGINT in ignored else signal.default_int_handler)

    environment = os.environ | {"PYTHONPATH": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, ROOT / script], env=environment, preexec_fn=heed, **pipes)
    assert process.stdout.read(7) == b"loading"
    return process


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_signal_in_a_save_waits_for_its_end(times):
    done, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) if times else contextlib.nullcontext(), interrupt_later():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        done.append("saved")
    assert done == ["saved"] and signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_no_signal_is_held_back():
    before, seen = signal.getsignal(signal.SIGINT), []

    def save():
        with interrupt_later():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_while_torch_is_loaded_is_one_line(script, number, tmp_path):
    process = started(script, tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == STATUS[number]
    assert errors.decode().split("\n") == ["", f"{script.split('/')[-1]}: interrupted", ""]


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    process = started("cifar.py", tmp_path, ignored=[signal.SIGINT])
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    process.communicate()


def blocked() -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_what_is_started_deaf_never_gets_ctrl_c():
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run().stdout == "False\n"
    with deaf_children():
        assert run().stdout == "True\n"
    assert not blocked()


def test_ctrl_c_waits_until_the_children_are_started(heeded):
    with pytest.raises(KeyboardInterrupt), deaf_children():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached


def test_the_workers_of_a_study_are_started_deaf(monkeypatch):
    class Pool:
        def __init__(self, *_, **__):
            pass

        def submit(self, run, job):
            done = Future()
            done.set_result(blocked())
            return done

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(executors, "ProcessPoolExecutor", Pool)
    with executors.local_workers(1) as workers:
        assert [was for _, was in executors.run_jobs(["a", "b"], workers)] == [True, True]


@pytest.mark.parametrize("ends_well", [True, False])
def test_workers_leave_by_themselves_after_a_good_end(ends_well):
    """One that is terminated leaves behind what --compile has started in it, and Python warns of that."""
    with contextlib.suppress(KeyboardInterrupt), executors.local_workers(1) as workers:
        workers.submit(None).exception()  # no job, but the worker is there now
        (worker,) = multiprocessing.active_children()
        if not ends_well:
            raise KeyboardInterrupt
    assert worker.exitcode == (0 if ends_well else -signal.SIGTERM)
