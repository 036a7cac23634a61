"""Compact files read with care: nothing is allocated before its size is known to be right."""

from __future__ import annotations

import json
import lzma
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.files.archive import RefusedError, is_archive, open_archive

FORMAT = "halo-compact-1"
LARGEST = 1 << 27  # elements of a network, nine times those of VGG-16: a few bytes can state any number of zeros
LZMA_MEMORY = 1 << 26  # bytes for unpacking; what this project writes needs 9 million
KINDS = "float16 bfloat16 float32 float64 uint8 int8 int16 int32 int64 bool".split()


def is_compact(path: str | Path) -> bool:
    """Tell whether a file is of this format."""
    if not is_archive(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "meta.json" in archive.namelist()


def load_compact(path: str | Path) -> dict:
    """Read a compact file as a checkpoint.

    Raises:
        RefusedError: it is of another format, or its parts do not fit each other.
        Exception: whatever a damaged file makes zipfile, json and lzma raise.
    """
    with open_archive(path) as archive:
        meta = json.loads(archive.read("meta.json"))
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            found = meta.get("format") if isinstance(meta, dict) else None
            raise RefusedError(f"is of format {found!r}, and this version reads {FORMAT!r}: use one that knows it")
        entries, state = meta.get("tensors"), meta.get("checkpoint")
        if not isinstance(state, dict) or not _are_entries(entries):
            raise RefusedError("does not say what tensors it holds: use another copy")
        kinds = dict.fromkeys(kind for kind, _ in entries.values())
        parts = {f"{kind}.{part}" for kind in kinds for part in ("mask", "values")}
        if set(archive.namelist()) != {"meta.json", *parts}:
            raise RefusedError("lacks a part or has one too many: use another copy")
        if sum(math.prod(shape) for _, shape in entries.values()) > LARGEST:
            raise RefusedError(f"states more than {LARGEST:,} elements, which no network here has: use another copy")
        tensors: dict[str, Tensor] = dict.fromkeys(entries)
        for kind in kinds:
            tensors |= _read_kind(archive, kind, {n: shape for n, (its, shape) in entries.items() if its == kind})
    return state | {"state_dict": tensors}


def _are_entries(entries: object) -> bool:
    """Tell whether this is a dict of name to type and shape."""
    if not isinstance(entries, dict):
        return False
    for entry in entries.values():
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in KINDS and isinstance(entry[1], list)):
            return False
        if any(type(n) is not int or n < 0 for n in entry[1]):
            return False
    return True


def _read_kind(archive: zipfile.ZipFile, kind: str, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Rebuild the tensors of one type from their common mask and values."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    total, dtype = sum(sizes), getattr(torch, kind)
    bits = np.unpackbits(np.frombuffer(_unpack(archive.read(f"{kind}.mask"), -(-total // 8)), np.uint8))
    if bits[total:].any():
        raise RefusedError("has a mask longer than its tensors: use another copy")
    mask = bits[:total].view(bool)
    count = int(mask.sum())
    planes = np.frombuffer(_unpack(archive.read(f"{kind}.values"), count * dtype.itemsize), np.uint8)
    words = np.zeros(total, f"<u{dtype.itemsize}")
    words[mask] = np.ascontiguousarray(planes.reshape(dtype.itemsize, count).T).view(words.dtype)[:, 0]
    flat = torch.from_numpy(words.view(np.uint8)).view(dtype)
    parts = zip(shapes.items(), flat.split(sizes), strict=True)
    return {name: part.reshape(shape).clone() for (name, shape), part in parts}


def _unpack(packed: bytes, size: int) -> bytes:
    """Return what an LZMA stream holds, which must be `size` bytes: one byte more is the most that it is read to."""
    reader = lzma.LZMADecompressor(memlimit=LZMA_MEMORY)
    content = reader.decompress(packed, max_length=size + 1)
    if len(content) == size and not reader.eof:
        content += reader.decompress(b"", max_length=1)  # an end that was still to come
    if len(content) != size or not reader.eof or reader.unused_data:
        raise RefusedError("has a mask and values that do not fit its tensors: use another copy")
    return content
