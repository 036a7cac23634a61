"""A training step recorded as a CUDA graph, which the host starts at once instead of kernel by kernel."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from models import ARCHS
from utils.distributed import processes
from utils.halo.guard import WATCHED_STEPS
from utils.halo.penalties import Penalty
from utils.logger import one_line, warn

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Before recording: they make the momenta, compile what is to be compiled, and a penalty's guard has the host wait.
PLAIN_STEPS = WATCHED_STEPS + 1


def can_record(args: argparse.Namespace, device: torch.device) -> bool:
    """Return whether the steps of a run may be recorded.

    Not those of a network of your own, whose forward pass may decide something on the host. Not with fp16, and not
    those of several processes: neither was tried.
    """
    return device.type == "cuda" and processes() == 1 and args.arch in ARCHS and args.amp != "fp16"


def record_cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Record what a function starts on the GPU, without running it; return what runs it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            function()
    finally:
        torch.cuda.set_stream(stream)  # a recording that fails leaves its own
    return graph.replay


class RecordedStep:
    """Runs full batches of a training step from a recording: the same kernels on the same tensors, so the same results.

    A small network has hundreds of kernels of some microseconds each, which a GPU runs faster than the host starts
    them. Learning rates and coefficients are numbers in the recording: where one has changed, PLAIN_STEPS steps go
    without and the next is recorded anew. Where recording fails, it says so once and all steps go without.

    Args:
        optimizers: of the weights and of lam.
        penalty: the penalty that they step.
        batch_size: images in a full batch; batches of another size go without.
        record: records a function; what it returns runs it again.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        penalty: Penalty,
        *,
        batch_size: int,
        record: Callable[[Callable[[], None]], Callable[[], None]] = record_cuda_graph,
    ) -> None:
        self.optimizers, self.penalty, self.batch_size, self._record = optimizers, penalty, batch_size, record
        self.works, self.recordings = True, 0
        self._factors, self._plain_steps = None, 0
        self._replay: Callable[[], None] | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._outputs: tuple[Tensor, Tensor] | None = None

    def run(self, step: Step, images: Tensor, labels: Tensor, *, also: object = None) -> tuple[Tensor, Tensor]:
        """Take a step; return its loss and logits, which the next call overwrites.

        Args:
            step: does the same in every call, but for the numbers of the optimizers and the penalty.
            images: (N, *shape), on the device.
            labels: (N,), on the device.
            also: whatever else decides what it does, to be compared from call to call.
        """
        if not self.works or len(images) != self.batch_size:
            return step(images, labels)
        factors = self._numbers(), also
        if factors != self._factors:
            self._factors, self._plain_steps, self._replay = factors, 0, None
        if self._replay is None and self._plain_steps < PLAIN_STEPS:
            self._plain_steps += 1
            with beside_default_stream(images.device):
                return step(images, labels)
        if self._replay is None and not self._recorded(step, images, labels):
            return step(images, labels)
        for kept, given in zip(self._inputs, (images, labels), strict=True):
            kept.copy_(given)
        self._replay()
        return self._outputs

    def _recorded(self, step: Step, images: Tensor, labels: Tensor) -> bool:
        self._inputs = images.clone(), labels.clone()

        def once() -> None:
            self._outputs = step(*self._inputs)

        try:
            self._replay = self._record(once)
        except RuntimeError as error:
            cause = error.__context__ or error  # the first is only that the recording is void
            warn(f"the step could not be recorded as a CUDA graph, and takes longer: {one_line(cause)}")
            self.works = False
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            return False
        self.recordings += 1
        return True

    def _numbers(self) -> list:
        """Return all numbers that a step takes from the optimizers and the penalty."""
        of_penalty = [value for value in vars(self.penalty).values() if isinstance(value, (int, float))]
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [of_penalty, *([v for k, v in group.items() if k != "params"] for group in groups)]


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream of a device, always the same, whose memory can be used again."""
    return torch.cuda.Stream(device)


@contextmanager
def beside_default_stream(device: torch.device) -> Iterator[None]:
    """Run a block on another stream than the default one, as what is then recorded needs it; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    default, other = torch.cuda.current_stream(device), side_stream(device)
    other.wait_stream(default)
    try:
        with torch.cuda.stream(other):
            yield
    finally:
        default.wait_stream(other)
