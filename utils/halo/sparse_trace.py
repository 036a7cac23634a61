"""From a network to a program: torch.fx finds the operations, whatever module or function they are written as."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .sparse_program import Axis, Op, Program, fold

REMEDY = "run the network itself, or write it with the operations that docs/sparse_inference.md lists"
SHAPE, BATCH = object(), object()  # what x.shape and x.size(0) stand for while tracing
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    return nn.Dropout(p, inplace).train(training)


def _max_pool(kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False) -> nn.Module:
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


def _flatten(start_dim: int = 0, end_dim: int = -1) -> nn.Module:
    return nn.Flatten(start_dim, end_dim)


# Functions and methods, as the modules that do the same to their first argument.
FUNCTIONS: dict[object, Callable[..., nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    "relu": nn.ReLU,
    torch.relu_: lambda: nn.ReLU(True),
    F.relu_: lambda: nn.ReLU(True),
    "relu_": lambda: nn.ReLU(True),
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    torch.flatten: _flatten,
    "flatten": _flatten,
    F.dropout: _dropout,
}
ADDITIONS = {operator.add: False, torch.add: False, "add": False, operator.iadd: True, "add_": True}
VIEWS = {"view", "reshape", torch.reshape}


class _Proxy(fx.Proxy):
    """A value of the trace for which a += b is recorded as what it is; fx alone records a = a + b."""


def _in_place(function: Callable) -> Callable[[fx.Proxy, object], fx.Proxy]:
    return lambda one, other: one.tracer.create_proxy("call_function", function, (one, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ipow"):  # views of a would miss what happens to it
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class Tracer(fx.Tracer):
    """fx's tracer with such values, so that a graph tells what is changed in place."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the value of a node."""
        return _Proxy(node, self)


def changed_by(layer: nn.Module) -> str | None:
    """Return what may make a layer compute something else than its class says, None where nothing does."""
    if nn.modules.module._global_forward_pre_hooks or nn.modules.module._global_forward_hooks:
        return "global hooks (register_module_forward_hook)"
    if layer._forward_pre_hooks or layer._forward_hooks:
        return "hooks"
    return "a forward() set on an instance" if "forward" in vars(layer) else None


def trace(model: nn.Module) -> Program:
    """Find the operations of a network and fold its BatchNorms.

    Args:
        model: in evaluation mode; reads one tensor (N, C, H, W), returns one tensor.

    Returns:
        A program whose weights are float32 copies on the CPU.

    Raises:
        ValueError: the network is in training mode, or has something that is not supported; it is named.
    """
    for name, module in model.named_modules():
        if module.training:
            what = f"its {type(module).__name__} {name!r}" if name else "the network"
            raise ValueError(f"{what} is in training mode: call model.eval() first")
    if what := changed_by(model):
        raise ValueError(f"sparse inference does not support {what}, such as that of the network itself: {REMEDY}")
    if not list(model.children()):
        model = nn.Sequential(model).eval()  # fx would look into a layer that stands alone
    try:
        graph = Tracer().trace(model)
    except Exception as error:  # whatever the network's forward() raises when it is given a stand-in for images
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"torch.fx cannot follow the network ({reason}): {REMEDY}") from error
    program = fold(_Translation(model, graph).program())
    for op in program.ops:
        if op.weight is not None:
            op.weight, op.bias = op.weight.float(), op.bias.float()
    return program


