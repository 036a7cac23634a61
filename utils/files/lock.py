"""One writer a folder: a lock file that says who holds it, taken over when its holder is gone."""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BEAT = 30.0  # seconds between two signs of life, which tell other machines that the holder still runs
STALE = 10 * BEAT  # without one for so long, a holder on another machine counts as gone; NFS may hide one for a minute
LOOK = 1.0  # seconds between two looks of a process that waits


class LockedError(OSError):
    """Another process works in this folder; the message says which."""


@dataclass(frozen=True)
class Lock:
    """A lock file as its holder has written it; another machine can look whether it still stands.

    Attributes:
        path: of the file.
        content: of the file, different each time that a lock is taken.
    """

    path: Path
    content: str

    def is_held(self) -> bool:
        """Tell whether the file is still this lock, and its holder alive."""
        try:
            return self.path.read_text() == self.content and holder_of(self.path) is not None
        except FileNotFoundError:
            return False

    def require(self) -> None:
        """Make sure that nobody has taken the folder over, as happens to a process that stood still too long.

        Raises:
            LockedError: somebody has.
        """
        if not self.is_held():
            folder = self.path.parent
            raise LockedError(f"{folder} was taken over: this process showed no sign of life for {STALE:.0f} s")


def machine() -> str:
    """Name the machine, and in it the space of process numbers: two machines, or two containers, may share a name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def myself() -> dict:
    """Return what a lock says of this process."""
    process = os.getpid()
    return {"host": socket.gethostname(), "machine": machine(), "process": process, "started": started(process)}


def started(process: int) -> str | None:
    """Return when a process of this machine began, None if there is none; a number may be used again, this is not.

    "unknown" for one of which that cannot be read, as of other users under the option hidepid of /proc.
    """
    with suppress(OSError):
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]  # a zombie has ended, and nobody has asked for its status
    try:
        os.kill(process, 0)
    except PermissionError:
        return "unknown"
    except (OSError, OverflowError):
        return None
    return "unknown"


def _age(path: Path) -> float:
    """Return the seconds since a file was touched by the clock of its file system: those of machines may differ."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".clock") as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


def holder_of(path: Path) -> dict | None:
    """Return who holds a lock file, with `host` and `process`; None if nobody does any more."""
    try:
        content = path.read_text()
        holder = json.loads(content)
        where, process, began = holder["machine"], int(holder["process"]), holder["started"]
        found = started(process) if where == machine() else "unknown"
        if found == "unknown":  # elsewhere, or hidden: a number may be used again, so only signs of life tell
            return holder if _age(path) < STALE else None
        return holder if found == began else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        # cut short: its writer died, or is still writing
        with suppress(FileNotFoundError):
            return {"host": "an unknown machine", "process": "?"} if _age(path) < BEAT else None
        return None


def _take(lock: Lock) -> dict | None:
    """Make the lock file; return None, or who was faster."""
    for _ in range(3):
        try:
            descriptor = os.open(lock.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            holder = holder_of(lock.path)
            if holder is not None:
                return holder
            _remove_stale(lock.path)
            continue
        _fill(descriptor, lock)
        return None
    return holder_of(lock.path) or {"host": "an unknown machine", "process": "?"}


def _fill(descriptor: int, lock: Lock) -> None:
    """Write the lock to its file, which was just made, or take the file away again."""
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(lock.content)
    except OSError as error:
        lock.path.unlink(missing_ok=True)
        raise OSError(f"cannot write {lock.path} ({error.strerror}): free space, then start it again") from error


def _remove_stale(path: Path) -> None:
    """Move a stale lock away; of two processes that try, one moves it, and it is looked at again before it goes."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if holder_of(aside) is not None:  # somebody took the stale one over between our look and our move
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _wait(lock: Lock, other: dict, on_wait: Callable[[str], None]) -> None:
    """Take a lock when its holder has ended."""
    on_wait(f"process {other['process']} on {other['host']} works in {lock.path.parent}: waiting for it")
    while _take(lock) is not None:
        time.sleep(LOOK)


@contextmanager
def folder_lock(
    folder: str | Path,
    *,
    remedy: str = "choose another folder",
    name: str = ".lock",
    on_wait: Callable[[str], None] | None = None,
) -> Iterator[Lock]:
    """Hold a folder for the length of the block, so that two processes never write the same files.

    Args:
        folder: it must exist.
        remedy: what to do if somebody else holds it, for the message.
        name: of the lock, a file with host and process number.
        on_wait: told who holds it, which is then waited for; None to raise instead.

    Raises:
        LockedError: another process holds it, on this machine or on another that shared it lately.
        OSError: the lock cannot be written.
    """
    lock = Lock(Path(folder) / name, json.dumps(myself() | {"taken": secrets.token_hex(8)}))
    other = _take(lock)
    if other is not None and on_wait is None:
        raise LockedError(f"process {other['process']} on {other['host']} works in {folder}: wait for it, or {remedy}")
    if other is not None:
        _wait(lock, other, on_wait)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, ended), daemon=True)
    beat.start()
    try:
        yield lock
    finally:
        ended.set()
        beat.join()
        if lock.is_held():
            lock.path.unlink(missing_ok=True)


def wait_for(folder: Path, *, on_wait: Callable[[str], None]) -> None:
    """Return when nobody holds a folder, which need not exist.

    Args:
        folder: that somebody may hold.
        on_wait: told who does.
    """
    if holder_of(folder / ".lock"):
        with folder_lock(folder, on_wait=on_wait):
            pass


def _beat(lock: Lock, ended: threading.Event) -> None:
    """Touch the lock from time to time until the end, or until somebody has taken it over."""
    while not ended.wait(BEAT):
        with suppress(OSError):
            if lock.is_held():
                os.utime(lock.path)
