"""Sparse inference on the CPU: a pruned network that multiplies only the weights that are left."""

from __future__ import annotations

import ctypes
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .native import load_native
from .shrink import shrink
from .sparse_plan import Plan
from .sparse_program import KERNELS, Program, Shape
from .sparse_terms import live_network
from .sparse_trace import trace
from .sparse_workspace import zeros

KERNEL = Path(__file__).with_name("sparse_kernel.cpp")
THREAD = 25_000  # vector operations, some 10 microseconds: less is not worth waking a thread for
SHARE = 15_000  # of an operation: less is not worth that threads wait for each other after it
PLANS_KEPT = 8  # shapes of images for which a network keeps what it worked out


@cache
def load_kernel() -> ctypes.CDLL:
    """Compile the kernel, once a process.

    Raises:
        OSError: there is no compiler, or it fails.
    """
    library = load_native(KERNEL, fuse=True)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.halo_sparse_run.argtypes = [*[pointer] * 4, *[number] * 4, pointer, number]
    library.halo_sparse_run.restype = None
    return library


class _Prepared(NamedTuple):
    """A network ready for images of one shape."""

    block: Plan  # that for one image where a block would be too large
    image: Plan
    size: int  # floats of workspace of a thread
    output: tuple[int, ...]  # shape of one image's output
    alone: float  # how many images one by one take as long as one block
    workspaces: list[Tensor]  # that no call uses just now


