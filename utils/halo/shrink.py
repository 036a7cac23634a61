"""A smaller dense network that computes the same: channels that nothing reads, or that hold a constant, go.

Three passes over the graph that `torch.fx` finds. Forward: which channels hold one number, whatever the image.
Backward: which of the others the output depends on. Last, every layer keeps the rows and columns of the channels that
are left, and what the removed constants gave goes to where it is read.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

WIDTHS = {  # the attributes that state the width of a layer: of its output, of its input
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
    nn.BatchNorm2d: ("num_features",),
}
ELEMENTWISE = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh),
    *(nn.Identity, nn.Dropout),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.dropout),
    *(torch.relu, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh"),
}
POOLS = {
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
}
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
FLATTENS = {nn.Flatten, torch.flatten, "flatten"}


class Value(NamedTuple):
    """What is known of the output of one step.

    Attributes:
        space: a number; steps whose channels are the same ones share it and keep or lose them together.
        constant: (C,), float64: what a channel holds whatever the image, NaN where that varies.
        layout: "maps" (N, C, H, W), "flat" (N, C * H * W), or "features" (N, ..., C).
    """

    space: int
    constant: Tensor
    layout: str

    @property
    def varies(self) -> Tensor:
        """Tell for every channel (C,) whether it depends on the image."""
        return self.constant.isnan()

    @property
    def fixed(self) -> Tensor:
        """Tell for every channel (C,) whether it holds a constant other than 0."""
        return ~self.varies & (self.constant != 0)


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
        outputs are the same within rounding. Shrinking it again changes nothing.

    Raises:
        ValueError: the steps of the network cannot be found.
    """
    steps = _Steps(copy.deepcopy(model).eval())  # in evaluation mode dropout does nothing, to the constants too
    kept = _find_kept(steps)
    carriers = _choose_carriers(steps, kept)
    small = copy.deepcopy(model)
    _narrow_(small, steps, kept, carriers)
    return small


class _Steps:
    """The steps of a network in evaluation mode, in order, and what each of them holds."""

    def __init__(self, model: nn.Module) -> None:
        try:
            self.nodes = list(fx.Tracer().trace(model).nodes)
        except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"the steps of {type(model).__name__} cannot be found ({' '.join(str(error).split())[:200]}): "
                "write its forward() so that torch.fx can trace it, without branches that depend on the images"
            ) from error
        self.layers = dict(model.named_modules())
        owners = Counter(id(p) for layer in self.layers.values() for p in layer.parameters(recurse=False))
        self.tied_weights = {id for id, count in owners.items() if count > 1}
        self.calls = Counter(node.target for node in self.nodes if node.op == "call_module")
        self.values: dict[fx.Node, Value] = {}
        self.whole: set[int] = set()  # spaces that keep every channel
        for number, node in enumerate(self.nodes):
            value = None if self._is_overwritten(node) else self._understand(node, number)
            if value is None:
                self.whole |= {self.values[source].space for source in node.all_input_nodes if source in self.values}
            else:
                self.values[node] = value
        self.readers = [node for node in self.values if self.kind(node) in (nn.Conv2d, nn.Linear)]

    def kind(self, node: fx.Node) -> object:
        """Return the class of the layer that is called (no subclass counts), or the function or method."""
        return type(self.layer(node)) if node.op == "call_module" else node.target

    def layer(self, node: fx.Node) -> nn.Module | None:
        """Return the layer that is called, if one is."""
        return self.layers[node.target] if node.op == "call_module" else None

    def source(self, node: fx.Node) -> Value | None:
        """Return what the first input holds; None if that is not understood."""
        return self.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None

    def weight(self, node: fx.Node) -> Tensor:
        """Return the weight of a reader as (outputs, input channels, positions)."""
        weight, source = self.layer(node).weight.detach(), self.source(node)
        if weight.dim() == 4:
            return weight.flatten(2)
        return weight.unflatten(1, (weight.shape[1] if source is None else len(source.constant), -1))

    def inputs(self, node: fx.Node) -> Tensor:
        """Return the constants (C,) that a reader reads; all NaN if its input is not understood."""
        source = self.source(node)
        weight = self.weight(node)
        return weight.new_full((weight.shape[1],), torch.nan).double() if source is None else source.constant

    def pads(self, node: fx.Node) -> bool:
        """Tell whether a reader sees zeros beyond the border of its input."""
        layer = self.layer(node)
        return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and layer.padding not in ((0, 0), "valid")

    def norm_after(self, node: fx.Node) -> fx.Node | None:
        """Return the BatchNorm that alone reads this step, if there is one."""
        (user,) = node.users if len(node.users) == 1 else (None,)
        return user if user in self.values and self.kind(user) is nn.BatchNorm2d else None

    def _is_overwritten(self, node: fx.Node) -> bool:
        """Tell whether a step changes this value in place although another one reads it too."""
        return len(node.users) > 1 and any(
            getattr(self.layer(user), "inplace", False)
            or user.kwargs.get("inplace", False)
            or (user.op == "call_method" and user.target.endswith("_"))
            or (user.target is operator.iadd and user.args[0] is node)
            for user in node.users
        )

    def _understand(self, node: fx.Node, number: int) -> Value | None:
        """Return what a step holds, or None if it is none of those that may be narrowed."""
        kind, layer, source = self.kind(node), self.layer(node), self.source(node)
        layout = source.layout if source else None
        if kind in WIDTHS and (self.calls[node.target] > 1 or self._has_tied_weights(layer) or len(node.args) != 1):
            return None
        if kind is nn.Conv2d and layer.groups == 1 and layout in (None, "maps"):
            return Value(number, self._constant_outputs(node), "maps")
        if kind is nn.Linear and layout != "maps":
            return Value(number, self._constant_outputs(node), "features")
        if source is None:
            return None
        if kind is nn.BatchNorm2d and layout == "maps" and layer.running_mean is not None:
            return source._replace(constant=_normalize(layer, source.constant))
        if kind in ELEMENTWISE:
            return source._replace(constant=self._apply(node, source.constant))
        if kind in POOLS and layout == "maps" and not self._mixes_border(node):
            return source
        if kind in FLATTENS and layout == "maps" and self._flattens_all(node):
            return source._replace(layout="flat")
        return self._add(node, source) if kind in SUMS else None

    def _has_tied_weights(self, layer: nn.Module) -> bool:
        return any(id(p) in self.tied_weights for p in layer.parameters(recurse=False))

    def _constant_outputs(self, node: fx.Node) -> Tensor:
        """Return what the outputs of a reader (O,) hold: its bias and the constants it reads, NaN for the rest."""
        weight, constant, bias = self.weight(node), self.inputs(node), self.layer(node).bias
        kernel = _merge(weight, constant, ~constant.isnan())
        varies = (weight != 0).any(2)[:, constant.isnan()].any(1)
        if self.pads(node):
            varies |= (kernel != 0).any(1)
        result = kernel.sum(1) + (0 if bias is None else bias.detach())
        return result.masked_fill(varies, torch.nan)

    def _apply(self, node: fx.Node, constant: Tensor) -> Tensor:
        """Return what an elementwise step makes of the constants; NaN stays NaN."""
        constant = constant.clone()  # some work in place
        if node.op == "call_module":
            return self.layer(node)(constant)
        function = getattr(Tensor, node.target) if node.op == "call_method" else node.target
        return function(constant, *node.args[1:], **node.kwargs)

    def _mixes_border(self, node: fx.Node) -> bool:
        """Tell whether a pool averages zeros beyond the border in, so that a constant does not stay one."""
        if node.op == "call_module":
            return type(self.layer(node)) is nn.AvgPool2d and self.layer(node).padding not in (0, (0, 0))
        return node.target is F.avg_pool2d and (len(node.args) > 3 or "padding" in node.kwargs)

    def _flattens_all(self, node: fx.Node) -> bool:
        """Tell whether everything but the batch becomes one dimension."""
        if node.op == "call_module":
            return (self.layer(node).start_dim, self.layer(node).end_dim) == (1, -1)
        return (*node.args[1:], *node.kwargs.values()) in ((1,), (1, -1))

    def _add(self, node: fx.Node, one: Value) -> Value | None:
        """Return the sum of two steps, whose channels are the same ones from now on."""
        other = self.values.get(node.args[1]) if len(node.args) == 2 and isinstance(node.args[1], fx.Node) else None
        if other is None or node.kwargs or (other.layout, len(other.constant)) != (one.layout, len(one.constant)):
            return None
        for key, value in self.values.items():
            if value.space == other.space:
                self.values[key] = value._replace(space=one.space)
        if other.space in self.whole:
            self.whole.add(one.space)
        return one._replace(constant=one.constant + other.constant)


