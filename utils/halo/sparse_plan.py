"""From a program to what the kernel runs: its structures, and each non-zero weight with its fixed offset."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .sparse_layout import LINE, Memory
from .sparse_program import Op, Shape
from .sparse_schedule import Step, blocks_of, schedule
from .sparse_structs import DOTS, MAX, SPLIT, STRIPS, SUM, TILES, CMap, COp, CPlan
from .sparse_terms import Network, Terms, up, windows

FARTHEST = 2**31  # bytes from the first pixel of a map, from which on the kernel's numbers do not reach
PACKING = 4  # vector operations for a pixel of the images, until it lies in a block


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
        self.network, self.lanes, self.memory = network, lanes, Memory(network, image=image)
        self.unit = 1 if image else lanes
        self.cost = self.scratch = 0
        self._keep: list[object] = []
        program, shapes = network.program, network.shapes
        scratch = up(self.memory.units, LINE)
        ops = schedule([Step(op, self._op(op, scratch)) for op in program.ops], unit=self.unit)
        self.size = up(self.unit * (scratch + self.scratch) + LINE, LINE)
        array = (COp * len(ops))(*ops)
        ends = [self._map(value, shapes[value]) for value in (0, program.output)]
        chunks = torch.nn.functional.pad(network.wanted.flatten(), (0, -network.wanted.numel() % lanes))
        wanted = self._pointer([*(chunks.view(-1, lanes).any(1).nonzero()[:, 0] * lanes).tolist(), -1])
        self._keep.append(array)
        self.cost += 0 if image else PACKING * network.wanted.numel()
        self.c = CPlan(base, len(ops), ctypes.addressof(array), *ends, wanted)

    def _pointer(self, numbers: list | Tensor, dtype: torch.dtype = torch.int32) -> int:
        """Keep numbers as long as this plan and return where they are."""
        tensor = torch.as_tensor(numbers, dtype=dtype).contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _map(self, value: int, shape: Shape) -> CMap:
        layout = self.memory.layouts[value]
        return CMap(self.memory.origins[value], layout.pitch, layout.plane, *shape)

    def _op(self, op: Op, scratch: int) -> list[COp]:
        """Return the kernel's operations for one of the program."""
        source, output = self.memory.layouts[op.source], self.memory.layouts[op.output]
        shape = self.network.shapes[op.output]
        live = self.network.live[op.output].nonzero()[:, 0]
        c = COp(relu=op.relu, height=shape.height, width=shape.width, stride_y=1, stride_x=1, residual=-1)
        c.source, c.source_pitch, c.source_plane = self.memory.origins[op.source], source.pitch, source.plane
        c.output, c.output_pitch, c.output_plane = self.memory.origins[op.output], output.pitch, output.plane
        if op.residual is not None:
            added = self.memory.layouts[op.residual]
            c.residual, c.residual_pitch, c.residual_plane = self.memory.origins[op.residual], added.pitch, added.plane
        c.count, c.channels = len(live), self._pointer(live)
        if op.output not in self.network.terms:
            return [self._pool(c, op)]
        terms = self.network.terms[op.output]
        c.kind = DOTS if self.memory.single(op) else STRIPS if self.memory.image else TILES
        parts, offsets = [c], terms.channel * source.plane + terms.row * source.pitch + terms.column
        if self.memory.splits(op):
            part, offsets = self._split(c, op, terms, scratch)
            parts = [part, c]
        elif not self.memory.single(op):
            c.stride_y, c.stride_x = (axis.stride for axis in op.axes)
        self._count(c, len(offsets))
        bias = op.bias if op.bias is not None else torch.zeros(shape.channels, dtype=torch.float32)
        block = blocks_of(c, terms, op, self.unit)
        for number in range(int(block.max()) if len(block) else 0):
            parts.insert(-1, self._partial(c, terms, offsets, block == number, live, bias))
            bias = torch.zeros(shape.channels, dtype=torch.float32)
            c.residual, c.residual_pitch, c.residual_plane = c.output, c.output_pitch, c.output_plane
        self._give(c, terms, offsets, block == block.max() if len(block) else block > 0, live, bias)
        return parts

    def _partial(self, c: COp, *given: Terms | Tensor) -> COp:
        """Return a convolution that only sums one block of the terms."""
        part = COp.from_buffer_copy(c)
        part.relu = 0
        self._give(part, *given)
        return part

    def _give(self, c: COp, terms: Terms, offsets: Tensor, chosen: Tensor, live: Tensor, bias: Tensor) -> None:
        """Let an operation start from the bias and add the chosen terms."""
        size = offsets[chosen] * self.unit * 4
        if len(size) and int(size.abs().max()) >= FARTHEST:
            raise ValueError("the maps of these images are too large for sparse inference: give smaller images")
        c.bias = self._pointer(bias[live], torch.float32)
        counts = torch.bincount(terms.output[chosen], minlength=len(bias))[live]
        c.starts = self._pointer(torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
        c.terms = self._pointer(torch.stack([size.int(), terms.weight[chosen].float().view(torch.int32)], 1))

    def _count(self, c: COp, terms: int) -> None:
        """Add the cost, and the mask that strips need."""
        vectors = c.height * c.width
        if c.kind == STRIPS:
            vectors = up(c.height * c.output_pitch, self.lanes) // self.lanes
            pixel = torch.arange(vectors * self.lanes)
            inside = (pixel % c.output_pitch < c.width) & (pixel < c.height * c.output_pitch)
            c.mask = self._pointer(-inside.int())
        self.cost += (terms + c.count) * vectors

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
