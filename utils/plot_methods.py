"""Figures that compare methods: a study, its tuned runs, and any runs side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator

from utils.plot_style import legend_below, legend_label, looks, save_figure, sparsity_axis
from utils.verdict import any_failed, failed_to_learn, finding

FEW = 3  # up to so many seeds are drawn one by one; a standard deviation of them would say little
NEAR = 5.0  # points of top-1 below the best that the close-up still shows


def middle(row: Mapping) -> float:
    """Return what is drawn of a row: the mean, or the median where a run failed to learn."""
    return median(row["top1_seeds"]) if any_failed([row]) else row["top1_mean"]


def extent(row: Mapping) -> list[float]:
    """Return the values that a row's mark spans: of few seeds each that learned, else mean and bar, within 0 to 100."""
    if one_by_one(row):
        return [middle(row), *(v for v, failed in zip(row["top1_seeds"], row["failed"], strict=True) if not failed)]
    spread = row["top1_std"] or 0.0
    return [middle(row), max(0.0, middle(row) - spread), min(100.0, middle(row) + spread)]


def one_by_one(row: Mapping) -> bool:
    """Tell whether a row's seeds are drawn one by one: they are known, and few or one of them failed."""
    return bool(row.get("top1_seeds")) and (1 < row["n"] <= FEW or any(row["failed"]))


def _draw_row(axes: Axes, x: float, row: Mapping, look: Mapping, *, floor: float) -> None:
    """Draw the seeds of a row, or its bar; a failed seed as a cross, at the floor of a close-up that it lies below."""
    colour = look["color"]
    if not one_by_one(row):
        if row["n"] == 1:
            return
        _, *ends = extent(row)
        axes.plot([x, x], ends, "-", color=colour, marker="_", markersize=6, linewidth=1)
        return
    for value, failed in zip(row["top1_seeds"], row["failed"], strict=True):
        if failed:
            axes.plot(x, max(value, floor), "x", color=colour, markersize=9, markeredgewidth=2, clip_on=False)
        else:
            axes.plot(x, value, ".", color=colour, markersize=4)


def _region(ratios: Sequence[float], ratio: float) -> list[float]:
    """Return the ratios of the close-up: the one the title speaks of, the three before it and the one behind."""
    pruned = [other for other in ratios if other or not ratio]  # before pruning lies far away
    index = pruned.index(ratio)
    return pruned[max(0, index - 3) : index + 2]


def _comparable(rows: Sequence[Mapping]) -> float:
    """Return the highest ratio at which every method was measured, and one has learned what others know.

    At another the best may be missing, or nothing be left of any.
    """
    methods, most = {row["method"] for row in rows}, max(row["top1_mean"] for row in rows)
    everywhere = [
        ratio
        for ratio in {row["ratio"] for row in rows}
        if {row["method"] for row in rows if row["ratio"] == ratio} == methods
    ]
    best = {ratio: max(row["top1_mean"] for row in rows if row["ratio"] == ratio) for ratio in everywhere}
    alive = [ratio for ratio in everywhere if not failed_to_learn(best[ratio], most)]
    return max(alive or everywhere or [row["ratio"] for row in rows])


def _close_up_limits(rows: Sequence[Mapping], region: Sequence[float]) -> tuple[float, float]:
    """Return limits that hold, whole, the marks within NEAR points of the best at one of the region's ratios."""
    shown: list[float] = []
    for ratio in region:
        here = [row for row in rows if row["ratio"] == ratio]
        best = max((middle(row) for row in here), default=0.0)
        shown += [value for row in here if middle(row) > best - NEAR for value in extent(row)]
    margin = max(0.06 * (max(shown) - min(shown)), 0.1)
    return min(shown) - margin, max(shown) + margin


def _keys(rows: Sequence[Mapping], handles: list[Line2D]) -> list[Line2D]:
    """Return the handles of a legend with what the small marks mean."""
    barred = [row for row in rows if not one_by_one(row) and row["top1_std"]]
    keys = {".": "one seed"} if any(map(one_by_one, rows)) else {}
    if barred:
        lost = ", where single seeds were not kept" if any(row["n"] <= FEW for row in barred) else ""
        keys["|"] = f"± standard deviation over seeds{lost}"
    if any_failed(rows):
        keys["x"] = "failed to learn, or lost it in a cut during training (the median is drawn; at the edge: below it)"
    for marker, label in keys.items():
        style = {"linestyle": "", "markeredgewidth": 1 if marker == "|" else 2, "markersize": 5 if marker == "." else 9}
        handles.append(Line2D([], [], color="black", marker=marker, label=label, **style))
    return handles


