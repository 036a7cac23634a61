"""A network as a short program of operations: what a pruned network consists of once it only has to infer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

KERNELS = ("conv", "linear")
POOLS = ("max", "average", "adaptive")


class Shape(NamedTuple):
    """Channels and size of one image's map; a vector of n features after Linear is (n, 1, 1)."""

    channels: int
    height: int
    width: int

    @property
    def features(self) -> int:
        """Numbers in the map."""
        return self.channels * self.height * self.width


class Axis(NamedTuple):
    """How a window moves along rows or along columns."""

    kernel: int
    stride: int = 1
    before: int = 0  # padding
    after: int = 0
    dilation: int = 1
    ceil: bool = False

    def length(self, size: int) -> int:
        """Return the number of positions on `size` inputs."""
        room = size + self.before + self.after - self.dilation * (self.kernel - 1) - 1
        count = (room + (self.stride - 1 if self.ceil else 0)) // self.stride + 1
        # torch's rule: with ceil_mode, no window may start in the padding behind the map
        return count - (self.ceil and (count - 1) * self.stride >= size + self.before)


@dataclass
class Op:
    """One operation: reads `source` (and `residual`), writes `output`; these are numbers of values, 0 is the input.

    Kinds: conv (Conv2d), linear (a kernel over the whole map), max, average and adaptive (average) pooling; and, until
    `fold` has merged them with their neighbours, scale (BatchNorm), relu and add; what is left of those is identity.
    """

    kind: str
    name: str
    source: int
    output: int
    residual: int | None = None
    relu: bool = False
    weight: Tensor | None = None  # conv (O, C / groups, ky, kx), linear (O, features), scale (C)
    bias: Tensor | None = None
    axes: tuple[Axis, Axis] = (Axis(1), Axis(1))
    groups: int = 1
    count_padding: bool = True
    divisor: int | None = None
    size: tuple[int | None, int | None] = (1, 1)  # of adaptive pooling's output; None: as the input


@dataclass
class Program:
    """Operations in the order in which they run, and what the network returns.

    Args:
        ops: the operations.
        output: the value that is returned.
        flat: whether it is returned as (N, features).
        features: the number of features that `view` gave to some values.
    """

    ops: list[Op]
    output: int
    flat: bool
    features: dict[int, int] = field(default_factory=dict)

    def readers(self) -> dict[int, list[int]]:
        """Return for each value the places of the operations that read it; the caller reads the output."""
        found: dict[int, list[int]] = {0: []} | {op.output: [] for op in self.ops}
        for place, op in enumerate(self.ops):
            for value in {op.source, op.residual} - {None}:
                found[value].append(place)
        found[self.output].append(len(self.ops))
        return found

    def shapes(self, image: Shape) -> dict[int, Shape]:
        """Return the shape of every value for images of one shape.

        Raises:
            ValueError: an operation does not fit what it reads.
        """
        shapes = {0: image}
        for op in self.ops:
            shapes[op.output] = shape_after(op, shapes[op.source])
            if op.residual is not None and shapes[op.residual] != shapes[op.output]:
                if shapes[op.residual].features == shapes[op.output].features:
                    what = "adds a flattened map to features, which sparse inference does not support"
                    raise ValueError(f"{op.name} {what}: run the network itself")
                both = f"{tuple(shapes[op.output])} and {tuple(shapes[op.residual])}"
                raise ValueError(f"{op.name} adds maps of different shapes, {both}: make them equal")
        for value, features in self.features.items():
            if shapes[value].features != features:
                have = f"a map of {tuple(shapes[value])}"
                raise ValueError(f"view of {features} features for {have}: give images of the size it was made for")
        return shapes

    def run(self, images: Tensor) -> Tensor:
        """Run the program with torch: the readable form, and what runs where there is no compiler."""
        values = {0: images}
        last = {value: max(places, default=-1) for value, places in self.readers().items()}
        for place, op in enumerate(self.ops):
            out = apply(op, values[op.source])
            if op.residual is not None:
                out = out + values[op.residual]
            values[op.output] = F.relu(out) if op.relu else out
            for value in [value for value in values if last[value] <= place]:
                del values[value]
        return values[self.output].flatten(1) if self.flat else values[self.output]


