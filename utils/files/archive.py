"""Zip files that are what they say: every byte checked, and nothing in them larger than the file itself."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

CHUNK = 1 << 20  # bytes that are read at once


class RefusedError(ValueError):
    """A file states what cannot be, or what is not accepted; the message says what, after the file's name."""


def is_archive(path: str | Path) -> bool:
    """Tell whether a file begins as a zip does, which is how torch.load tells."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


@contextmanager
def open_archive(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip of ours or of torch.save for reading, after a look at all of it.

    The checksum is the CRC-32 that the zip format has for every member: torch.save and zipfile write it, but torch.load
    does not look at it.

    Raises:
        RefusedError: a byte was changed, or what it states of itself could be read in two ways or be a bomb.
        Exception: whatever zipfile raises when the directory is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = {member.filename.lower() for member in members}  # as torch's reader compares them
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        size = sum(member.file_size for member in members)
        if archive.comment or packed or len(names) < len(members) or size > os.path.getsize(path):
            raise RefusedError("is no zip as this project or torch writes it: use another copy")
        _check_sums(archive)
        yield archive


def _check_sums(archive: zipfile.ZipFile) -> None:
    """Compare every member with its CRC-32; torch writes zeros throughout where it is told not to compute them."""
    if not any(member.CRC for member in archive.infolist()):
        for member in archive.infolist():
            member.CRC = None  # tells zipfile not to compare either
        return
    for member in archive.infolist():
        with archive.open(member) as file:
            try:
                while file.read(CHUNK):
                    pass
            except zipfile.BadZipFile as error:
                raise RefusedError(
                    f"is damaged: {member.filename} does not have its checksum; use another copy"
                ) from error


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write what `numpy.savez` does, whatever the names: that takes them as keywords, of which `file` is its own."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array)
