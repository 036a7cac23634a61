"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` only when the block ends well.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and the file is renamed, so a
    reader (or a process killed at any moment) finds the old file or the new one, whole. A symbolic link stays, and
    what it names is replaced.

    Args:
        path: the file to write; its folder must exist.

    Raises:
        OSError: the file cannot be written; what `path` held before is untouched.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # nobody else's, on no machine
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {path}: {reason}; free space or choose another folder, nothing is lost") from error
    finally:
        with suppress(OSError):  # where it could not be made, what is wrong is known already
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable where a folder can be opened (not on Windows) and flushed (not on every file system)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # the file is whole and in its place by now
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def printable(text: str) -> str:
    """Return a text in which what UTF-8 cannot hold, as in names of files that are not UTF-8, stands as \\udcff."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8.

    Raises:
        OSError: the file cannot be written; the previous file is untouched.
    """
    with atomic_write(path) as file:
        file.write(printable(text).encode())