class _Translation:
    """The walk over fx's graph. A value is a number and whether it is flat; nodes may share one (views, Dropout)."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(model.named_modules())
        self.graph = graph
        self.ops: list[Op] = []
        self.features: dict[int, int] = {}
        self.values: dict[fx.Node, object] = {}
        self.count = 0  # of values so far, the input among them

    def program(self) -> Program:
        """Translate every node."""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if self.count:
                    raise ValueError(f"the network reads a second input {node.name!r}: only one is supported")
                self.values[node], self.count = (0, False), 1
            elif node.op == "output":
                return self._end(node.args[0])
            elif node.op == "get_attr":
                raise self._unknown(node, f"the tensor {node.target!r} used outside a layer")
            else:
                self._call(node)
        raise ValueError("the network returns nothing")

    def _end(self, result: object) -> Program:
        value = self.values.get(result) if isinstance(result, fx.Node) else None
        if not isinstance(value, tuple):
            raise ValueError(f"the network returns {result!r}, not one tensor: {REMEDY}")
        return Program(self.ops, value[0], value[1], self.features)

    def _unknown(self, node: fx.Node, what: str) -> ValueError:
        """Return the error for something that is not supported, at the line that calls it."""
        return ValueError(f"sparse inference does not support {what} (at {node.name!r}): {REMEDY}")

    def _call(self, node: fx.Node) -> None:
        target = node.target
        if node.op == "call_module":
            layer = self.modules[target]
            if what := changed_by(layer):
                raise self._unknown(node, f"{what}, such as that of {target!r}, which may change what a layer computes")
            self._layer(node, target, layer)
        elif target in ADDITIONS:
            self._add(node, in_place=ADDITIONS[target])
        elif target in VIEWS:
            self._view(node)
        elif target in ("size", "dim") or target in (getattr, operator.getitem):
            self._shape(node)
        elif target in FUNCTIONS:
            arguments, named = node.args[1:], {k: v for k, v in node.kwargs.items() if k != "input"}
            self._layer(node, node.name, FUNCTIONS[target](*arguments, **named))
        else:
            name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
            raise self._unknown(node, f"{name}()")

    def _read(self, node: fx.Node) -> tuple[int, bool]:
        """Return the value that a node's operation reads."""
        source = node.args[0] if node.args else node.kwargs.get("input")
        value = self.values.get(source) if isinstance(source, fx.Node) else None
        if not isinstance(value, tuple):
            raise self._unknown(node, f"{node.target} of {source!r}")
        return value

    def _append(self, node: fx.Node, op: Op, *, flat: bool, in_place: bool = False) -> None:
        """Add an operation; done in place, everything that is the same tensor reads its output from now on."""
        op.output, self.count = self.count, self.count + 1
        self.ops.append(op)
        if in_place:
            for other, value in self.values.items():
                if isinstance(value, tuple) and value[0] == op.source:
                    if flat and not value[1] and any(user not in self.values for user in other.users):  # read later
                        raise self._unknown(node, f"a change in place of {other.name!r} flattened, which may be a copy")
                    self.values[other] = (op.output, value[1])
        self.values[node] = (op.output, flat)

    def _add(self, node: fx.Node, *, in_place: bool) -> None:
        sides = [self.values.get(side) if isinstance(side, fx.Node) else None for side in node.args]
        if len(sides) != 2 or not all(isinstance(side, tuple) for side in sides) or node.kwargs.get("alpha", 1) != 1:
            raise self._unknown(node, "an addition of anything but two maps")
        if "out" in node.kwargs:
            raise self._unknown(node, "an addition with out=")
        (one, flat), (other, also_flat) = sides
        if flat != also_flat:
            raise self._unknown(node, "an addition of a map and features")
        self._append(node, Op("add", node.name, one, -1, other), flat=flat, in_place=in_place)

    def _view(self, node: fx.Node) -> None:
        """Accept x.view(len(x), -1) and x.view(-1, features), which flatten."""
        value, _ = self._read(node)
        sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        sizes = [self.values.get(s, s) if isinstance(s, fx.Node) else s for s in sizes] if len(sizes) == 2 else [0, 0]
        if sizes[0] is not BATCH and sizes[0] != -1 or not isinstance(sizes[1], int) or sizes == [-1, -1]:
            raise self._unknown(node, "a view other than (N, -1) and (-1, features)")
        if sizes[1] != -1:
            self.features[value] = sizes[1]
        self.values[node] = (value, True)

    def _shape(self, node: fx.Node) -> None:
        """Follow x.size(0), x.shape[0] and x.size()[0], which views need."""
        source = self.values.get(node.args[0])
        rest = node.args[1:]
        if isinstance(source, tuple) and rest in ((), ("shape",)) and node.target != "dim":
            self.values[node] = SHAPE
        elif rest == (0,) and (source is SHAPE or node.target == "size"):
            self.values[node] = BATCH
        else:
            raise self._unknown(node, f"{getattr(node.target, '__name__', node.target)}{rest}")

    def _layer(self, node: fx.Node, name: str, layer: nn.Module) -> None:
        """Translate a layer, or a function as the layer that does the same."""
        value, flat = self._read(node)
        if isinstance(layer, NOTHING):
            if layer.training:
                raise ValueError(f"{name} drops values in training mode: give training=self.training")
            self.values[node] = (value, flat)
        elif isinstance(layer, nn.Flatten):
            if layer.start_dim != 1 or layer.end_dim not in (-1, 1 if flat else 3):
                raise self._unknown(node, f"flatten({layer.start_dim}, {layer.end_dim}), only flatten(1)")
            self.values[node] = (value, True)
        elif isinstance(layer, nn.ReLU):
            self._append(node, Op("relu", name, value, -1), flat=flat, in_place=layer.inplace)
        else:
            make = next((make for kind, make in LAYERS.items() if type(layer) is kind), None)
            if make is None:
                raise self._unknown(node, f"{type(layer).__name__}")
            if flat != isinstance(layer, (nn.Linear, nn.BatchNorm1d)):
                remedy = "only Linear and BatchNorm1d read features"
                if not flat:
                    remedy = "flatten the map before Linear (the network reads (N, C, H, W))"
                raise ValueError(f"{name} ({type(layer).__name__}) reads {'features' if flat else 'a map'}: {remedy}")
            self._append(node, replace(make(layer), name=name, source=value), flat=flat)


