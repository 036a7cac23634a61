"""A smaller dense network that computes the same: channels that nothing reads, or that hold a constant, go.

Three passes over the graph that `torch.fx` finds. Forward: which channels hold one number, whatever the image.
Backward: which of the others the output depends on. Last, every layer keeps the rows and columns of the channels that
are left, and what the removed constants gave goes to where it is read.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from .penalty import Penalty
from .shrink_steps import NARROWED, WIDTHS, Steps, merge


def shrink(model: nn.Module) -> nn.Module:
    """Return the same network without the channels and units that do nothing.

    A channel goes if nothing reads it, or if it holds a number c_j whatever the image, as a dead filter with its
    bias, BatchNorm and ReLU does. The next layer reads such channels as sum_j c_j * w[:, j], which goes into its bias
    or, where it has none, the running mean of its BatchNorm. Where that layer pads with zeros the sum differs at the
    border: then one constant channel m stays and carries the others, w[:, m] + sum_j (c_j / c_m) * w[:, j].

    Channels that additions tie together (a residual stream) go only where no layer writes them. Every layer keeps
    one channel at least. A step that is not understood, such as a grouped convolution, keeps all that it reads.

    Args:
        model: a pruned network that `torch.fx` can trace, of maps (N, C, H, W) and features (N, C); it is not changed.

    Returns:
        A copy whose Conv2d, Linear and BatchNorm2d layers, under the same names, are narrower. In evaluation mode its
        outputs are the same within rounding. Shrinking it again changes nothing. A penalty that was an attribute is
        gone: its lam are of the old shapes.

    Raises:
        ValueError: the steps of the network cannot be found, or it cannot be copied.
    """
    try:
        small, studied = copy.deepcopy(model), copy.deepcopy(model).eval()  # where dropout does nothing to constants
    except Exception as error:  # whatever one of its attributes raises
        remedy = "remove what computes its weights anew (as torch.nn.utils.prune.remove does), or cannot be copied"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{type(model).__name__} cannot be copied ({reason}): {remedy}") from error
    for module in [*small.modules()]:
        module._modules = {name: part for name, part in module._modules.items() if not isinstance(part, Penalty)}
    steps = Steps(studied)
    kept = _find_kept(steps)
    carriers = _choose_carriers(steps, kept)
    _narrow_(small, steps, kept, carriers)
    return small


def _find_kept(steps: Steps) -> dict[int, Tensor]:
    """Return for every space which channels vary and reach the output of the network, directly or not."""
    kept: dict[int, Tensor] = {}
    live = {node: torch.zeros_like(value.varies) for node, value in steps.values.items()}
    for node, value in reversed(steps.values.items()):
        if value.space in steps.whole:
            live[node].fill_(True)
        needed = live[node] & value.varies
        kept[value.space] = kept.get(value.space, value.space in steps.whole) | needed
        if node in steps.readers:
            needed = (steps.weight(node)[needed] != 0).any(2).any(0)
        for source in node.all_input_nodes:
            if source in live:
                live[source] |= needed
    return kept


def _choose_carriers(steps: Steps, kept: dict[int, Tensor]) -> dict[fx.Node, int]:
    """Choose the constant channel that stays before every layer that cannot take constants otherwise.

    A channel more to keep is a row more to compute, which may read constants itself: so until nothing changes.

    Args:
        steps: of the network.
        kept: channels by space; the carriers are added, and one channel where none is left.

    Returns:
        The channel of the largest constant, by reader.
    """
    carriers: dict[fx.Node, int] = {}
    while True:
        before = sum(int(mask.sum()) for mask in kept.values())
        for node in reversed(steps.readers):
            source = steps.source(node)
            if source is None or node in carriers or _takes_shift(steps, node):
                continue
            read = (steps.weight(node)[kept[steps.values[node].space]] != 0).any(2).any(0)
            removed = source.fixed & read & ~kept[source.space]
            if removed.any():
                carriers[node] = int((source.constant.abs() * removed).nan_to_num(0).argmax())
                kept[source.space][carriers[node]] = True
        if before == sum(int(mask.sum()) for mask in kept.values()):
            empty = [mask for mask in kept.values() if not mask.any()]
            if not empty:
                return carriers
            for mask in empty:
                mask[0] = True


def _takes_shift(steps: Steps, node: fx.Node) -> bool:
    """Tell whether constants read by a layer are one number an output, and its bias or BatchNorm can take it."""
    return not steps.pads(node) and (steps.layer(node).bias is not None or steps.norm_after(node) is not None)


@torch.no_grad()
def _narrow_(model: nn.Module, steps: Steps, kept: dict[int, Tensor], carriers: dict[fx.Node, int]) -> None:
    """Cut every layer to the channels that are kept; readers first take what the removed constants gave them."""
    for node, value in steps.values.items():
        if steps.kind(node) not in WIDTHS:
            continue
        layer, rows = model.get_submodule(node.target), kept[value.space]
        if node in steps.readers:
            weight, source = steps.weight(node).clone(), steps.source(node)
            if source is not None:
                columns = kept[source.space]
                merged = merge(weight, source.constant, source.fixed & ~columns)
                if node in carriers:
                    weight[:, carriers[node]] += merged / source.constant[carriers[node]]
                elif _takes_shift(steps, node) and layer.bias is not None:
                    layer.bias += merged.sum(1)
                elif _takes_shift(steps, node):
                    model.get_submodule(steps.norm_after(node).target).running_mean -= merged.sum(1)
                weight = weight[:, columns]
            layer.weight.data = weight.reshape(len(weight), -1, *layer.weight.shape[2:])
        for tensor in (getattr(layer, key, None) for key in NARROWED):
            if tensor is not None:
                tensor.data = tensor.data[rows]
        sizes = layer.running_mean.shape if layer.weight is None else layer.weight.shape  # BatchNorm without factors
        for attribute, width in zip(WIDTHS[type(layer)], sizes, strict=False):
            setattr(layer, attribute, width)