class SparseNetwork:
    """A pruned network, compiled to multiply its non-zero weights only.

    BatchNorm is folded into the weights. Images go through the whole network in blocks of as many as a register has
    floats (16 with AVX-512), one block a thread, so that one weight is one multiply-add of a register; fewer images go
    through one by one, with neighbouring pixels in a register. Threads that are left over share large operations.

    Args:
        model: in evaluation mode, made of Conv2d, BatchNorm, ReLU, max, average and adaptive average pooling,
            additions, flatten, Linear and Dropout, as modules or functions. Its weights are copied: what happens to
            it later changes nothing here.

    Attributes:
        compiled: whether the kernel runs. False where there is no C++ compiler: then torch runs what `shrink` leaves,
            with BatchNorm folded. A copy that is unpickled there runs as it was, zeros included.

    Raises:
        ValueError: the model is in training mode or has an operation that is not supported; the message names it.

    Warns:
        UserWarning: there is no C++ compiler.

    Note:
        Logits equal those of the model to about 1e-6 of the largest. A weight of zero is skipped also where torch would
        multiply it by infinity or NaN. What flatten returns is a view of the map, as it is of contiguous images.
    """

    def __init__(self, model: nn.Module) -> None:
        self.__setstate__(trace(model))
        if not self.compiled:
            with suppress(ValueError):  # it cannot be copied: torch runs it as it is
                self.program = trace(shrink(model))

    def __getstate__(self) -> Program:
        """Return what a copy needs; the rest holds addresses."""
        return self.program

    def __setstate__(self, program: Program) -> None:
        self.program = program
        self._prepared: dict[Shape, _Prepared] = {}
        try:
            self._kernel = load_kernel()
        except OSError as error:
            self._kernel = None
            warnings.warn(f"{error}: torch runs the network instead, which takes longer", stacklevel=3)

    @property
    def compiled(self) -> bool:
        """Whether the kernel runs."""
        return self._kernel is not None

    def __repr__(self) -> str:
        """Say how many weights are left."""
        weights = [op.weight for op in self.program.ops if op.kind in KERNELS]
        total, left = sum(w.numel() for w in weights), sum(int(w.count_nonzero()) for w in weights)
        return f"SparseNetwork({len(weights)} layers, {left} of {total} weights, compiled={self.compiled})"

    def __call__(self, images: Tensor) -> Tensor:
        """Return what the model returns.

        Args:
            images: (N, C, H, W), float32, on the CPU; any N, and any size that the model takes as
                long as no map of one image takes 2 GiB.

        Returns:
            (N, classes), or maps (N, C', H', W') where the model returns maps. It uses torch's number of threads.

        Raises:
            TypeError: images are not a float32 tensor on the CPU.
            ValueError: images have not four dimensions, do not fit the network, or are too large.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.float32 or images.device.type != "cpu":
            have = f"{images.dtype} on {images.device}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a float32 tensor on the CPU, not {have}: call .float().cpu()")
        if images.dim() != 4:
            raise ValueError(f"images must be (N, C, H, W), not {tuple(images.shape)}: use unsqueeze(0) for one image")
        prepared = self._prepared.get(images.shape[1:])
        if prepared is None:
            with torch.device("cpu"):
                prepared = self._prepare(Shape(*images.shape[1:]))
        if self._kernel is None:
            with torch.no_grad():
                return self.program.run(images)
        images = images.contiguous()
        count = len(images)
        out = torch.empty((count, *prepared.output), dtype=torch.float32, device="cpu")  # whatever the default is
        if count:
            self._run(prepared, images, out, count)
        return out

    def _prepare(self, shape: Shape) -> _Prepared:
        """Work out everything that depends on the images' shape, and keep it for the next call."""
        network = live_network(self.program, shape)
        lanes = self._kernel.halo_sparse_lanes() if self._kernel else 1
        try:
            block = Plan(network, lanes=lanes, image=False, base=0)
            image = Plan(network, lanes=lanes, image=True, base=block.size)
        except ValueError:  # a block is too large; what does not fit one image either is raised again
            block = image = Plan(network, lanes=lanes, image=True, base=0)
        after = network.shapes[self.program.output]
        output = (after.features,) if self.program.flat else tuple(after)
        size = image.c.base + image.size
        prepared = _Prepared(block, image, size, output, block.cost / max(image.cost, 1), [])
        while len(self._prepared) >= PLANS_KEPT:
            self._prepared.pop(next(iter(self._prepared)), None)
        self._prepared[shape] = prepared
        return prepared

    def _run(self, prepared: _Prepared, images: Tensor, out: Tensor, count: int) -> None:
        """Call the kernel with a workspace that nobody else uses meanwhile."""
        threads = torch.get_num_threads()
        lanes = prepared.block.lanes
        rest = count % lanes
        turns = rest if count > lanes else -(-rest // threads)  # of single images that the rest would take
        singles = rest if turns <= prepared.alone else 0
        if prepared.block is prepared.image:
            singles = count
        threads, shared = _threads_for(prepared, -(-(count - singles) // lanes), singles, most=threads)
        size = prepared.size if shared else threads * prepared.size
        try:
            workspace = prepared.workspaces.pop()
        except IndexError:
            workspace = None
        if workspace is None or len(workspace) < size:
            workspace = zeros(size)
        plans = ctypes.byref(prepared.block.c), ctypes.byref(prepared.image.c)
        data = images.data_ptr(), out.data_ptr(), count, singles, threads, shared
        self._kernel.halo_sparse_run(*plans, *data, workspace.data_ptr(), prepared.size)
        prepared.workspaces.append(workspace)


def _threads_for(prepared: _Prepared, blocks: int, singles: int, *, most: int) -> tuple[int, bool]:
    """Return how many threads are worth waking, and whether they take blocks and images together, one after the other.

    They do where there are at least two threads for each, and the operations are large.
    """
    used = [plan for plan, jobs in ((prepared.block, blocks), (prepared.image, singles)) if jobs]
    operation = min(plan.cost / max(plan.c.count, 1) for plan in used)
    sharing = min(most, int(operation) // SHARE)
    if sharing >= 2 * (blocks + singles):
        return sharing, True
    work = blocks * prepared.block.cost + singles * prepared.image.cost
    return max(min(most, blocks + singles, int(work) // THREAD), 1), False
