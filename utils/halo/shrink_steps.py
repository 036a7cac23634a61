"""What every step of a network holds: which channels are one number whatever the image, and which belong together."""

from __future__ import annotations

import operator
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .sparse_trace import ADDITIONS, VIEWS, Tracer, changed_by

WIDTHS = {  # the attributes that state the width of a layer: of its output, of its input
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
    nn.BatchNorm2d: ("num_features",),
}
NARROWED = ("weight", "bias", "running_mean", "running_var")  # of the tensors that such a layer may hold
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
FLATTENS = {nn.Flatten, torch.flatten, "flatten"}
SAME = {nn.Identity, nn.Dropout, F.dropout}  # of the elementwise steps: in evaluation mode they return their input


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


class Graph:
    """The steps of a network in order, what each of them calls, and what is overwritten.

    Args:
        model: the network, in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            if "forward" in vars(model):
                raise ValueError("its forward() was set on the instance, not in its class")
            self.nodes = list(Tracer().trace(model).nodes)
        except Exception as error:  # whatever the network's forward() raises when it is given a stand-in for images
            raise ValueError(
                f"the steps of {type(model).__name__} cannot be found ({' '.join(str(error).split())[:200]}): "
                "write its forward() so that torch.fx can trace it, without branches that depend on the images"
            ) from error
        self.layers = dict(model.named_modules())
        self.overwritten = self._find_overwritten()

    def kind(self, node: fx.Node) -> object:
        """Return the class of the layer that is called (no subclass counts), or the function or method."""
        return type(self.layer(node)) if node.op == "call_module" else node.target

    def layer(self, node: fx.Node) -> nn.Module | None:
        """Return the layer that is called, if one is."""
        return self.layers[node.target] if node.op == "call_module" else None

    def _find_overwritten(self) -> set[fx.Node]:
        """Return the steps whose output is read after another step has changed it in place, under whatever name."""
        order = {node: place for place, node in enumerate(self.nodes)}
        names: dict[fx.Node, set[fx.Node]] = {}  # by step, those that may be the same memory so far
        found = set()
        for node in self.nodes:
            names[node] = {node}
            changes, kind = self._changes_its_input(node), self.kind(node)
            if changes or kind not in {*WIDTHS, *POOLS, *ADDITIONS, *ELEMENTWISE} - SAME:
                first = changes and "out" not in node.kwargs and isinstance(next(iter(node.args), None), fx.Node)
                sources = node.args[:1] if first else node.all_input_nodes
                shared = names[node].union(*(names[source] for source in sources))
                names |= dict.fromkeys(shared, shared)
            if changes:
                others = names[node] - {node}
                found |= {other for other in others if any(order[user] > order[node] for user in other.users)}
        return found

    def _changes_its_input(self, node: fx.Node) -> bool:
        """Tell whether a step writes over what it is given."""
        if node.op == "call_module":
            return getattr(self.layer(node), "inplace", False)
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        asked = node.kwargs.get("inplace", False) or node.kwargs.get("out") is not None
        asked = asked or any(argument is True for argument in node.args[1:])
        return asked or name.endswith("_") or getattr(operator, name, None) is node.target and name.startswith("i")

    def reads_batch_size(self, node: fx.Node) -> bool:
        """Tell whether a step asks its input for nothing but the number of images."""
        if self.kind(node) is getattr and node.args[1] == "shape":
            return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
        return self.kind(node) == "size" and node.args[1:] == (0,)


class Steps(Graph):
    """What every step of a network holds, and which channels belong together."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        owners = Counter(id(p) for layer in self.layers.values() for p in layer.parameters(recurse=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        alone = {id(parameters[node.target]) for node in self.nodes if node.target in parameters}  # read by no layer
        self.tied_weights = {id for id, count in owners.items() if count > 1} | alone
        self.calls = Counter(node.target for node in self.nodes if node.op == "call_module")
        self.values: dict[fx.Node, Value] = {}
        self.whole: set[int] = set()  # spaces that keep every channel
        for number, node in enumerate(self.nodes):
            value = None if node in self.overwritten else self._understand(node, number)
            if value is not None:  # infinity may become NaN, and NaN stands for what varies
                self.values[node] = value._replace(
                    constant=torch.where(value.constant.isinf(), torch.nan, value.constant)
                )
            elif not self.reads_batch_size(node):
                self.whole |= {self.values[source].space for source in node.all_input_nodes if source in self.values}
        self.readers = [node for node in self.values if self.kind(node) in (nn.Conv2d, nn.Linear)]

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

    def _understand(self, node: fx.Node, number: int) -> Value | None:
        """Return what a step holds, or None if it is none of those that may be narrowed."""
        kind, layer, source = self.kind(node), self.layer(node), self.source(node)
        layout = source.layout if source else None
        if layer and changed_by(layer):
            return None
        if kind in WIDTHS and (self.calls[node.target] > 1 or self._is_shared(layer) or len(node.args) != 1):
            return None
        if kind is nn.Conv2d and layer.groups == 1 and layout in (None, "maps"):
            return Value(number, self._constant_outputs(node), "maps")
        if kind is nn.Linear and layout != "maps":
            return Value(number, self._constant_outputs(node), "features")
        if source is None:
            return None
        if kind is nn.BatchNorm2d and layout == "maps" and layer.running_mean is not None:
            return source._replace(constant=normalize(layer, source.constant))
        others = any(isinstance(argument, fx.Node) for argument in (*node.args[1:], *node.kwargs.values()))
        if kind in ELEMENTWISE and not others and not self._drops(node):
            return source._replace(constant=self._apply(node, source.constant))
        if kind in POOLS and layout == "maps" and not self._changes_constants(node):
            return source
        if kind in FLATTENS | VIEWS and layout == "maps" and self._flattens_all(node):
            return source._replace(layout="flat")
        return self._add(node, source) if kind in ADDITIONS else None

    def _is_shared(self, layer: nn.Module) -> bool:
        """Tell whether others read the weights of a layer."""
        return any(id(p) in self.tied_weights for p in layer.parameters(recurse=False))

    def _drops(self, node: fx.Node) -> bool:
        """Tell whether a function drops values in evaluation mode too."""
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return node.target is F.dropout and training is not False

    def _constant_outputs(self, node: fx.Node) -> Tensor:
        """Return what the outputs of a reader (O,) hold: its bias and the constants it reads, NaN for the rest."""
        weight, constant, bias = self.weight(node), self.inputs(node), self.layer(node).bias
        kernel = merge(weight, constant, ~constant.isnan())
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

    def _changes_constants(self, node: fx.Node) -> bool:
        """Tell whether a pool averages zeros beyond the border in, or divides by another number than it adds up."""
        if node.op == "call_module":
            layer = self.layer(node)
            return type(layer) is nn.AvgPool2d and (layer.padding not in (0, (0, 0)) or bool(layer.divisor_override))
        others = {"padding", "divisor_override"} & set(node.kwargs)
        return node.target is F.avg_pool2d and (len(node.args) > 3 or bool(others))

    def _flattens_all(self, node: fx.Node) -> bool:
        """Tell whether everything but the batch becomes one dimension."""
        if node.op == "call_module":
            return (self.layer(node).start_dim, self.layer(node).end_dim) == (1, -1)
        if self.kind(node) in FLATTENS:
            dims = {**dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)), **node.kwargs}
            return (dims.get("start_dim", 0), dims.get("end_dim", -1)) == (1, -1)
        sizes = (*node.args[1:], *node.kwargs.values())
        sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        return len(sizes) == 2 and isinstance(sizes[0], fx.Node) and sizes[1] == -1 and self._counts(sizes[0], node)

    def _counts(self, size: fx.Node, view: fx.Node) -> bool:
        """Tell whether a number is that of the images which a view reads, asked of what it reads or before that."""
        if len(size.args) != 2 or size.args[1] != 0:
            return False
        of = size.args[0]
        if size.target is operator.getitem and of.target is getattr and of.args[1] == "shape":
            of = of.args[0]
        elif size.target != "size":
            return False
        before, steps = set(), [view.args[0]]
        while steps:
            before.add(step := steps.pop())
            if step in self.values:  # others may change the number
                steps += set(step.all_input_nodes) - before
        return of in before

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


def factor_of(norm: nn.BatchNorm2d) -> Tensor:
    """Return the number (C,) that a BatchNorm in evaluation mode multiplies each channel by, float64."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.detach()


def normalize(norm: nn.BatchNorm2d, constant: Tensor) -> Tensor:
    """Return what BatchNorm makes of constants; a channel with factor 0 becomes one."""
    factor = factor_of(norm)
    bias = torch.zeros_like(factor) if norm.bias is None else norm.bias.detach().double()
    return torch.where(factor == 0, bias, (constant - norm.running_mean) * factor + bias)


def merge(weight: Tensor, constant: Tensor, chosen: Tensor) -> Tensor:
    """Return sum_j c_j * w[:, j] over the chosen channels: (outputs, positions), float64."""
    return torch.einsum("ojp,j->op", weight[:, chosen].double(), constant[chosen])
