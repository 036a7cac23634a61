"""The widths of a network: how many channels or units each layer has, which a checkpoint of a shrunk one records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

WIDTHS = {  # the attributes that state the width of a layer: of its output, of its input
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
    nn.BatchNorm2d: ("num_features",),
}
NARROWED = ("weight", "bias", "running_mean", "running_var")  # of the tensors that such a layer may hold


def widths_of(model: nn.Module) -> dict[str, list[int]]:
    """Return outputs and inputs of every Conv2d and Linear layer, and channels of every BatchNorm2d, by name."""
    return {
        name: [getattr(layer, attribute) for attribute in WIDTHS[type(layer)]]
        for name, layer in model.named_modules()
        if type(layer) in WIDTHS and getattr(layer, "groups", 1) == 1
    }


def narrow_(model: nn.Module, widths: Mapping[str, Sequence[int]]) -> None:
    """Cut layers to their first outputs and inputs, in place, so that they keep the initial values they have.

    Args:
        model: a network of full width.
        widths: as from `widths_of`; layers that are not named stay as they are.

    Raises:
        ValueError: a layer is missing, or is narrower already.
    """
    full = widths_of(model)
    for name, sizes in widths.items():
        if name not in full or len(sizes) != len(full[name]):
            raise ValueError(f"widths name {name!r} {sizes!r}, which {type(model).__name__} does not have")
        if not all(type(n) is int and 1 <= n <= most for n, most in zip(sizes, full[name], strict=True)):
            raise ValueError(f"widths of {name!r} are {sizes!r}: give whole numbers from 1 to {full[name]}")
        layer = model.get_submodule(name)
        if list(sizes) == full[name]:  # nothing to cut, and its weight may be computed anew, as by spectral_norm
            continue
        for tensor in (getattr(layer, key, None) for key in NARROWED):
            if tensor is not None:
                cut = tuple(slice(n) for n, _ in zip(sizes, tensor.shape, strict=False))
                tensor.data = tensor.data[cut].contiguous()
        for attribute, width in zip(WIDTHS[type(layer)], sizes, strict=True):
            setattr(layer, attribute, width)
