"""One writer a folder: a lock file that says who holds it, taken over when its holder is gone."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEAT = 30.0  # seconds between two signs of life, which tell other machines that the holder still runs
STALE = 10 * BEAT  # without one for so long, a holder on another machine counts as gone


class LockedError(OSError):
    """Another process works in this folder; the message says which."""


def started(process: int) -> str | None:
    """Return when a process of this machine began, None if there is none; a number may be used again, this is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return None
    try:
        os.kill(process, 0)
    except PermissionError:
        return "unknown"
    except (OSError, OverflowError):
        return None
    return "unknown"


def holder_of(path: Path) -> dict | None:
    """Return who holds a lock file, with `host` and `process`; None if nobody does any more."""
    try:
        content, age = path.read_text(), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        holder = json.loads(content)
        host, process, began = holder["host"], int(holder["process"]), holder["started"]
    except (ValueError, KeyError, TypeError):
        # cut short: its writer died, or is still writing
        return {"host": "an unknown machine", "process": "?"} if age < BEAT else None
    if host == socket.gethostname():
        return holder if began == started(process) else None
    return holder if age < STALE else None


def _take(path: Path) -> dict | None:
    """Make the lock file; return None, or who was faster."""
    mine = {"host": socket.gethostname(), "process": os.getpid(), "started": started(os.getpid())}
    for _ in range(3):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            holder = holder_of(path)
            if holder is not None:
                return holder
            _remove_stale(path)
            continue
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(mine))
        return None
    return holder_of(path) or {"host": "an unknown machine", "process": "?"}


def _remove_stale(path: Path) -> None:
    """Move a stale lock away; of two processes that try, one moves it, and it is looked at again before it goes."""
    aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if holder_of(aside) is not None:  # somebody took the stale one over between our look and our move
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


@contextmanager
def folder_lock(folder: str | Path, *, remedy: str = "choose another folder") -> Iterator[None]:
    """Hold a folder for the length of the block, so that two processes never write the same files.

    Args:
        folder: it must exist; the lock is its file `.lock`, with host and process number.
        remedy: what to do if somebody else holds it, for the message.

    Raises:
        LockedError: another process holds it, on this machine or on another that shared it lately.
        OSError: the lock cannot be written.
    """
    path = Path(folder) / ".lock"
    other = _take(path)
    if other is not None:
        raise LockedError(f"process {other['process']} on {other['host']} works in {folder}: wait for it, or {remedy}")
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        path.unlink(missing_ok=True)


def _beat(path: Path, ended: threading.Event) -> None:
    """Touch the lock from time to time until the end."""
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)
