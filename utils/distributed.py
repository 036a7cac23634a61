"""Several processes that train one network, started by torchrun; with one process everything here does nothing."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(minutes=30)  # that the others wait for rank 0 to download and read; nccl's own are ten


class ReplicasDifferError(ArithmeticError):
    """What must be equal in all processes is not."""


def rank() -> int:
    """Return the number of this process, from 0; torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    """Return how many processes train together; torchrun sets it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Return whether this is the one process that prints and writes."""
    return processes() == 1 or rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect the processes for the length of the block: nccl on CUDA, gloo elsewhere.

    Raises:
        ConnectionError: the others cannot be reached, or one of them ended.
    """
    if processes() == 1:
        yield
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        yield
        dist.barrier()  # nobody hangs up while another is still writing
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ConnectionError(f"rank {rank()}: {lost(error)}; start the job again") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def is_lost(error: RuntimeError) -> bool:
    """Tell whether an error is what gloo, nccl or torch raise where a connection breaks, and not one of the network."""
    words = ("gloo", "NCCL", "Connection", "connection")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def lost(error: RuntimeError) -> str:
    """Say in one line that another process is gone."""
    reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    return f"another process of the job ended or could not be reached ({reason})"


def wait_for_all() -> None:
    """Return when every process has come here, so that none reads what another is still writing."""
    if processes() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Let rank 0 run the block before the others do, such as a download that all of them then read."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


def replicate(model: nn.Module, device: torch.device, *, skips: bool = False) -> nn.Module:
    """Return the network such that a backward pass leaves in every process the mean gradient over processes.

    Args:
        model: the network, on the device.
        device: of this process.
        skips: whether a step may leave parameters out, others in every process. Looking for them takes time, and where
            the first step leaves none out torch says that, in a line of its own.

    Note:
        BatchNorm normalises with the statistics of a process's own images. Its running estimates are averaged by
        `average_buffers_` once an epoch instead of being sent at every step.
    """
    if processes() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option's new name is unknown to torch 2.6
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, find_unused_parameters=skips)


def sum_(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over the processes, in place."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def average_buffers_(model: nn.Module) -> None:
    """Replace the floating point buffers of a network (BatchNorm's running estimates) by their mean, in place.

    Others, as counts of batches, which differ where processes skip other blocks, become those of the first process.
    """
    if processes() == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            sum_(buffer).div_(processes())
        else:
            first = buffer.clone(memory_format=torch.contiguous_format)
            dist.broadcast(first.view(-1).view(torch.uint8), 0)  # gloo lacks some types
            if not torch.equal(first, buffer):
                buffer.copy_(first)


def gathered(value: object) -> list:
    """Return what each process gives for a value (plain types and tensors), by rank."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names and values, bit by bit."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # bf16 too
    return digest.hexdigest()


def require_equal(tensors: Mapping[str, Tensor], what: str) -> None:
    """Compare tensors over the processes, bit by bit.

    Args:
        tensors: by name; equal in all processes unless something is wrong.
        what: their name, for the message.

    Raises:
        ReplicasDifferError: they are not.
    """
    if processes() == 1:
        return
    sums = gathered(checksum(tensors))
    if len(set(sums)) > 1:
        raise ReplicasDifferError(
            f"{what} differs between the processes (checksums {', '.join(s[:8] for s in sums)}): continue "
            "from the last checkpoint, on processes with the same hardware and torch"
        )