def _normalize(norm: nn.BatchNorm2d, constant: Tensor) -> Tensor:
    """Return what BatchNorm makes of constants; a channel with factor 0 becomes one."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is None:
        return (constant - norm.running_mean) * factor
    factor, bias = factor * norm.weight.detach(), norm.bias.detach().double()
    return torch.where(factor == 0, bias, (constant - norm.running_mean) * factor + bias)


def _merge(weight: Tensor, constant: Tensor, chosen: Tensor) -> Tensor:
    """Return sum_j c_j * w[:, j] over the chosen channels: (outputs, positions), float64."""
    return torch.einsum("ojp,j->op", weight[:, chosen].double(), constant[chosen])


def _find_kept(steps: _Steps) -> dict[int, Tensor]:
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


def _choose_carriers(steps: _Steps, kept: dict[int, Tensor]) -> dict[fx.Node, int]:
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


def _takes_shift(steps: _Steps, node: fx.Node) -> bool:
    """Tell whether constants read by a layer are one number an output, and its bias or BatchNorm can take it."""
    return not steps.pads(node) and (steps.layer(node).bias is not None or steps.norm_after(node) is not None)


@torch.no_grad()
def _narrow_(model: nn.Module, steps: _Steps, kept: dict[int, Tensor], carriers: dict[fx.Node, int]) -> None:
    """Cut every layer to the channels that are kept; readers first take what the removed constants gave them."""
    for node, value in steps.values.items():
        if steps.kind(node) not in WIDTHS:
            continue
        layer, rows = model.get_submodule(node.target), kept[value.space]
        if node in steps.readers:
            weight, source = steps.weight(node).clone(), steps.source(node)
            if source is not None:
                columns = kept[source.space]
                merged = _merge(weight, source.constant, source.fixed & ~columns)
                if node in carriers:
                    weight[:, carriers[node]] += merged / source.constant[carriers[node]]
                elif _takes_shift(steps, node) and layer.bias is not None:
                    layer.bias += merged.sum(1)
                elif _takes_shift(steps, node):
                    model.get_submodule(steps.norm_after(node).target).running_mean -= merged.sum(1)
                weight = weight[:, columns]
            layer.weight.data = weight.reshape(len(weight), -1, *layer.weight.shape[2:])
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            if tensor.dim():  # not the number of batches that BatchNorm has seen
                tensor.data = tensor.data[rows]
        for attribute, width in zip(WIDTHS[type(layer)], layer.weight.shape, strict=False):
            setattr(layer, attribute, width)
