"""The figure of a penalty at work: how the weights and their lam are spread, and lam against |w|."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

from utils.plot_style import DARK, LIGHT, legend_below, save_figure

SMALLEST = 1e-9  # smaller magnitudes, zeros too, are counted but not drawn
BINS = 120


def equilibrium(lam: np.ndarray, *, xi: float, psi: float, decay: float) -> np.ndarray:
    """Return the |w| at which a HALO coefficient lam stands still: lam^3 * (psi + decay * lam) / (2 * xi).

    Args:
        lam: positive values.
        xi, psi: coefficients of HALO, xi > 0.
        decay: weight decay of lam.
    """
    return lam**3 * (psi + decay * lam) / (2 * xi)


def histograms(weights: np.ndarray, lambdas: np.ndarray) -> dict[str, np.ndarray]:
    """Count |w| and |lam|, each and together, so that regularization.png can be drawn without the arrays.

    Args:
        weights: the penalised weights, (n,).
        lambdas: their lam, (n,) for HALO, (1,) for SWS, (0,) where nothing is learned.

    Returns:
        `w_edges` and `w`, their counts; `not_drawn`, the number of |w| below SMALLEST; for HALO also `lam_edges`,
        `lam`, and `both`, the counts of (|w|, |lam|) in the cells of the two.
    """
    weights, lambdas = np.abs(weights), np.abs(lambdas)
    drawn = weights >= SMALLEST
    edges = _edges(weights[drawn], logarithmic=True)
    found = {"w_edges": edges, "w": np.histogram(weights, edges)[0], "not_drawn": np.array((~drawn).sum())}
    if len(lambdas) == len(weights) > 0:
        lambdas = np.maximum(lambdas, SMALLEST)
        found["lam_edges"] = _edges(lambdas, logarithmic=lambdas.max() > 2 * lambdas.min())
        found["lam"] = np.histogram(lambdas, found["lam_edges"])[0]
        found["both"] = np.histogram2d(weights, lambdas, (edges, found["lam_edges"]))[0].astype(np.int64)
    return found


def _edges(values: np.ndarray, *, logarithmic: bool) -> np.ndarray:
    """Return the edges of BINS bins over all values, evenly spaced in their logarithm or in themselves."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (SMALLEST, 1.0)
    low, high = low * (1 - 1e-7), high * (1 + 1e-7)  # the ends lie within, whatever rounding does
    return np.geomspace(low, high, BINS + 1) if logarithmic else np.linspace(low, high, BINS + 1)


def regularization_title(row: Mapping) -> str:
    """Say how many weights are near zero, and how far lam follows |w|, unless all lam are the same within 1%.

    Args:
        row: the last of log.csv; its values may be texts.
    """
    held = " (those held at zero, which are not drawn, among them)" if row.get("sparsity") else ""
    title = f"{100 * float(row['fraction_1e-3']):.1f}% of the penalised weights have |w| <= 1e-3{held}"
    if row["lambda_q0"] == "":
        return title
    low, high = float(row["lambda_q0"]), float(row["lambda_q100"])
    if low == high:
        return f"{title}; lam is {high:.3g} everywhere"
    if row["rank_correlation"] == "":  # all |w| are the same
        return title
    if high < 1.01 * low:
        return f"{title}; lam spans less than 1% ({low:.6g} to {high:.6g})"
    return f"{title}; rank correlation of |lam| with |w|: {float(row['rank_correlation']):.2f}"


