"""Which tensors are penalised and which are pruned: the only answer in the project."""

from __future__ import annotations

from torch import nn


def _layers(model: nn.Module, *, linear: bool) -> list[tuple[str, nn.Module]]:
    kinds = (nn.Conv2d, nn.Linear) if linear else (nn.Conv2d,)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def penalized_parameters(model: nn.Module, *, linear: bool = False) -> dict[str, nn.Parameter]:
    """Return every parameter of every convolution by its state_dict name, biases included.

    Args:
        model: any network.
        linear: also take the Linear layers (MNIST); on CIFAR the classifier is never penalised.

    Returns:
        Name to parameter, in the order of the network; BatchNorm never takes part.

    Raises:
        ValueError: the network has no such layer.
    """
    layers = _layers(model, linear=linear)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Conv2d layer: pass linear=True to take its Linear layers")
    named = ((name, key, p) for name, layer in layers for key, p in layer.named_parameters(recurse=False))
    return {f"{name}.{key}".lstrip("."): p for name, key, p in named}


def prunable_weights(model: nn.Module, *, linear: bool = False) -> dict[str, nn.Parameter]:
    """Return the weight of every convolution by its state_dict name: never a bias, never BatchNorm.

    Args:
        model: any network.
        linear: also take the Linear layers (MNIST); on CIFAR the classifier is never pruned.

    Returns:
        Name to weight, in the order of the network.

    Raises:
        ValueError: the network has no such layer.
    """
    return {name: p for name, p in penalized_parameters(model, linear=linear).items() if name.endswith("weight")}
