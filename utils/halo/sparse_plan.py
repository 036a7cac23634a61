"""From a program to what the kernel runs: where every map lies, and each non-zero weight with its fixed offset.

A map is stored as planes of rows, one plane a channel. The rows of a plane follow each other with `pitch` units from one
to the next; the zeros between them are the right border of one row and the left border of the next, and rows of zeros
stand before and behind. A pixel that lies (dy, dx) away therefore always lies dy * pitch + dx units away, padding included.

Two forms share this. In a block a unit is a vector of one pixel of as many images as a register has floats, and every row
has just the border that its readers need. For one image a unit is a float and a register holds neighbouring pixels, across
the ends of rows; so a map has the pitch of the maps computed from it, and what a strided convolution reads is first split
into maps of every stride-th pixel.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .sparse_program import KERNELS, Axis, Op, Program, Shape

TILES, STRIPS, DOTS, MAX, SUM, SPLIT = range(6)  # the kernel's kinds
NUMBERS = (
    "kind relu height width stride_y stride_x source source_pitch source_plane output output_pitch output_plane "
    "residual residual_pitch residual_plane count"
)
POINTERS = "channels starts terms bias windows scales mask"
MAP = "offset pitch plane channels height width"
LINE = 16  # floats: what loads and stores past the end of a map may touch; also the alignment of planes of one image


class COp(ctypes.Structure):
    """The kernel's struct Op."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in NUMBERS.split()),
        *((name, ctypes.c_void_p) for name in POINTERS.split()),
        ("step_y", ctypes.c_int64),
        ("step_x", ctypes.c_int64),
    ]


class CMap(ctypes.Structure):
    """The kernel's struct Map."""

    _fields_ = [(name, ctypes.c_int64) for name in MAP.split()]


