"""What is left of a program: its non-zero weights and the channels that reach the output, for images of one shape."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .sparse_program import KERNELS, Axis, Op, Program, Shape


def up(number: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-number // multiple) * multiple


class Terms(NamedTuple):
    """The non-zero weights of a layer, by output channel: where each reads, relative to the output's pixel."""

    output: Tensor  # (n,) output channel, ascending
    channel: Tensor  # (n,) input channel
    row: Tensor  # (n,) of the input, less the padding
    column: Tensor
    weight: Tensor


def axes_of(op: Op, shape: Shape) -> tuple[Axis, Axis]:
    """Return the axes of an operation; a linear layer is a kernel over the whole map."""
    return (Axis(shape.height), Axis(shape.width)) if op.kind == "linear" else op.axes


def terms_of(op: Op, shape: Shape, after: Shape) -> Terms:
    """List the non-zero weights that ever read a pixel of the map rather than its padding."""
    if op.kind == "identity":
        channel, nothing = torch.arange(shape.channels), torch.zeros(shape.channels, dtype=torch.int64)
        return Terms(channel, channel, nothing, nothing, torch.ones(shape.channels, dtype=torch.float32))
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


def reach(axis: Axis, count: int) -> int:
    """Return how many inputs, from the first pixel on, `count` windows extend over."""
    return (count - 1) * axis.stride + (axis.kernel - 1) * axis.dilation - axis.before + 1


def windows(op: Op, axis: Axis, count: int, size: int) -> tuple[list[tuple[int, int]], list[float]]:
    """Return from where to where each window of pooling reaches within the map, and one over what it is divided by.

    Raises:
        ValueError: a window for the largest value has no pixel of the map.
    """
    if op.kind == "adaptive":
        ends = [(i * size // count, up((i + 1) * size, count) // count) for i in range(count)]
        return ends, [1 / (to - start) for start, to in ends]
    ends, factors = [], []
    for i in range(count):
        start, to = i * axis.stride - axis.before, i * axis.stride - axis.before + (axis.kernel - 1) * axis.dilation + 1
        padded = min(to, size + axis.after) - start
        start += up(max(-start, 0), axis.dilation)
        to = min(to, size)
        if op.kind == "max" and start >= to:
            raise ValueError(f"{op.name} has a window without a pixel on {size} of them: give larger images")
        ends.append((start, to))
        factors.append(1 / (padded if op.count_padding else to - start))
    return ends, factors