def plot_regularization(
    counts: Mapping[str, np.ndarray], path: str | Path, *, title: str, still: tuple[float, float, float] | None
) -> None:
    """Draw the histograms of |w| and |lam|, and |lam| against |w|; |w| alone where lam is not learned per weight.

    Args:
        counts: from `histograms`.
        path: PNG to write.
        title: what the figure shows.
        still: xi, psi and the weight decay of lam, for the line on which lam is at rest; None draws no line.
    """
    panels = 3 if "lam" in counts else 1
    figure = Figure(figsize=(5.2 * panels + (0 if panels == 3 else 1.5), 4.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    unseen = int(counts["not_drawn"])
    note = f"\n({unseen} of less than {SMALLEST:g} are not drawn)" if unseen else ""
    _histogram(axes[0], counts["w"], counts["w_edges"], DARK, f"|w|{note}")
    if panels == 3:
        _histogram(axes[1], counts["lam"], counts["lam_edges"], LIGHT, "|lam|")
        _scatter(figure, axes[2], counts, note=note)
        if still is not None and still[0] > 0 and (still[1] > 0 or still[2] > 0):
            _draw_rest(figure, axes[2], counts, *still)
    figure.suptitle(title)
    save_figure(figure, path)


def _is_logarithmic(edges: np.ndarray) -> bool:
    return bool(edges[-1] > 2 * edges[0])


def _scale(axis: Axis, edges: np.ndarray) -> None:
    """Set the scale of an axis as its bins are spaced, with ticks that do not touch."""
    if not _is_logarithmic(edges):
        axis.set_major_locator(MaxNLocator(3))
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_minor_formatter(NullFormatter())
    if edges[-1] >= 20 * edges[0]:
        axis.set_major_locator(LogLocator(numticks=6))
        return
    subs = (1, 2, 5) if edges[-1] >= 8 * edges[0] else (1, 1.5, 2, 3, 5, 7)
    locator = LogLocator(subs=subs) if edges[-1] >= 4 * edges[0] else MaxNLocator(4)
    ticks = locator.tick_values(edges[0], edges[-1])
    axis.set_major_locator(FixedLocator([tick for tick in ticks if edges[0] <= tick <= edges[-1]]))
    axis.set_major_formatter(lambda value, _: f"{value:.3g}")


def _histogram(axes: Axes, counts: np.ndarray, edges: np.ndarray, colour: str, label: str) -> None:
    """Draw counts on a logarithmic axis: a few large lam matter as much as the many small ones."""
    axes.stairs(counts, edges, fill=True, color=colour)
    _scale(axes.xaxis, edges)
    axes.set(xlabel=label, ylabel="count", xlim=(edges[0], edges[-1]))
    if counts.any():
        axes.set(yscale="log", ylim=(0.7, None))
    axes.grid(alpha=0.3)


def _scatter(figure: Figure, axes: Axes, counts: Mapping[str, np.ndarray], *, note: str) -> None:
    """Draw how many weights lie in each cell of |w| and |lam|."""
    both = np.ma.masked_equal(counts["both"].T, 0)
    norm = LogNorm() if both.count() else LogNorm(1, 2)  # where all weights are zero, nothing is drawn
    mesh = axes.pcolormesh(counts["w_edges"], counts["lam_edges"], both, norm=norm, cmap="Greys")
    figure.colorbar(mesh, ax=axes, label="weights a cell")
    _scale(axes.xaxis, counts["w_edges"])
    _scale(axes.yaxis, counts["lam_edges"])
    low, high = counts["lam_edges"][[0, -1]]
    margin = (high / low) ** 0.02  # the densest row is often the last, and would lie under the frame
    axes.set(xlabel=f"|w|{note}", ylabel="|lam|", ylim=(low / margin, high * margin))


def _draw_rest(
    figure: Figure, axes: Axes, counts: Mapping[str, np.ndarray], xi: float, psi: float, decay: float
) -> None:
    """Draw the line on which lam is at rest as far as it lies within the axes, and say what it is."""
    lam = np.geomspace(counts["lam_edges"][0], counts["lam_edges"][-1], 200)
    at = equilibrium(lam, xi=xi, psi=psi, decay=decay)
    inside = (at > counts["w_edges"][0]) & (at < counts["w_edges"][-1])
    if inside.any():
        label = "lam at rest: where its gradient is zero, lam³ (psi + weight decay · lam) = 2 xi |w|"
        axes.plot(at[inside], lam[inside], "--", color=LIGHT, linewidth=2, label=label)
        legend_below(figure, axes.get_legend_handles_labels()[0])
