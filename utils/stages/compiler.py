"""torch.compile at its best for inference, as something to compare with: bounded in time, and only where it works."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.halo.native import find_compiler
from utils.logger import duration, one_line, warn
from utils.training.compiled import use_cache

LIMIT = 150.0  # seconds: once compiling has taken so long, no further batch size is compiled


class Compiler:
    """Compiles a network for one batch size after the other, weights frozen into the code.

    Args:
        model: in evaluation mode; it is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.left = model, LIMIT
        if find_compiler() is None:
            warn("no C++ compiler (g++, or that of the variable CXX): torch.compile is left out")
            self.left = 0.0
        use_cache()

    @torch.no_grad()
    def compile(self, images: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Return the network compiled for images of this shape, None with a note where that is left out."""
        if self.left <= 0:
            return None
        start = time.perf_counter()
        torch.compiler.reset()  # else sizes add up until torch gives up
        compiled = torch.compile(self.model, dynamic=False, options={"freezing": True})
        try:
            compiled(images)
        except Exception as error:  # whatever a compiler raises
            warn(f"torch.compile failed and is left out: {one_line(error)}")
            self.left = 0.0
            return None
        self.left -= time.perf_counter() - start
        if self.left <= 0:
            warn(f"torch.compile took {duration(LIMIT - self.left)}: it is left out for larger batches")
        return compiled
