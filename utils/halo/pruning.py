"""Exact magnitude pruning and its controls, sparsity, multiply-accumulate operations. No files, no printing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LayerSparsity(NamedTuple):
    """How many weights of one layer are left."""

    name: str
    total: int
    remaining: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, in [0, 1]."""
        return 1 - self.remaining / self.total


def sparsity_per_layer(weights: Mapping[str, Tensor]) -> list[LayerSparsity]:
    """Count the non-zero weights of every tensor."""
    return [LayerSparsity(name, w.numel(), int(w.count_nonzero())) for name, w in weights.items()]


def overall_sparsity(layers: list[LayerSparsity]) -> float:
    """Return the fraction of zeros over all layers, in [0, 1]."""
    return 1 - sum(layer.remaining for layer in layers) / sum(layer.total for layer in layers)


def _check_weights(weights: Mapping[str, Tensor], fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction to prune must be in [0, 1], got {fraction}")
    for name, w in weights.items():
        if not w.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, whose magnitude has no order: use an earlier checkpoint")


def _smallest(magnitudes: Tensor, fraction: float) -> Tensor:
    """Return the positions of the round(n * fraction) smallest of the n non-zero magnitudes; ties in order."""
    candidates = magnitudes.nonzero().squeeze(1)
    count = round(len(candidates) * fraction)
    return candidates[magnitudes[candidates].argsort(stable=True)[:count]]


def _random(magnitudes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` random positions among the non-zero ones."""
    candidates = magnitudes.nonzero().squeeze(1)
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]]


def _flat_magnitudes(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([w.detach().abs().reshape(-1).cpu() for w in weights.values()])


@torch.no_grad()
def _zero_(weights: Mapping[str, Tensor], positions: Tensor) -> None:
    """Set the elements at these positions of the concatenation of all tensors to zero."""
    keep = torch.ones(sum(w.numel() for w in weights.values()), dtype=torch.bool)
    keep[positions] = False
    for w, kept in zip(weights.values(), keep.split([w.numel() for w in weights.values()]), strict=True):
        w.masked_fill_(~kept.reshape(w.shape).to(w.device), 0)


def prune_by_magnitude_(weights: Mapping[str, Tensor], fraction: float) -> list[LayerSparsity]:
    """Set the smallest weights of all layers together to zero, in place.

    Of the n weights that are not zero, exactly round(n * fraction) go; equal magnitudes go in order of position,
    so calls compose: pruning half twice leaves a quarter.

    Args:
        weights: name to tensor of any shape (`prunable_weights`).
        fraction: of the currently non-zero weights, in [0, 1].

    Returns:
        What is left of every layer.

    Raises:
        ValueError: fraction is out of range, or a weight is not finite.

    Note:
        The release removes int(n * fraction) + 1.
    """
    _check_weights(weights, fraction)
    _zero_(weights, _smallest(_flat_magnitudes(weights), fraction))
    return sparsity_per_layer(weights)


def prune_layerwise_(
    weights: Mapping[str, Tensor], fraction: float, *, generator: torch.Generator | None = None
) -> list[LayerSparsity]:
    """Prune every layer by magnitude to the same fraction of its own non-zero weights, in place.

    See `prune_by_magnitude_`; the count is rounded in each layer. `generator` is not used.
    """
    _check_weights(weights, fraction)
    for name, w in weights.items():
        prune_by_magnitude_({name: w}, fraction)
    return sparsity_per_layer(weights)


def prune_random_(weights: Mapping[str, Tensor], fraction: float, *, generator: torch.Generator) -> list[LayerSparsity]:
    """Set exactly round(n * fraction) of the n non-zero weights to zero, chosen at random, in place."""
    _check_weights(weights, fraction)
    magnitudes = _flat_magnitudes(weights)
    count = round(int(magnitudes.count_nonzero()) * fraction)
    _zero_(weights, _random(magnitudes, count, generator))
    return sparsity_per_layer(weights)


def prune_shuffled_(
    weights: Mapping[str, Tensor], fraction: float, *, generator: torch.Generator
) -> list[LayerSparsity]:
    """Remove from every layer as many weights as global magnitude pruning would, at random positions, in place."""
    _check_weights(weights, fraction)
    sizes = [w.numel() for w in weights.values()]
    removed = torch.zeros(sum(sizes), dtype=torch.bool)
    removed[_smallest(_flat_magnitudes(weights), fraction)] = True
    for (name, w), part in zip(weights.items(), removed.split(sizes), strict=True):
        magnitudes = _flat_magnitudes({name: w})
        _zero_({name: w}, _random(magnitudes, int(part.sum()), generator))
    return sparsity_per_layer(weights)


def _global_(
    weights: Mapping[str, Tensor], fraction: float, *, generator: torch.Generator | None = None
) -> list[LayerSparsity]:
    return prune_by_magnitude_(weights, fraction)


SCHEMES: dict[str, Callable[..., list[LayerSparsity]]] = {
    "global": _global_,
    "layerwise": prune_layerwise_,
    "random": prune_random_,
    "shuffle": prune_shuffled_,
}


def magnitude_threshold(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Return the largest magnitude that pruning removed, 0 if it removed nothing."""
    gone = [w[(after[name] == 0)].abs().max() for name, w in before.items() if (after[name] == 0).any()]
    return max((float(value) for value in gone), default=0.0)


class LayerMacs(NamedTuple):
    """Multiply-accumulate operations of one layer for one image."""

    name: str
    dense: int
    remaining: int


@torch.no_grad()
def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> list[LayerMacs]:
    """Count the multiply-accumulate operations of every Conv2d and Linear layer for one image.

    Each weight is used once at each output position: dense MACs = weights * positions, remaining MACs =
    non-zero weights * positions, with positions = output height * width for a convolution and 1 for a linear layer.
    Biases, BatchNorm, activations and pooling are not counted.

    Args:
        model: the network.
        shape: of one image: channels, height, width.

    Returns:
        One entry a layer, in the order in which they run.
    """
    counts: list[LayerMacs] = []
    names = {module: name for name, module in model.named_modules()}

    def count(module: nn.Module, _, output: Tensor) -> None:
        positions = output[0].numel() // module.weight.shape[0]
        weight = module.weight
        counts.append(LayerMacs(names[module], weight.numel() * positions, int(weight.count_nonzero()) * positions))

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    was_training = model.training
    try:
        model.eval()(torch.zeros(1, *shape, device=next(model.parameters()).device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return counts


def dead_filters(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return for each layer how many of its outputs have no non-zero weight left."""
    return {name: int((w.detach().flatten(1).count_nonzero(1) == 0).sum()) for name, w in weights.items()}


def savings(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, float]:
    """Return what zeros save: parameters and multiply-accumulates, all and non-zero, and their ratios.

    Args:
        model: the network.
        shape: of one image: channels, height, width.

    Returns:
        `parameters`, `parameters_nonzero`, `macs_dense`, `macs_nonzero`, `compression_ratio` (all parameters / non-zero
        ones, biases and BatchNorm included) and `theoretical_speedup` (dense / remaining multiply-accumulates).
    """
    parameters = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    macs = count_macs(model, shape)
    dense, left = sum(m.dense for m in macs), sum(m.remaining for m in macs)
    return {
        "parameters": parameters,
        "parameters_nonzero": nonzero,
        "macs_dense": dense,
        "macs_nonzero": left,
        "compression_ratio": parameters / max(nonzero, 1),
        "theoretical_speedup": dense / max(left, 1),
    }