class CPlan(ctypes.Structure):
    """The kernel's struct Plan."""

    _fields_ = [
        ("base", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("ops", ctypes.c_void_p),
        ("input", CMap),
        ("output", CMap),
        ("wanted", ctypes.c_void_p),
    ]


class Terms(NamedTuple):
    """The non-zero weights of a layer, by output channel: where each reads, relative to the output's pixel."""

    output: Tensor  # (n,) output channel, ascending
    channel: Tensor  # (n,) input channel
    row: Tensor  # (n,) of the input, less the padding
    column: Tensor
    weight: Tensor


class Layout(NamedTuple):
    """How a map lies: units from row to row, from plane to plane, and before the first pixel of a plane."""

    height: int
    width: int
    pitch: int
    plane: int
    lead: int


def axes_of(op: Op, shape: Shape) -> tuple[Axis, Axis]:
    """Return the axes of an operation; a linear layer is a kernel over the whole map."""
    return (Axis(shape.height), Axis(shape.width)) if op.kind == "linear" else op.axes


def terms_of(op: Op, shape: Shape, after: Shape) -> Terms:
    """List the non-zero weights that ever read a pixel of the map rather than its padding."""
    if op.kind == "identity":
        channel, nothing = torch.arange(shape.channels), torch.zeros(shape.channels, dtype=torch.int64)
        return Terms(channel, channel, nothing, nothing, torch.ones(shape.channels))
    weight = op.weight.reshape(len(op.weight), -1, shape.height, shape.width) if op.kind == "linear" else op.weight
    output, channel, row, column = weight.nonzero().unbind(1)
    values = weight[output, channel, row, column]
    channel = channel + output // (len(weight) // op.groups) * weight.shape[1]
    rows, columns = axes_of(op, shape)
    row, column = (row * rows.dilation - rows.before, column * columns.dilation - columns.before)
    reads = _inside(row, rows.stride, shape.height, after.height)
    reads &= _inside(column, columns.stride, shape.width, after.width)
    return Terms(*(part[reads] for part in (output, channel, row, column, values)))


def _inside(place: Tensor, stride: int, size: int, count: int) -> Tensor:
    """Tell which pixels `place`, moved by some of 0 .. count - 1 strides, come to lie within 0 .. size - 1."""
    moves = (-place).clamp(min=0).add(stride - 1).div(stride, rounding_mode="floor")
    return (moves < count) & (place + moves * stride < size)


class Network(NamedTuple):
    """A program for images of one shape, without what nothing reads."""

    program: Program
    shapes: dict[int, Shape]
    terms: dict[int, Terms]  # by the value they compute
    live: dict[int, Tensor]  # of each value, the channels that are read
    wanted: Tensor  # (C, H, W) of the input, the pixels that are read


def live_network(program: Program, image: Shape) -> Network:
    """Walk backwards through a program and keep the channels, and the weights for them, that reach the output.

    Raises:
        ValueError: the images do not fit the network.
    """
    shapes = program.shapes(image)
    live = {value: torch.zeros(shape.channels, dtype=torch.bool) for value, shape in shapes.items()}
    wanted = torch.zeros(image, dtype=torch.bool)
    live[program.output][:] = True
    terms = {}
    for op in reversed(program.ops):
        out = live[op.output]
        used = out
        if op.kind in KERNELS or op.kind == "identity":
            found = terms_of(op, shapes[op.source], shapes[op.output])
            found = terms[op.output] = Terms(*(part[out[found.output]] for part in found))
            used = torch.zeros_like(live[op.source]).index_fill_(0, found.channel, True)
        live[op.source] |= used
        if op.residual is not None:
            live[op.residual] |= out
        if op.source == 0 and op.kind == "linear":
            wanted[found.channel, found.row, found.column] = True
        elif op.source == 0:
            wanted |= used[:, None, None]
    if program.output == 0 or any(op.residual == 0 for op in program.ops):
        wanted |= live[0][:, None, None]
    return Network(program, shapes, terms, live, wanted)


def up(number: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-number // multiple) * multiple


class Plan:
    """One form of a network for images of one shape, as the kernel takes it.

    Args:
        network: what to run.
        lanes: floats in a register.
        image: for one image, or else for a block of `lanes`.
        base: where in a thread's workspace this form's maps begin, in floats.

    Attributes:
        c: the kernel's struct Plan.
        size: floats of workspace that the maps take.
        cost: vector multiply-adds of the form, to compare it with the other.
    """

    def __init__(self, network: Network, *, lanes: int, image: bool, base: int) -> None:
        self.network, self.lanes, self.image = network, lanes, image
        self.unit = 1 if image else lanes
        self.cost = 0
        self._keep: list[object] = []
        program, shapes = network.program, network.shapes
        self.layouts = self._lay_out()
        self.scratch = self.units = 0
        self.origins = self._place()
        scratch = up(self.units, LINE)
        ops = [part for op in program.ops for part in self._op(op, scratch)]
        self.size = up(self.unit * (scratch + self.scratch) + LINE, LINE)
        array = (COp * len(ops))(*ops)
        ends = [self._map(value, shapes[value]) for value in (0, program.output)]
        chunks = torch.nn.functional.pad(network.wanted.flatten(), (0, -network.wanted.numel() % lanes))
        wanted = self._pointer([*(chunks.view(-1, lanes).any(1).nonzero()[:, 0] * lanes).tolist(), -1])
        self._keep.append(array)
        self.c = CPlan(base, len(ops), ctypes.addressof(array), *ends, wanted)

    def _pointer(self, numbers: list | Tensor, dtype: torch.dtype = torch.int32) -> int:
        """Keep numbers as long as this plan and return where they are."""
        tensor = torch.as_tensor(numbers, dtype=dtype).contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _map(self, value: int, shape: Shape) -> CMap:
        layout = self.layouts[value]
        return CMap(self.origins[value], layout.pitch, layout.plane, *shape)

    def _single(self, op: Op) -> bool:
        """Tell whether an operation writes one pixel a channel."""
        shape = self.network.shapes[op.output]
        return shape.height * shape.width == 1

    def _splits(self, op: Op) -> bool:
        """Tell whether the input of an operation is split by its strides first."""
        return self.image and op.kind == "conv" and not self._single(op) and {a.stride for a in op.axes} != {1}

    def _lay_out(self) -> dict[int, Layout]:
        """Give every value the border that its readers need, and in the form for one image equal pitches."""
        shapes = self.network.shapes
        borders = dict.fromkeys(shapes, (0, 0))
        pitch = {value: shape.width for value, shape in shapes.items()}
        group = {value: value for value in shapes}  # values of one pitch name one of them
        for op in self.network.program.ops:
            if op.output not in self.network.terms or self._single(op):
                continue
            before, after = shapes[op.source], shapes[op.output]
            partners = [op.residual] if op.residual is not None else []
            if self._splits(op):
                columns = op.axes[1]
                room = (columns.kernel - 1) * columns.dilation // columns.stride
                pitch[op.output] = max(pitch[op.output], after.width + room)
            else:
                need = [
                    max(a.before, reach(a, n) - m, 0) for a, n, m in zip(op.axes, after[1:], before[1:], strict=True)
                ]
                borders[op.source] = tuple(map(max, borders[op.source], need))
                partners.append(op.source)
            for partner in partners:
                old, new = group[partner], group[op.output]
                group = {value: new if its == old else its for value, its in group.items()}
        for value, (_, columns) in borders.items():
            pitch[value] = max(pitch[value], shapes[value].width + columns)
        if self.image:
            widest = {its: max(pitch[v] for v in group if group[v] == its) for its in set(group.values())}
            pitch = {value: widest[its] for value, its in group.items()}
        return {value: self._layout(shapes[value], borders[value], pitch[value]) for value in shapes}

    def _layout(self, shape: Shape, border: tuple[int, int], pitch: int) -> Layout:
        """Lay out one map with a border of rows and columns."""
        lead, body = border[0] * pitch + border[1], (shape.height + border[0]) * pitch
        if not self.image:  # odd, since planes a power of two apart share the same few lines of the cache
            return Layout(shape.height, shape.width, pitch, (lead + body) | 1, lead)
        if lead == 0 and body == 1:
            return Layout(1, 1, 1, 1, 0)
        lead = up(lead, LINE)
        plane = up(max(lead + body, lead + up(shape.height * pitch, LINE)), LINE)
        return Layout(shape.height, shape.width, pitch, plane + (LINE if plane % 1024 == 0 else 0), lead)

    def _place(self) -> dict[int, int]:
        """Give every value memory, and return the place of its first pixel.

        Values of one layout share memory when their lives do not overlap: its border then stays zero for good. A sum
        takes the place of what it adds where nothing else reads that: less to keep in the cache.
        """
        program = self.network.program
        last = {value: max(places, default=-1) for value, places in program.readers().items()}
        buffers: list[int] = []  # channels of each
        kinds: list[Layout] = []
        holder: dict[int, int] = {}
        free: list[int] = []

        def take(value: int) -> None:
            layout, channels = self.layouts[value], self.network.shapes[value].channels
            found = next((b for b in reversed(free) if kinds[b] == layout), None)
            if found is None:
                found = len(buffers)
                buffers.append(0)
                kinds.append(layout)
            else:
                free.remove(found)
            buffers[found] = max(buffers[found], channels)
            holder[value] = found

        take(0)
        for place, op in enumerate(program.ops):
            done = {value for value in (op.source, op.residual) if value is not None and last[value] == place}
            same = self.layouts[op.output] == self.layouts.get(op.residual)
            if op.residual in done and op.residual != op.source and same:
                done.remove(op.residual)
                holder[op.output] = holder[op.residual]
            else:
                take(op.output)
            free += [holder[value] for value in done]
            free += [holder[op.output]] if last[op.output] < 0 else []
        starts = []
        for channels, layout in zip(buffers, kinds, strict=True):
            starts.append(self.units)
            self.units = up(self.units + channels * layout.plane + layout.pitch + LINE, LINE)
        return {value: starts[b] + self.layouts[value].lead for value, b in holder.items()}

    def _op(self, op: Op, scratch: int) -> list[COp]:
        """Return the kernel's operations for one of the program."""
        source, output = self.layouts[op.source], self.layouts[op.output]
        shape = self.network.shapes[op.output]
        live = self.network.live[op.output].nonzero()[:, 0]
        c = COp(relu=op.relu, height=shape.height, width=shape.width, stride_y=1, stride_x=1, residual=-1)
        c.source, c.source_pitch, c.source_plane = self.origins[op.source], source.pitch, source.plane
        c.output, c.output_pitch, c.output_plane = self.origins[op.output], output.pitch, output.plane
        if op.residual is not None:
            added = self.layouts[op.residual]
            c.residual, c.residual_pitch, c.residual_plane = self.origins[op.residual], added.pitch, added.plane
        c.count, c.channels = len(live), self._pointer(live)
        if op.output not in self.network.terms:
            return [self._pool(c, op)]
        terms = self.network.terms[op.output]
        bias = op.bias if op.bias is not None else torch.zeros(shape.channels)
        c.bias = self._pointer(bias[live], torch.float32)
        counts = torch.bincount(terms.output, minlength=shape.channels)[live]
        c.starts = self._pointer(torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
        c.kind = DOTS if self._single(op) else STRIPS if self.image else TILES
        parts, offsets = [c], terms.channel * source.plane + terms.row * source.pitch + terms.column
        if self._splits(op):
            part, offsets = self._split(c, op, terms, scratch)
            parts = [part, c]
        elif not self._single(op):
            c.stride_y, c.stride_x = (axis.stride for axis in op.axes)
        self._finish(c, terms, offsets)
        return parts

    def _finish(self, c: COp, terms: Terms, offsets: Tensor) -> None:
        """Add the terms, the mask and the cost."""
        size = offsets * self.unit * 4
        if len(size) and int(size.abs().max()) >= 2**31:
            raise ValueError("the maps of these images are too large for sparse inference: give smaller images")
        both = torch.stack([size.int(), terms.weight.float().view(torch.int32)], 1)
        c.terms = self._pointer(both)
        vectors = c.height * c.width
        if c.kind == STRIPS:
            vectors = up(c.height * c.output_pitch, self.lanes) // self.lanes
            pixel = torch.arange(vectors * self.lanes)
            inside = (pixel % c.output_pitch < c.width) & (pixel < c.height * c.output_pitch)
            c.mask = self._pointer(-inside.int())
        self.cost += (len(size) + c.count) * vectors

    def _split(self, c: COp, op: Op, terms: Terms, scratch: int) -> tuple[COp, Tensor]:
        """Let a strided convolution read the phases of its input; return the operation that splits, and the offsets."""
        rows, columns = op.axes
        shape, pitch = self.network.shapes[op.source], c.output_pitch
        row, column = terms.row + rows.before, terms.column + columns.before
        phase = row % rows.stride * columns.stride + column % columns.stride
        phases, phase = phase.unique(return_inverse=True)
        channels, channel = terms.channel.unique(return_inverse=True)
        height = c.height + (rows.kernel - 1) * rows.dilation // rows.stride
        first = torch.stack([phases // columns.stride - rows.before, phases % columns.stride - columns.before], 1)
        part = COp(kind=SPLIT, height=shape.height, width=shape.width, stride_y=rows.stride, stride_x=columns.stride)
        part.source, part.source_pitch, part.source_plane = c.source, c.source_pitch, c.source_plane
        part.output, part.output_pitch = scratch, pitch
        part.count, part.channels = len(channels), self._pointer(channels)
        part.windows, part.step_y, part.step_x = self._pointer(first), len(phases), height
        c.source = scratch
        planes = len(channels) * len(phases)
        self.scratch = max(self.scratch, planes * height * pitch + pitch + 2 * LINE)
        self.cost += planes * up(height * pitch, self.lanes) // self.lanes
        offsets = (channel * len(phases) + phase) * height + row // rows.stride
        return part, offsets * pitch + column // columns.stride

    def _pool(self, c: COp, op: Op) -> COp:
        """Complete a pooling operation."""
        shape, sizes = self.network.shapes[op.source], (c.height, c.width)
        c.kind = MAX if op.kind == "max" else SUM
        c.step_y, c.step_x = (axis.dilation for axis in op.axes)
        found = [windows(op, axis, n, m) for axis, n, m in zip(op.axes, sizes, shape[1:], strict=True)]
        scales = [scale for _, factors in found for scale in factors]
        if op.divisor is not None:
            scales = [1 / op.divisor] * c.height + [1.0] * c.width
        c.windows = self._pointer([end for ends, _ in found for pair in ends for end in pair])
        c.scales = self._pointer(scales, torch.float32)
        self.cost += c.count * shape.height * shape.width
        return c


def reach(axis: Axis, count: int) -> int:
    """Return how many inputs, from the first pixel on, `count` windows extend over."""
    return (count - 1) * axis.stride + (axis.kernel - 1) * axis.dilation - axis.before + 1


def windows(op: Op, axis: Axis, count: int, size: int) -> tuple[list[tuple[int, int]], list[float]]:
    """Return from where to where each window of pooling reaches within the map, and one over what it is divided by."""
    if op.kind == "adaptive":
        ends = [(i * size // count, up((i + 1) * size, count) // count) for i in range(count)]
        return ends, [1 / (to - start) for start, to in ends]
    ends, factors = [], []
    for i in range(count):
        start, to = i * axis.stride - axis.before, i * axis.stride - axis.before + (axis.kernel - 1) * axis.dilation + 1
        padded = min(to, size + axis.after) - start
        start += up(max(-start, 0), axis.dilation)
        to = min(to, size)
        ends.append((start, to))
        factors.append(1 / (padded if op.count_padding else to - start))
    return ends, factors
