"""A look into a checkpoint before torch loads it: what it would run, and what it would allocate."""

from __future__ import annotations

import io
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, NamedTuple

import torch

from utils.files.archive import RefusedError, is_archive, open_archive

COULD_RUN = "is refused, it holds objects that could run code: use a file of tensors and plain types"
OTHER_KIND = "holds a tensor that is sparse, quantised or of another kind that no network here has: use a dense one"
TOO_LARGE = "states a tensor that is larger than its data: use another copy"
_BY_SIZE = {8: "Double Long", 4: "Float Int", 2: "Half BFloat16 Short", 1: "Char Byte Bool Untyped"}
# bytes of an element, by the name that a storage has in a file
ITEMSIZES = {f"{name}Storage": size for size, names in _BY_SIZE.items() for name in names.split()}
# of the pickle format: those that allocate what they state, or reach beyond find_class
_LEFT_OUT = (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4)


class Storage(NamedTuple):
    """The memory of one or more tensors, as a checkpoint states it."""

    elements: int
    bytes: int


class Look(pickle._Unpickler):  # in Python: the one in C allocates as much as a file of a few bytes asks for
    """Goes through a pickle of torch.save without making tensors, and keeps what memory they will have.

    Attributes:
        storages: by key, after `load`.

    Raises:
        RefusedError: a tensor is of another kind than dense, or larger than its storage; or something is neither a
            tensor nor of plain types.
    """

    dispatch = {code: do for code, do in pickle._Unpickler.dispatch.items() if bytes([code]) not in _LEFT_OUT}

    def __init__(self, file: IO[bytes] | SimpleNamespace) -> None:
        super().__init__(file, fix_imports=False, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> object:
        """Return what stands for a name in a pickle: a type of no effect, or a function that looks at a tensor."""
        known: dict[tuple[str, str], Callable] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch", "device"): lambda *place: None,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *more: tensor,
            ("torch._utils", "_rebuild_tensor"): _tensor,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name in ITEMSIZES:
            return ITEMSIZES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return None
        of_torch = module.split(".")[0] == "torch" and ("_rebuild" in name or name.endswith("Storage"))
        raise RefusedError(OTHER_KIND if of_torch else COULD_RUN)

    def persistent_load(self, pid: tuple) -> Storage:
        """Return a storage as it is stated: "storage", type, key, place, number of elements."""
        tag, itemsize, key, _, elements = pid[:5]
        if tag != "storage" or type(elements) is not int or elements < 0:
            raise RefusedError(TOO_LARGE)
        return self.storages.setdefault(key, Storage(elements, elements * itemsize))


def _tensor(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: object) -> None:
    """Compare a tensor with its storage: elements may neither lie outside it nor be more than it has."""
    if not isinstance(storage, Storage) or len(size) != len(stride):
        raise RefusedError(OTHER_KIND)
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise RefusedError(TOO_LARGE)
    elements = math.prod(size)
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if elements else 0
    if max(elements, end) > storage.elements:
        raise RefusedError(TOO_LARGE)


def inspect(path: str | Path) -> None:
    """Look at a file of torch.save, in either of its formats, before torch.load trusts the sizes in it.

    Raises:
        RefusedError: it would run code, allocate what it does not hold, or has a byte that was changed.
        Exception: whatever a damaged file makes zipfile and pickle raise.
    """
    if is_archive(path):
        _inspect_archive(path)
    else:
        _inspect_stream(path)


def _inspect_archive(path: str | Path) -> None:
    with open_archive(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        look = Look(io.BytesIO(archive.read(name)))
        look.load()
        there = {member.filename: member.file_size for member in archive.infolist()}
    folder = name.removesuffix("data.pkl")
    if any(there.get(f"{folder}data/{key}") != storage.bytes for key, storage in look.storages.items()):
        raise RefusedError(TOO_LARGE)


def _inspect_stream(path: str | Path) -> None:
    """Look at the format of older versions of torch, which has no checksums: three pickles, the content, the data."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        # read() allocates what it is asked for before it finds out that the file has less
        bounded = SimpleNamespace(read=lambda count: file.read(min(count, size)), readline=file.readline)
        for _ in range(4):
            look = Look(bounded)
            look.load()
    if sum(storage.bytes for storage in look.storages.values()) > size:
        raise RefusedError(TOO_LARGE)
