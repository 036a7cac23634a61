"""Exact magnitude pruning and its controls, sparsity, multiply-accumulate operations. No files, no printing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .parameters import CONVOLUTIONS, LINEAR, TRANSPOSED, inner_model, network_parameters, plain_name


class LayerSparsity(NamedTuple):
    """How many weights of one layer are left."""

    name: str
    total: int
    remaining: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, in [0, 1]; 0 of a layer without weights."""
        return 1 - self.remaining / self.total if self.total else 0.0


def sparsity_per_layer(weights: Mapping[str, Tensor]) -> list[LayerSparsity]:
    """Count the non-zero weights of every tensor."""
    return [LayerSparsity(name, w.numel(), int(w.count_nonzero())) for name, w in weights.items()]


def overall_sparsity(layers: list[LayerSparsity]) -> float:
    """Return the fraction of zeros over all layers, in [0, 1]."""
    return LayerSparsity("all", sum(layer.total for layer in layers), sum(layer.remaining for layer in layers)).sparsity


def _check_weights(weights: Mapping[str, Tensor], fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction to prune must be in [0, 1], got {fraction}")
    if not weights:
        raise ValueError("there are no weights to prune: the mapping is empty")
    for name, w in weights.items():
        if w.grad_fn is not None:
            raise ValueError(f"{name} is computed from other tensors, such as weight_norm's: prune those")
        if not w.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity, whose magnitude has no order: use an earlier checkpoint")


def smallest(magnitudes: Tensor, count: int) -> Tensor:
    """Return a mask, True at exactly `count` smallest elements of a vector; equal ones go in order of position."""
    if not 0 < count < len(magnitudes):
        return torch.full_like(magnitudes, count > 0, dtype=torch.bool)
    threshold = magnitudes.kthvalue(count).values
    chosen = magnitudes < threshold
    ties = (magnitudes == threshold).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.count_nonzero())]] = True
    return chosen


def _smallest_nonzero(magnitudes: Tensor, fraction: float) -> Tensor:
    """Return the mask of the round(n * fraction) smallest of the n non-zero magnitudes; ties in order."""
    left = int(magnitudes.count_nonzero())
    return smallest(magnitudes, len(magnitudes) - left + round(left * fraction)).logical_and_(magnitudes != 0)


