"""Eigenvalue energy of layer outputs: streaming covariance and the hooks that feed it. No files, no printing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = (0.5, 0.9, 0.95, 0.99)

# How an output (N, C, H, W) becomes one vector of C numbers an image.
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda maps: F.adaptive_max_pool2d(maps, 1).flatten(1),
    "avg": lambda maps: F.adaptive_avg_pool2d(maps, 1).flatten(1),
    "topleft": lambda maps: maps[:, :, 0, 0],  # what the release does
}


class StreamingCovariance:
    """Covariance of vectors that come in batches, in one pass (Chan, Golub and LeVeque 1979).

    Two batches of n and m vectors, whose means differ by d, merge as S = S_n + S_m + d d^T * n * m / (n + m).
    Memory is two matrices of size x size in float64, whatever the number of vectors.

    Args:
        size: length of a vector.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    def update(self, batch: Tensor) -> None:
        """Add vectors (n, size)."""
        batch = batch.detach().to("cpu", torch.float64)
        n = len(batch)
        mean = batch.mean(0)
        centred, difference = batch - mean, mean - self.mean
        total = self.count + n
        self.scatter.addmm_(centred.T, centred)
        self.scatter.addr_(difference, difference, alpha=self.count * n / total)
        self.mean += difference * (n / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Return the covariance with divisor count - 1, as numpy.cov does; 0 where only rounding in fp32 varies.

        Raises:
            ValueError: fewer than two vectors were added.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        covariance = self.scatter / (self.count - 1)
        constant = covariance.diagonal() <= (8 * torch.finfo(torch.float32).eps * self.mean).square()
        covariance[constant] = covariance[:, constant] = 0
        return covariance


def eigenvalue_energy(covariance: Tensor) -> Tensor:
    """Return the eigenvalues of a covariance in descending order, divided by their sum.

    Args:
        covariance: symmetric, (C, C).

    Returns:
        (C,), from 0 to 1, of sum 1; all 0 where nothing varies (a dead layer).
    """
    values = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    total = values.sum()
    return values / total if total > 0 else values


def components(energy: Tensor) -> dict[str, int]:
    """Return how many of the largest eigenvalues reach 50, 90, 95 and 99% of the sum; 0 where nothing varies."""
    cumulative = energy.cumsum(0)
    # A last sum of 1 - 1e-16 must still count as all of it.
    return {f"{100 * p:g}%": int((cumulative < p - 1e-12).sum()) + 1 if energy.any() else 0 for p in LEVELS}


def effective_rank(energy: Tensor) -> float:
    """Return exp(-sum_i e_i log e_i), from 1 to C (Roy and Vetterli, EUSIPCO 2007); 0 where nothing varies."""
    positive = energy[energy > 0]
    return float(torch.exp(-(positive * positive.log()).sum())) if len(positive) else 0.0


def measured_layers(model: nn.Module, *, linear: bool, shape: Sequence[int]) -> dict[str, nn.Module]:
    """Return the layers whose outputs are looked at: every Conv2d, with `linear` the hidden Linear layers too.

    Args:
        model: the network, left in evaluation mode.
        linear: whether Linear layers count.
        shape: channels, height and width of its images. The Linear layer that runs last on one gives the logits.
    """
    kinds = (nn.Conv2d, nn.Linear) if linear else (nn.Conv2d,)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if linear:
        ran: list[str] = []
        image = torch.zeros(1, *shape, device=next(model.parameters()).device)
        with torch.inference_mode(), watch_outputs(layers, lambda name, output: ran.append(name)):
            model.eval()(image)
        if ran and isinstance(layers[ran[-1]], nn.Linear):
            del layers[ran[-1]]
    return layers


@contextmanager
def watch_outputs(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, output)` whenever one of the layers runs within the block; the hooks go with the block."""

    def hook_for(name: str) -> Callable:
        return lambda module, inputs, output: see(name, output)

    hooks = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def layer_energies(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterator[tuple[Tensor, Tensor]], *, pool: str
) -> dict[str, Tensor]:
    """Return the eigenvalue energy of each layer's pooled output over all images.

    Args:
        model: the network, left in evaluation mode.
        layers: those of its layers to look at, by name.
        batches: images and labels on the network's device.
        pool: a key of POOLS.

    Returns:
        Name to (C,), descending, of sum 1, of the layers that ran. Of a Linear layer that reads several vectors an
        image (tokens), each counts.

    Raises:
        ValueError: fewer than two vectors came, or an output is NaN or infinite.

    Note:
        The release takes the top-left pixel of augmented training images and a non-symmetric eigensolver.
    """
    statistics: dict[str, StreamingCovariance] = {}

    def see(name: str, output: Tensor) -> None:
        vectors = POOLS[pool](output) if isinstance(layers[name], nn.Conv2d) else output.flatten(0, -2)
        statistics.setdefault(name, StreamingCovariance(vectors.shape[1])).update(vectors)

    model.eval()
    with watch_outputs(layers, see):
        for images, *_ in batches:
            model(images)
    covariances = {name: statistics[name].covariance() for name in layers if name in statistics}
    for name, covariance in covariances.items():
        if not covariance.isfinite().all():
            raise ValueError(f"the outputs of {name} are NaN or infinite: use another checkpoint")
    return {name: eigenvalue_energy(covariance) for name, covariance in covariances.items()}