def _is_closer(limits: tuple[float, float], values: Sequence[float]) -> bool:
    """Tell whether a close-up shows more than a whole of these values: its axis is less than half as long."""
    return limits[1] - limits[0] < 0.5 * (max(values) - min(values))


def _draw_methods(axes: Axes, rows: Sequence[Mapping], ratios: Sequence[float], *, apart: bool, floor: float) -> None:
    """Draw every method at some ratios; apart: one beside the other, where their marks would cover each other."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    at, look = sparsity_axis(axes, ratios), looks(methods)
    step = _side_by_side(at.values(), len(methods)) if apart else 1.0
    for number, method in enumerate(methods):
        mine = sorted((r for r in rows if r["method"] == method and r["ratio"] in at), key=lambda row: row["ratio"])
        x = [at[row["ratio"]] * step ** (number - (len(methods) - 1) / 2) for row in mine]
        axes.plot(x, [middle(row) for row in mine], label=method, **look[method])
        for where, row in zip(x, mine, strict=True):
            _draw_row(axes, where, row, look[method], floor=floor)
    left, right = axes.get_xlim()
    axes.set_xlim(left / step ** (len(methods) / 2), right * step ** (len(methods) / 2))


def plot_study(
    rows: Sequence[dict],
    path: str | Path,
    *,
    title: str,
    ratio: float | None = None,
    images: str = "test",
) -> None:
    """Draw the accuracy of every method against the fraction removed: all of it, and the region of the title.

    Args:
        rows: `method`, `ratio`, `n`, `top1_mean`, `top1_std` (empty for n = 1), `top1_seeds` and `failed` (of each
            seed; both may be missing), `coefficients` (may be missing), as from `utils.studies.rows.final_rows`.
        path: PNG to write.
        title: what the study asks.
        ratio: that the title speaks of (default: the highest at which every method has a row, else the highest; where
            one of them still has half of what the best had).
        images: which images the accuracy was measured on, for the label.

    Note:
        Where the region of the title needs the same axis, as with one method, it is not drawn again.
    """
    ratios = sorted({row["ratio"] for row in rows})
    ratio = _comparable(rows) if ratio is None else ratio
    region = _region(ratios, ratio)
    limits = _close_up_limits(rows, region)
    closer = _is_closer(limits, [value for row in rows for value in extent(row)])
    figure = Figure(figsize=(12 if closer else 8, 5.2), layout="constrained")
    whole, *close = figure.subplots(1, 1 + closer, squeeze=False)[0]
    _draw_methods(whole, rows, ratios, apart=False, floor=0.0)
    whole.set(ylabel=f"{images} top-1 (%)")
    for axes in close:
        _draw_methods(axes, rows, region, apart=True, floor=limits[0])
        axes.set(ylabel=f"{images} top-1 (%), close-up", ylim=limits)
    legend_below(figure, _keys(rows, whole.get_legend_handles_labels()[0]))
    found = _wrapped(finding(rows, ratio=ratio), rows, width=100 if closer else 66)
    figure.suptitle("\n".join([title, found, f"({_meaning(rows, closer=closer)})"]))
    save_figure(figure, path)


def _wrapped(text: str, rows: Sequence[Mapping], *, width: int) -> str:
    """Break a finding into lines, but no name of a method, nor its value and spread from it."""
    kept = {f"{row['method']} " for row in rows} | {" ± "}
    for name in sorted(kept, key=len, reverse=True):
        text = text.replace(name, name.replace(" ", "\N{NO-BREAK SPACE}"))
    return textwrap.fill(text, width).replace("\N{NO-BREAK SPACE}", " ")


def _meaning(rows: Sequence[Mapping], *, closer: bool) -> str:
    """Say what the lines of a study are, and over how many seeds."""
    used = {(row["method"], row.get("coefficients", "")) for row in rows}
    chosen = "coefficients chosen for each ratio" if len(used) > len({method for method, _ in used}) else ""
    counts = sorted({row["n"] for row in rows})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    line = "one run each" if counts[-1] == 1 else "line: mean over seeds"
    line += ", the median where one failed" if any_failed(rows) else ""
    return "; ".join(filter(None, [chosen, f"{line}, n = {seeds}", "close-up: methods side by side" if closer else ""]))


def _side_by_side(places: Iterable[float], methods: int) -> float:
    """Return the factor on x between neighbouring methods: together 0.6 of the smallest gap between ratios."""
    logs = sorted(math.log10(place) for place in places)
    gap = min((b - a for a, b in zip(logs, logs[1:], strict=False)), default=0.3)
    return 10 ** -(0.6 * min(gap, 0.15) / methods)


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto front of points (cost, gain): those that no other beats in one without losing in the other.

    Returns:
        From the cheapest on; cost and gain both rise strictly.
    """
    result: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not result or gain > result[-1][1]:
            result.append((cost, gain))
    return result


