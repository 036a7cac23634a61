"""What all figures share: one look a method, the axis of sparsity, the legend, and how a figure is written."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import NullLocator

from utils.files.atomic import atomic_write, printable

DARK, LIGHT, MIDDLE = "#1f3b73", "#e08a1e", "#5c9ead"  # dark, light and between, in greyscale too

# Nine steps of lightness, 7 or more apart (CIE L*), so that a greyscale print tells them apart; the hues stay apart
# for readers who do not see red or green; every method has its own marker, and what is trained after a cut is dashed.
METHODS = {
    "none": ("#979797", "o", "-"),
    "L1": ("#ee9a32", "s", "-"),
    "SWS": ("#158cbb", "^", "-"),
    "MCP": ("#ae193e", "D", "-"),
    "HALO": ("#12277b", "v", "-"),
    "GMP": ("#044f2a", "P", "-."),
    "prune + fine-tune": ("#7c6d0e", "H", "--"),
    "L1 + fine-tune": ("#3b1200", "p", "--"),
    "HALO + fine-tune": ("#a3c6f8", "*", "--"),
}
WORDS = {"none": "none", "l1": "L1", "ws": "SWS", "sws": "SWS", "mcp": "MCP", "halo": "HALO", "gmp": "GMP"}
SPARE_COLOURS = ("#000000", "#d4b95e", "#6d6d6d")
SPARE_MARKERS = ("<", ">", "d", "h", "8")
LINES = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically; its texts mean what they say, so a $ in a path begins no formula.

    Raises:
        OSError: the file cannot be written; what it held before is untouched.
    """
    _fit_title(figure)
    ticks = {text for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in axis.findobj(Text)}
    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text()))
        text.set_parse_math(text in ticks and text.get_parse_math())  # powers of ten stand on axes as formulas
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _fit_title(figure: Figure) -> None:
    """Break the lines of a title that is wider than its figure, as one with paths may be, and make room for them."""
    title = figure.get_suptitle()
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and title and artist.get_text() == title):
        share = text.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width / figure.bbox.width
        if share > 0.98:
            room = int(0.95 * max(map(len, title.splitlines())) / share)
            lines = [part for line in title.splitlines() for part in textwrap.wrap(line, room)]
            figure.set_figheight(figure.get_figheight() + 0.21 * (len(lines) - len(title.splitlines())))
            text.set_text("\n".join(lines))


def legend_label(text: str) -> str:
    """Return a text by which a curve stands in the legend: matplotlib leaves out what begins with an underscore."""
    return f" {text}" if text.startswith("_") else text


def tick_label(text: str) -> str:
    """Return a text that stands on an axis, where save_figure leaves formulas, such that its $ begins none."""
    return text.replace("$", r"\$")


def method_of(label: str) -> str | None:
    """Return the method that a label speaks of: the first that it names, or its fine-tuned form; None if it names none.

    Args:
        label: such as "HALO", "L1, xi = 1e-4" or "runs/mcp/pruned/prune.json".
    """
    text = label.lower()
    words = re.split(r"[^a-z0-9]+", text.replace("no penalty", "none"))
    named = next((WORDS[word] for word in words if word in WORDS), None)
    if re.search(r"fine[-_ ]?tun", text):
        return f"{named} + fine-tune" if named in ("HALO", "L1") else "prune + fine-tune"
    return named


def _spares() -> Iterator[tuple[bool, object, str]]:
    """Yield whether a marker is filled, a line and a marker, all different."""
    for filled, shift, number in itertools.product((False, True), range(len(LINES)), range(len(SPARE_MARKERS))):
        yield filled, LINES[(number + shift) % len(LINES)], SPARE_MARKERS[number]


def looks(labels: Iterable[str]) -> dict[str, dict]:
    """Return how each label's curve is drawn, as keywords of `Axes.plot`; no two of the first 60 are alike.

    A method has one colour everywhere, and one marker. A second curve of the same method keeps the colour and gets a
    marker and a line of its own; so does one whose label names no method.

    Args:
        labels: of the curves of one figure.
    """
    found: dict[str, dict] = {}
    taken: set[str] = set()
    spares = itertools.cycle(_spares())
    colours = itertools.cycle(SPARE_COLOURS)
    for label in labels:
        method = method_of(label)
        colour, marker, line = METHODS[method] if method else (next(colours), "", "-")
        filled = True
        if method is None or method in taken:
            filled, line, marker = next(spares)
        taken.add(method)
        face, edge = (colour, "black") if filled else ("white", colour)
        style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 6 if marker == "*" else 5}
        found[label] = style | {"markerfacecolor": face, "markeredgecolor": edge, "markeredgewidth": 0.6}
    return found


def positions(ratios: Iterable[float]) -> dict[float, float]:
    """Return where each sparsity lies on the axis: the fraction kept; for 1, which keeps nothing, half the least."""
    ratios = sorted(set(ratios))
    least = min((1 - ratio for ratio in ratios if ratio < 1), default=1.0)
    return {ratio: 1 - ratio if ratio < 1 else least / 2 for ratio in ratios}


def sparsity_axis(axes: Axes, ratios: Iterable[float]) -> dict[float, float]:
    """Make x the fraction kept on a logarithmic axis that falls to the right, labelled with the sparsity.

    Args:
        axes: to change.
        ratios: sparsities in [0, 1] that are drawn; each has a tick, and a label where there is room.

    Returns:
        `positions(ratios)`.
    """
    at = positions(ratios)
    logs = {ratio: math.log10(kept) for ratio, kept in at.items()}
    room = max(max(logs.values()) - min(logs.values()), 0.3)
    labelled: list[float] = []
    for ratio in sorted(at, reverse=True):  # the sparsest first: that is where figures are read
        if all(abs(logs[ratio] - logs[other]) > room / 28 for other in labelled):
            labelled.append(ratio)
    axes.set_xscale("log")
    texts = [("dense" if ratio == 0 else f"{round(ratio, 5):g}") if ratio in labelled else "" for ratio in at]
    axes.set_xticks(list(at.values()), texts, rotation=60, fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(10 ** (max(logs.values()) + room / 30), 10 ** (min(logs.values()) - room / 30))
    axes.grid(alpha=0.3)
    axes.set_xlabel("sparsity: fraction of weights removed (log scale of the fraction kept)")
    return at


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """Put a legend below the axes, where it covers nothing, in as many columns as the width holds."""
    widths = [len(str(handle.get_label())) + 8 for handle in handles]  # in characters, with the handle and the gap
    room = 12.5 * figure.get_figwidth()
    columns = len(widths)
    while columns > 1 and sum(max(part) for part in np.array_split(widths, columns)) > room:
        columns -= 1
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, fontsize=9)
