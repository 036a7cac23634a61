"""Where every map of a program lies in memory.

A map is stored as planes of rows, one plane a channel. The rows of a plane follow each other with `pitch` units from
one to the next; the zeros between them are the right border of one row and the left border of the next, and rows of
zeros stand before and behind. A pixel that lies (dy, dx) away therefore always lies dy * pitch + dx units away,
padding included.

Two forms share this. In a block a unit is a vector of one pixel of as many images as a register has floats, and every
row has just the border that its readers need. For one image a unit is a float and a register holds neighbouring
pixels, across the ends of rows; so a map has the pitch of the maps computed from it, and what a strided convolution
reads is first split into maps of every stride-th pixel.
"""

from __future__ import annotations

from typing import NamedTuple

from .sparse_program import Op, Shape
from .sparse_terms import Network, reach, up

LINE = 16  # floats: what loads and stores past the end of a map may touch; also the alignment of planes of one image


class Layout(NamedTuple):
    """How a map lies: units from row to row, from plane to plane, and before the first pixel of a plane."""

    height: int
    width: int
    pitch: int
    plane: int
    lead: int


class Memory:
    """The layouts and places of all values of a network, for one form.

    Args:
        network: what runs.
        image: the form for one image, or else for a block.

    Attributes:
        layouts: by value.
        origins: by value, where its first pixel lies, in units.
        units: that all of them take.
    """

    def __init__(self, network: Network, *, image: bool) -> None:
        self.network, self.image = network, image
        self.layouts = self._lay_out()
        self.units = 0
        self.origins = self._place()

    def single(self, op: Op) -> bool:
        """Tell whether an operation writes one pixel a channel."""
        shape = self.network.shapes[op.output]
        return shape.height * shape.width == 1

    def splits(self, op: Op) -> bool:
        """Tell whether the input of an operation is split by its strides first."""
        return self.image and op.kind == "conv" and not self.single(op) and {a.stride for a in op.axes} != {1}

    def _lay_out(self) -> dict[int, Layout]:
        """Give every value the border that its readers need, and in the form for one image equal pitches."""
        shapes = self.network.shapes
        borders = dict.fromkeys(shapes, (0, 0))
        pitch = {value: shape.width for value, shape in shapes.items()}
        group = {value: value for value in shapes}  # values of one pitch name one of them
        for op in self.network.program.ops:
            if op.output not in self.network.terms or self.single(op):
                continue
            before, after = shapes[op.source], shapes[op.output]
            partners = [op.residual] if op.residual is not None else []
            if self.splits(op):
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
        if not self.image:
            # The first cache has 64 places for a unit, by its address: -11 puts ten pixels of one channel before those
            # of the next. Small planes are only made odd, so as not to grow by much.
            plane = (lead + body) | 1
            plane += (-11 - plane) % 64 if plane > 500 else 0
            return Layout(shape.height, shape.width, pitch, plane, lead)
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