def plot_pareto(tuned: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, *, title: str) -> None:
    """Draw every tuned run on the held-out images, faint, and the Pareto front of each method and of all.

    A front is made of single runs: the more a method has, the further out it lies by chance, so their number is given.

    Args:
        tuned: method to its runs at all ratios: multiply-adds left as a fraction of the dense network's, in (0, 1],
            and top-1 in percent.
        path: PNG to write.
        title: what the study asks.
    """
    fronts = {method: front(points) for method, points in tuned.items() if points}
    best = front(point for points in tuned.values() for point in points)
    gains = sorted(gain for steps in fronts.values() for _, gain in steps)
    low, high = gains[int(0.4 * len(gains))], gains[-1]
    margin = max(0.06 * (high - low), 0.1)
    limits = low - margin, high + margin
    closer = _is_closer(limits, [gain for points in tuned.values() for _, gain in points])
    figure = Figure(figsize=(12 if closer else 8, 5.2), layout="constrained")
    panels, look = figure.subplots(1, 1 + closer, squeeze=False)[0], looks(fronts)
    outline = [withStroke(linewidth=9, foreground="#444444")]  # a light band would hide a light curve
    for axes in panels:
        band = {"color": "white", "linewidth": 7, "path_effects": outline, "label": "all methods"}
        axes.plot(*zip(*best, strict=True), drawstyle="steps-post", **band)
        for method, steps in fronts.items():
            style, count = look[method], len(tuned[method])
            axes.plot(*zip(*tuned[method], strict=True), style["marker"], color=style["color"], alpha=0.2, markersize=4)
            axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", label=f"{method} ({count})", **style)
        axes.set(xscale="log", xlabel="multiply-adds left, as a fraction of dense (zeros skipped; log scale)")
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="top-1 on the held-out images (%)")
    inside = [cost for steps in fronts.values() for cost, gain in steps if gain >= low]
    for axes in panels[1:]:
        axes.set(ylabel="the same, close-up", ylim=limits)
        axes.set_xlim(max(inside) * 1.15, min(inside) / 1.15)
    legend_below(figure, panels[0].get_legend_handles_labels()[0])
    what = "Pareto fronts of single runs at single ratios (how many: in brackets)"
    figure.suptitle(f"{title}\n{what},\nas tuned on the held-out images; faint: the others")
    save_figure(figure, path)


def plot_comparison(
    runs: Mapping[str, Mapping[float, float]], path: str | Path, *, title: str, images: str = "test"
) -> None:
    """Draw top-1 against the fraction of weights removed, one line a run, each at its own ratios.

    Args:
        runs: label to ratio to top-1 in percent.
        path: PNG to write.
        title: what the figure shows.
        images: which images the accuracy was measured on, for the label.
    """
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes, look = figure.subplots(), looks(runs)
    at = sparsity_axis(axes, {ratio for run in runs.values() for ratio in run})
    for label, run in runs.items():
        ratios = sorted(run)
        axes.plot([at[r] for r in ratios], [run[r] for r in ratios], label=legend_label(label), **look[label])
    axes.set(ylabel=f"{images} top-1 (%)")
    legend_below(figure, axes.get_legend_handles_labels()[0])
    figure.suptitle(title)
    save_figure(figure, path)