def _pair(value: int | tuple[int, ...] | None) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))  # (2,) is 2 to torch


def _float(tensor: Tensor | None, *, zeros: int) -> Tensor:
    """Copy a tensor to the CPU as float64, in which BatchNorm is folded."""
    if tensor is None:
        return torch.zeros(zeros, dtype=torch.float64, device="cpu")
    return tensor.detach().cpu().double()


def _conv(layer: nn.Conv2d) -> Op:
    if layer.padding_mode != "zeros":
        raise ValueError(f"sparse inference does not support padding_mode={layer.padding_mode!r}: use zeros")
    (ky, kx), (sy, sx), (dy, dx) = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":  # with an even kernel, torch pads one more behind
        (top, bottom), (left, right) = [((d * (k - 1)) // 2, (d * (k - 1) + 1) // 2) for k, d in ((ky, dy), (kx, dx))]
    else:
        top, left = (0, 0) if layer.padding == "valid" else _pair(layer.padding)
        bottom, right = top, left
    axes = (Axis(ky, sy, top, bottom, dy), Axis(kx, sx, left, right, dx))
    weight, bias = _float(layer.weight, zeros=0), _float(layer.bias, zeros=layer.out_channels)
    return Op("conv", "", -1, -1, weight=weight, bias=bias, axes=axes, groups=layer.groups)


def _linear(layer: nn.Linear) -> Op:
    weight, bias = _float(layer.weight, zeros=0), _float(layer.bias, zeros=layer.out_features)
    return Op("linear", "", -1, -1, weight=weight, bias=bias)


def _norm(layer: nn.BatchNorm2d | nn.BatchNorm1d) -> Op:
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError("sparse inference does not support BatchNorm without running statistics: keep them")
    scale = (_float(layer.running_var, zeros=0) + layer.eps).rsqrt()
    if layer.affine:
        scale = scale * _float(layer.weight, zeros=0)
    bias = _float(layer.bias, zeros=layer.num_features) - _float(layer.running_mean, zeros=0) * scale
    return Op("scale", "", -1, -1, weight=scale, bias=bias)


def _window(layer: nn.MaxPool2d | nn.AvgPool2d, dilations: tuple[int, int]) -> tuple[Axis, Axis]:
    strides = layer.kernel_size if layer.stride is None else layer.stride
    parts = zip(*map(_pair, (layer.kernel_size, strides, layer.padding)), dilations, strict=True)
    rows, columns = [Axis(k, s, p, p, d, layer.ceil_mode) for k, s, p, d in parts]
    return rows, columns


def _max(layer: nn.MaxPool2d) -> Op:
    if layer.return_indices:
        raise ValueError("sparse inference does not support max-pooling that returns indices: leave them out")
    return Op("max", "", -1, -1, axes=_window(layer, _pair(layer.dilation)))


def _average(layer: nn.AvgPool2d) -> Op:
    counting = {"count_padding": layer.count_include_pad, "divisor": layer.divisor_override}
    return Op("average", "", -1, -1, axes=_window(layer, (1, 1)), **counting)


def _adaptive(layer: nn.AdaptiveAvgPool2d) -> Op:
    size = layer.output_size
    return Op("adaptive", "", -1, -1, size=_pair(size) if size is not None else (None, None))


LAYERS: dict[type, Callable[[nn.Module], Op]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _norm,
    nn.BatchNorm1d: _norm,
    nn.MaxPool2d: _max,
    nn.AvgPool2d: _average,
    nn.AdaptiveAvgPool2d: _adaptive,
}
