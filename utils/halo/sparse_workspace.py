"""Memory for the maps of sparse inference, in pages as large as the system gives."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

HUGE = 2**21  # bytes of a large page on x86 and most of ARM
ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


def zeros(count: int) -> Tensor:
    """Return float32 zeros; many of them in large pages.

    Note:
        The maps of many channels lie in more small pages than the processor remembers the places of.
    """
    if ADVICE is None or 4 * count < HUGE:
        return torch.zeros(count, dtype=torch.float32, device="cpu")
    size = (-(-4 * count // HUGE) + 1) * HUGE
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        pages.madvise(ADVICE)
    floats = torch.frombuffer(pages, dtype=torch.float32)
    start = -floats.data_ptr() % HUGE // 4
    return floats[start : start + count]
