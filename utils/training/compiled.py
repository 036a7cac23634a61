"""torch.compile for the network of a training run: cached on disk, visibly, and only where it works."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.halo.native import find_compiler
from utils.logger import one_line, warn

CACHE = Path("~/.cache/halo/inductor")


class CompiledNetwork:
    """Runs full batches through torch.compile, others as they are: another size would compile a second time.

    Without a C++ compiler, or where compiling the forward pass fails, it says so once and runs the network as it is.

    Args:
        network: the network, distributed or not.
        batch_size: images in a full batch of this process.
        round_casts: round where the network does, with torch 2.14 or newer; else the compiler leaves out casts to bf16
            and back within a step of its own.
    """

    def __init__(self, network: nn.Module, *, batch_size: int, round_casts: bool = False) -> None:
        self.network, self.batch_size = network, batch_size
        self.batches, self.started = 0, 0.0
        self.compiled: Callable[[Tensor], Tensor] | None = None
        if find_compiler() is None:
            warn("--compile needs a C++ compiler (g++, or that of the variable CXX): the network runs uncompiled")
            return
        use_cache()
        round_casts = round_casts and torch.__version__ >= "2.14"  # in 2.6 it fails to compile
        options = {"emulate_precision_casts": True} if round_casts else None
        self.compiled = torch.compile(network, dynamic=False, options=options)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of a batch."""
        if self.compiled is None or len(images) != self.batch_size:
            return self.network(images)
        self.batches += 1
        if self.batches == 1:
            return self._first(images)
        if self.batches == 2:
            warn(f"compiled in {time.perf_counter() - self.started:.0f} s")
        return self.compiled(images)

    @property
    def in_first_batch(self) -> bool:
        """Whether the backward pass is still to be compiled, or is being compiled."""
        return self.compiled is not None and self.batches == 1

    def _first(self, images: Tensor) -> Tensor:
        """Compile, on the first batch (its backward pass is compiled when that runs)."""
        warn("compiling the network: up to a minute the first time, a few seconds once it is in the cache")
        self.started = time.perf_counter()
        try:
            return self.compiled(images)
        except RuntimeError as error:
            warn(f"--compile failed, the network runs uncompiled: {one_line(error)}")
            self.compiled = None
            return self.network(images)


def use_cache() -> None:
    """Let compiled code outlive a restart, which empties the temporary folder where torch would keep it."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # else it warns that there is no GPU
    try:
        folder = CACHE.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a full or read-only disk; no home
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
