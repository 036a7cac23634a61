"""Ctrl-C and SIGTERM, from the first import of a script to its end. No torch here, so that it is there at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """A signal to end, as a batch system sends it, or torchrun when another process of the job has ended."""


def leave(number: int, frame: object = None) -> NoReturn:
    """Handle a signal by one line and an end at once, as long as there is nothing to save."""
    line = f"\n{os.path.basename(sys.argv[0])}: interrupted\n"
    os.write(2, line.encode(errors="backslashreplace"))
    os._exit(128 + number)


def leave_when_interrupted() -> None:
    """Begin a script: while it imports torch, which takes seconds, a signal would print what it was importing.

    Signals that a caller has set to be ignored, as a shell does for what it runs in the background, stay ignored.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is usual:
            signal.signal(number, leave)


def terminate(number: int, frame: object) -> NoReturn:
    """Handle SIGTERM as Ctrl-C is handled."""
    raise Terminated


@contextmanager
def raised_when_interrupted() -> Iterator[None]:
    """Let the block end by KeyboardInterrupt, or Terminated, so that it can save and say how to go on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupt_later() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block has ended, so that a save is never cut in two."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda *arguments: received.append(arguments)) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number, _ in received[:1]:
        signal.raise_signal(number)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Start processes in the block that Ctrl-C never reaches, not even while they import; here it waits for the end."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by what is started
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