def _random(magnitudes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the mask of `count` random ones of the non-zero magnitudes."""
    candidates = magnitudes.nonzero().squeeze(1)
    chosen = torch.zeros_like(magnitudes, dtype=torch.bool)
    chosen[candidates[torch.randperm(len(candidates), generator=generator)[:count]]] = True
    return chosen


def fraction_to_reach(weights: Mapping[str, Tensor], sparsity: float) -> float:
    """Return the fraction of the non-zero weights that is to go for this fraction of all weights to be zero.

    Pruning by it leaves exactly round(n * sparsity) zeros among all n weights; 0.0 where there are that many already.
    """
    total = sum(w.numel() for w in weights.values())
    left = sum(int(w.count_nonzero()) for w in weights.values())
    missing = round(total * sparsity) - (total - left)
    return missing / left if missing > 0 else 0.0


def _flat_magnitudes(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([w.detach().abs().reshape(-1).cpu() for w in weights.values()])


@torch.no_grad()
def _zero_(weights: Mapping[str, Tensor], gone: Tensor) -> None:
    """Set the elements where the mask of the concatenation of all tensors is True to zero."""
    for w, part in zip(weights.values(), gone.split([w.numel() for w in weights.values()]), strict=True):
        w.masked_fill_(part.reshape(w.shape).to(w.device), 0)


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
    _zero_(weights, _smallest_nonzero(_flat_magnitudes(weights), fraction))
    return sparsity_per_layer(weights)


def prune_layerwise_(weights: Mapping[str, Tensor], fraction: float) -> list[LayerSparsity]:
    """Prune every layer by magnitude to the same fraction of its own non-zero weights, in place.

    Args, Returns and Raises as `prune_by_magnitude_`; the count is rounded in each layer.
    """
    _check_weights(weights, fraction)
    for name, w in weights.items():
        prune_by_magnitude_({name: w}, fraction)
    return sparsity_per_layer(weights)


def prune_random_(weights: Mapping[str, Tensor], fraction: float, *, generator: torch.Generator) -> list[LayerSparsity]:
    """Set exactly round(n * fraction) of the n non-zero weights to zero, chosen at random, in place.

    Args, Returns and Raises as `prune_by_magnitude_`; `generator`, on the CPU, draws them.
    """
    _check_weights(weights, fraction)
    magnitudes = _flat_magnitudes(weights)
    count = round(int(magnitudes.count_nonzero()) * fraction)
    _zero_(weights, _random(magnitudes, count, generator))
    return sparsity_per_layer(weights)


def prune_shuffled_(
    weights: Mapping[str, Tensor], fraction: float, *, generator: torch.Generator
) -> list[LayerSparsity]:
    """Remove from every layer as many weights as global magnitude pruning would, at random positions, in place.

    Args, Returns and Raises as `prune_by_magnitude_`; `generator`, on the CPU, draws them.
    """
    _check_weights(weights, fraction)
    removed = _smallest_nonzero(_flat_magnitudes(weights), fraction).split([w.numel() for w in weights.values()])
    for (name, w), part in zip(weights.items(), removed, strict=True):
        magnitudes = _flat_magnitudes({name: w})
        _zero_({name: w}, _random(magnitudes, int(part.sum()), generator))
    return sparsity_per_layer(weights)


def _drawing_nothing(prune: Callable[..., list[LayerSparsity]]) -> Callable[..., list[LayerSparsity]]:
    """Return a scheme that needs no generator in the form of those that do."""
    return lambda weights, fraction, *, generator=None: prune(weights, fraction)


SCHEMES: dict[str, Callable[..., list[LayerSparsity]]] = {
    "global": _drawing_nothing(prune_by_magnitude_),
    "layerwise": _drawing_nothing(prune_layerwise_),
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


def _uses(layer: nn.Module, inputs: dict[str, Tensor], output: Tensor) -> dict[str, list[tuple[Tensor, int]]]:
    """Return the weights of a layer, each with how often one of its elements is used; keys extend the layer's name."""
    if isinstance(layer, nn.MultiheadAttention):  # which reads its out_proj without calling it
        q, k, v = (inputs[name].numel() // inputs[name].shape[-1] for name in ("query", "key", "value"))
        separate = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        weights = separate if layer.in_proj_weight is None else layer.in_proj_weight.chunk(3)
        return {"": [*zip(weights, (q, k, v), strict=True)], ".out_proj": [(layer.out_proj.weight, q)]}
    # The first dimension of a weight is its outputs, but the inputs of a transposed convolution.
    x = inputs["input"] if isinstance(layer, TRANSPOSED) else output
    return {"": [(layer.weight, x.numel() // layer.weight.shape[0])]}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Have a network in evaluation mode for the block; then each of its modules has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def count_macs(model: nn.Module, shape: tuple[int, ...]) -> list[LayerMacs]:
    """Count the multiply-accumulate operations of every convolution, Linear and attention layer for one image.

    Each weight is used once at each position: dense MACs = weights * positions, remaining MACs = non-zero weights *
    positions. The positions are those of the output for a convolution, those of the input for a transposed one, and
    the tokens (1 without any) for Linear and for the projections of MultiheadAttention, whose input projections make
    one entry and whose output projection another. Products of activations with each other (queries with keys,
    attention with values), biases, normalisation, activations and pooling are not counted.

    Args:
        model: the network; its input is floating point.
        shape: of one input, such as channels, height, width, or tokens, features.

    Returns:
        One entry a layer and call, in the order in which they run.

    Warns:
        UserWarning: layers were not called, so nothing is counted for them: they are not in use, or their weight is
            read by another module.
    """
    model = inner_model(model)
    counts: list[LayerMacs] = []
    names = {module: plain_name(name) for name, module in model.named_modules()}

    def count(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        order = ("query", "key", "value") if isinstance(layer, nn.MultiheadAttention) else ("input",)
        for suffix, uses in _uses(layer, dict(zip(order, args, strict=False)) | kwargs, output).items():
            dense = sum(w.numel() * times for w, times in uses)
            remaining = sum(int(w.count_nonzero()) * times for w, times in uses)
            counts.append(LayerMacs(names[layer] + suffix, dense, remaining))

    layers = [module for module in names if isinstance(module, CONVOLUTIONS + LINEAR)]
    with _evaluating(model), ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(count, with_kwargs=True).remove)
        model(next(model.parameters()).new_zeros(1, *shape))
    uncalled = {names[layer] for layer in layers} - {entry.name for entry in counts}
    if uncalled:
        listed = ", ".join(sorted(uncalled)[:3]) + (", ..." if len(uncalled) > 3 else "")
        warnings.warn(
            f"no operations were counted for {len(uncalled)} layers that were not called: {listed}", stacklevel=2
        )
    return counts


def dead_filters(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return for each layer how many of its outputs have no non-zero weight left (inputs, if it is transposed)."""
    return {name: int((w.detach().flatten(1).count_nonzero(1) == 0).sum()) for name, w in weights.items()}


def savings(model: nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """Return what zeros save: parameters and multiply-accumulates, all and non-zero, and their ratios.

    Args:
        model: the network.
        shape: of one input; see `count_macs`.

    Returns:
        `parameters`, `parameters_nonzero`, `macs_dense`, `macs_nonzero`, `compression_ratio` (all parameters / non-zero
        ones, biases and BatchNorm included) and `theoretical_speedup` (dense / remaining multiply-accumulates).
    """
    own = network_parameters(model)
    parameters = sum(p.numel() for p in own)
    nonzero = sum(int(p.count_nonzero()) for p in own)
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
