"""Memory that a training step frees, kept by the process for the next one."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGEST = 32 * 2**20  # bytes: the most that M_MMAP_THRESHOLD takes


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed: every step takes the same memory again, and the system hands it out page by page.

    By default glibc returns what lies free at the end of its memory, and the kernel clears it again at the next use:
    some 10,000 to 25,000 pages a step of ResNet-50 (benchmarks/run.py --only malloc). The results do not change.

    Returns:
        Whether malloc has been told; not so outside of Linux with glibc, or where the environment sets its thresholds.

    Note:
        It holds for the whole process, so the scripts call it, and `halo` in a loop of one's own does not. Blocks of
        more than 32 MiB are returned as before. The release left malloc as it is.
    """
    said = " ".join([os.environ.get("GLIBC_TUNABLES", ""), *os.environ]).lower()
    told = "trim_threshold" in said or "mmap_threshold" in said
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not told else None
    return bool(mallopt and mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_THRESHOLD, LARGEST))
