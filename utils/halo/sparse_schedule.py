"""In which order a block of images is computed, so that what is read again soon is still in the cache.

Two things are cut. A convolution that adds many terms from many channels does so in blocks of input channels whose
rows stay in the first cache, with partial sums in between. And where the maps of two convolutions exceed the second
cache, they advance together, a band of rows each: the second reads what the first has just written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .sparse_program import Op
from .sparse_structs import TILES, COp
from .sparse_terms import Terms

FIRST_CACHE = 2**15  # bytes of it that input rows may take
SECOND_CACHE = 2**20
TERMS = 24  # fewer than this in a block do not pay for storing and loading a partial sum
PIXELS = 32  # of a band


class Step(NamedTuple):
    """An operation and what the kernel runs for it."""

    op: Op
    parts: list[COp]

    @property
    def tiles(self) -> bool:
        """Whether it may be cut into bands of rows."""
        return self.parts[-1].kind == TILES


def blocks_of(c: COp, terms: Terms, op: Op, unit: int) -> Tensor:
    """Return for each term the block of input channels to which it belongs."""
    channels, rank = terms.channel.unique(return_inverse=True)
    if c.kind != TILES or not c.count:
        return torch.zeros_like(rank)
    rows, columns = op.axes
    pixels = rows.kernel * (8 * columns.stride + columns.kernel - 1)  # that a tile of one row reads
    wanted = -(-len(channels) * pixels * 4 * unit // FIRST_CACHE)
    blocks = max(min(wanted, len(rank) // (c.count * TERMS)), 1)
    return rank * blocks // max(len(channels), 1)


def schedule(steps: list[Step], *, unit: int) -> list[COp]:
    """Return what the kernel runs, in order.

    Args:
        steps: the operations of the program, in order.
        unit: floats in a unit of memory.
    """
    ops: list[COp] = []
    while steps:
        one, *rest = steps
        if rest and _together(one, rest[0], unit):
            ops += _interleave(one, rest[0])
            rest = rest[1:]
        else:
            ops += _bands(one, 0, one.parts[-1].height) if len(one.parts) > 1 and one.tiles else one.parts
        steps = rest
    return ops


def _together(one: Step, other: Step, unit: int) -> bool:
    """Tell whether two convolutions should advance together."""
    if not (one.tiles and other.tiles and other.op.source == one.op.output):
        return False
    a, b = one.parts[0], other.parts[0]
    moved = a.source_pitch * a.height * a.stride_y, a.output_plane, b.output_plane
    return 4 * unit * sum(moved) * a.count > SECOND_CACHE


def _interleave(one: Step, other: Step) -> Iterator[COp]:
    """Let the second convolution follow the first as closely as it can."""
    a, b, axis, done = one.parts[0], other.parts[0], other.op.axes[0], 0
    reads = {place for c in one.parts for place in (c.source, c.residual)}
    size = _rows(b)
    for top in range(0, b.height, size):
        end = min(top + size, b.height)
        need = (end - 1) * axis.stride - axis.before + (axis.kernel - 1) * axis.dilation + 1
        if b.output in reads:  # the second overwrites rows that the first must have read
            need = max(need, (end - 1 + one.op.axes[0].before) // a.stride_y + 1, end)
        need = a.height if end == b.height else min(max(need, done), a.height)
        yield from _bands(one, done, need)
        yield from _bands(other, top, end)
        done = need


def _rows(c: COp) -> int:
    """Return the rows of a band."""
    return max(PIXELS // c.width, 1)


def _bands(step: Step, top: int, end: int) -> Iterator[COp]:
    """Return the parts of a convolution for some rows, band by band."""
    size = _rows(step.parts[0])
    for start in range(top, end, size):
        for part in step.parts:
            c = COp.from_buffer_copy(part)
            c.height = min(size, end - start)
            c.source += start * c.stride_y * c.source_pitch
            c.output += start * c.output_pitch
            c.residual += start * c.residual_pitch if c.residual >= 0 else 0
            yield c