def apply(op: Op, x: Tensor) -> Tensor:
    """Apply one folded operation, without its addition and ReLU, to maps (N, C, H, W)."""
    rows, columns = op.axes
    if op.kind == "identity":
        return x
    if op.kind == "conv":
        x = F.pad(x, (columns.before, columns.after, rows.before, rows.after))
        strides, dilations = [(rows.stride, columns.stride), (rows.dilation, columns.dilation)]
        return F.conv2d(x, op.weight, op.bias, strides, 0, dilations, op.groups)
    if op.kind == "linear":
        return F.linear(x.flatten(1), op.weight, op.bias)[:, :, None, None]
    kernel, stride, padding = [(getattr(rows, n), getattr(columns, n)) for n in ("kernel", "stride", "before")]
    if op.kind == "max":
        return F.max_pool2d(x, kernel, stride, padding, (rows.dilation, columns.dilation), rows.ceil)
    if op.kind == "average":
        return F.avg_pool2d(x, kernel, stride, padding, rows.ceil, op.count_padding, op.divisor)
    return F.adaptive_avg_pool2d(x, op.size)


def shape_after(op: Op, shape: Shape) -> Shape:
    """Return the shape that an operation writes.

    Raises:
        ValueError: it does not fit.
    """
    if op.kind == "linear":
        if op.weight.shape[1] != shape.features:
            raise ValueError(f"{op.name} reads {op.weight.shape[1]} features, but its input has {shape.features}")
        return Shape(len(op.weight), 1, 1)
    if op.kind == "adaptive":
        size = [have if want is None else want for want, have in zip(op.size, shape[1:], strict=True)]
        return Shape(shape.channels, *size)
    if op.kind == "conv" and op.weight.shape[1] * op.groups != shape.channels:
        wanted = op.weight.shape[1] * op.groups
        if wanted == op.groups == shape.features:
            raise ValueError(f"{op.name} is BatchNorm of a flattened map: put BatchNorm2d before the flattening")
        raise ValueError(f"{op.name} reads {wanted} channels, but its input has {shape.channels}")
    height, width = (axis.length(size) for axis, size in zip(op.axes, shape[1:], strict=True))
    if height < 1 or width < 1:
        raise ValueError(f"{op.name} does not fit on a map of {shape.height} x {shape.width}: give larger images")
    return Shape(len(op.weight) if op.kind == "conv" else shape.channels, height, width)


def fold(program: Program) -> Program:
    """Merge BatchNorm, addition and ReLU with the operation before them, where nothing else reads its output.

    What cannot be merged becomes a 1x1 convolution of one weight a channel (BatchNorm), or an operation "identity",
    which copies a value and adds or rectifies on the way.
    """
    ops: dict[int, Op] = {}  # by output, in the order in which they run
    readers = {value: len(places) for value, places in program.readers().items()}
    features, gone = dict(program.features), set()  # `gone`: the values that others continue

    def take(value: int, kinds: tuple[str, ...], *, whole: bool = True) -> Op | None:
        """Take the operation that writes a value out of the program, to be continued; None if it must stay."""
        op = ops.get(value)
        if op is None or readers[value] > 1 or op.kind not in kinds or op.relu or (whole and op.residual is not None):
            return None
        gone.add(value)
        return ops.pop(value)

    for op in program.ops:
        if op.kind == "scale":
            fits = op.source in ops and ops[op.source].weight is not None
            fits = fits and len(ops[op.source].weight) == len(op.weight)  # not so where features are a flattened map
            before = take(op.source, KERNELS) if fits else None
            op = _scaled(before, op) if before else _separate(op)
        elif op.kind == "add":
            sides = [(op.source, op.residual), (op.residual, op.source)] if op.source != op.residual else []
            taken = next(((before, other) for one, other in sides if (before := take(one, KERNELS))), None)
            before, other = taken or (replace(op, kind="identity"), op.residual)
            op = replace(before, output=op.output, residual=other)
        elif op.kind == "relu":
            before = take(op.source, (*KERNELS, *POOLS, "identity"), whole=False)
            op = replace(before or replace(op, kind="identity"), output=op.output, relu=True)
        ops[op.output] = op
        for value in gone & features.keys():
            features[op.output] = features[value]
        features = {value: count for value, count in features.items() if value not in gone}
    return Program(list(ops.values()), program.output, program.flat, features)


def _scaled(op: Op, scale: Op) -> Op:
    """Return a convolution or linear layer with the scale and shift behind it folded into its weights."""
    factor = scale.weight.reshape(-1, *[1] * (op.weight.dim() - 1))
    return replace(op, output=scale.output, weight=op.weight * factor, bias=op.bias * scale.weight + scale.bias)


def _separate(scale: Op) -> Op:
    """Return a BatchNorm that follows no convolution as a convolution of one weight a channel."""
    return replace(scale, kind="conv", weight=scale.weight.reshape(-1, 1, 1, 1), groups=len(scale.weight))
