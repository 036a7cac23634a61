"""Pruned networks as small files: a bit mask of the non-zero entries and their values, losslessly.

The file is a zip of `meta.json` and, for each element type, two LZMA streams: the packed bits that say which entries
are not zero, and the bytes of those entries, all first bytes, all second bytes and so on. Reading it runs no code.
"""

from __future__ import annotations

import json
import lzma
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.files.atomic import atomic_write
from utils.files.unpack import FORMAT, LARGEST

# Beside the state_dict.
KEPT = ("epoch", "acc", "acc_images", "best_acc", "config", "preprocessing", "class_names", "images", "pruning")

_SIGN = {torch.float16: 1 << 15, torch.bfloat16: 1 << 15, torch.float32: 1 << 31, torch.float64: 1 << 63}  # -0.0


def _words(tensor: Tensor) -> np.ndarray:
    """Return the elements as unsigned integers, so that -0.0 counts as non-zero and NaN survives."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}") if len(flat) else np.empty(0, "<u1")


def without_negative_zeros(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Return tensors whose -0.0 are 0.0, and how many of them there were.

    A network computes the same with either, but a -0.0 is stored as the non-zero word that it is.
    """
    counts = [int((_words(t) == _SIGN[t.dtype]).sum()) if t.dtype in _SIGN else 0 for t in tensors.values()]
    changed = {name: t + 0.0 if count else t for (name, t), count in zip(tensors.items(), counts, strict=True)}
    return changed, sum(counts)


def save_compact(path: str | Path, state: dict) -> None:
    """Write the network of a checkpoint as a compact file, atomically.

    Args:
        path: the file to write.
        state: a checkpoint; its optimizers, lam and history are left out.

    Raises:
        OSError: the file cannot be written.
        ValueError: the network is too large to be read back, or its checkpoint records more than plain values.
    """
    tensors: Mapping[str, Tensor] = state["state_dict"]
    if sum(tensor.numel() for tensor in tensors.values()) > LARGEST:
        raise ValueError(f"{path} cannot hold more than {LARGEST:,} elements: keep the checkpoint")
    kinds: dict[str, list[Tensor]] = {}
    for tensor in tensors.values():
        kinds.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(tensor)
    meta = {
        "format": FORMAT,
        "tensors": {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in tensors.items()},
        "checkpoint": {key: state[key] for key in KEPT if key in state},
    }
    try:
        described = json.dumps(meta)
    except TypeError as error:
        raise ValueError(f"what the checkpoint records beside its weights is no plain value ({error})") from error
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("meta.json", described)
        for kind, group in kinds.items():
            words = np.concatenate([_words(tensor) for tensor in group])
            mask = words != 0
            planes = words[mask].view(np.uint8).reshape(-1, words.itemsize).T
            archive.writestr(f"{kind}.mask", lzma.compress(np.packbits(mask).tobytes()))
            archive.writestr(f"{kind}.values", lzma.compress(np.ascontiguousarray(planes).tobytes()))


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether two state_dicts hold the same names, types, shapes and bits."""
    return list(one) == list(other) and all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(_words(a), _words(b))
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def entropy_bound(weights: Mapping[str, Tensor]) -> float:
    """Return N * H(p) + 32 * nonzeros bits, in bytes: a mask at its entropy and every non-zero weight as it is.

    Args:
        weights: the pruned fp32 tensors; N counts their elements, p is the fraction of non-zeros.
    """
    total = sum(w.numel() for w in weights.values())
    nonzeros = sum(int(w.count_nonzero()) for w in weights.values())
    p = nonzeros / total if total else 0.0
    entropy = -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
    return (total * entropy + 32 * nonzeros) / 8
