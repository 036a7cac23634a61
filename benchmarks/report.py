"""Tables in Markdown and the figure of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from utils.plot_style import DARK, LIGHT, MIDDLE, legend_below, save_figure


def cell(value: object) -> str:
    """Format one value of a table."""
    if isinstance(value, list):
        return " to ".join(cell(v) for v in value)
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if isinstance(value, int) or value >= 1e4 else f"{value:.4g}"
    return str(value)


def markdown(title: str, table: Sequence[dict]) -> str:
    """Format a table; its columns are the keys of the rows."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(c, "")) for c in columns] for row in table)]
    return f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot_scaling(table: Sequence[dict], path: str | Path) -> None:
    """Draw the time of a step of lam against the number of parameters, whole and for each.

    Args:
        table: rows of `parameters` and `<form> ms`.
        path: PNG to write.
    """
    counts = [row["parameters"] for row in table]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    whole, each = figure.subplots(1, 2)
    forms = {
        "autograd": ("s--", LIGHT, "autograd"),
        "pieces": ("^:", MIDDLE, "without a C++ compiler"),
        "compiled": ("o-", DARK, "one compiled pass"),
    }
    nanoseconds = {form: [1e6 * row[f"{form} ms"] / row["parameters"] for row in table] for form in forms}
    for form, (style, colour, label) in forms.items():
        whole.plot(counts, [row[f"{form} ms"] for row in table], style, color=colour, label=label)
        each.plot(counts, nanoseconds[form], style, color=colour, label=label)
    whole.set(xscale="log", yscale="log", xlabel="parameters in one tensor", ylabel="penalty and step of lam (ms)")
    each.set(xscale="log", yscale="log", xlabel="parameters in one tensor", ylabel="the same for each parameter (ns)")
    for axes in (whole, each):
        axes.grid(alpha=0.3)
    legend_below(figure, whole.get_legend_handles_labels()[0])
    ends = " to ".join(f"{pick(nanoseconds['compiled']):.2g}" for pick in (min, max))
    ratio = table[-1]["autograd ms"] / table[-1]["compiled ms"]
    title = f"One compiled pass takes {ends} ns a parameter at every size"
    figure.suptitle(f"{title},\nat {counts[-1] / 1e6:,.0f} million parameters 1/{ratio:.0f} of autograd's time")
    save_figure(figure, path)


def plot_sparsity(table: Sequence[dict], path: str | Path) -> None:
    """Draw how many times faster sparse inference is against the fraction of zeros, and where it overtakes.

    Args:
        table: rows of `network`, `sparsity`, `dense ms`, `sparse_quartiles` and `times faster`.
        path: PNG to write.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles = [("o-", DARK), ("s--", MIDDLE), ("^:", LIGHT)]
    for name, (style, colour) in zip(dict.fromkeys(row["network"] for row in table), styles, strict=False):
        mine = [row for row in table if row["network"] == name]
        points = [(row["sparsity"], row["times faster"]) for row in mine]
        for row in mine:
            ends = [row["dense ms"] / time for time in row["sparse_quartiles"]]
            axes.plot([1 - row["sparsity"]] * 2, ends, "-", color=colour, linewidth=1, marker="_", markersize=6)
        axes.plot(
            [1 - s for s, _ in points],
            [t for _, t in points],
            style,
            color=colour,
            label=f"{name}: {overtaking(points)}",
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="zeros (log scale of the fraction left)")
    axes.set(ylabel="times faster than torch, dense (fp32)")
    axes.set_xlim(1.1, 0.009)
    axes.set_xticks([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01], ["0", "50%", "80%", "90%", "95%", "98%", "99%"])
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    most = max(row["sparsity"] for row in table)
    ends = [row["times faster"] for row in table if row["sparsity"] == most]
    gain = f"{min(ends):.0f} to {max(ends):.0f} times faster at {most:.0%} zeros"
    note = "random masks, batch 64, on a CPU; medians, bars: quartiles of the sparse time"
    axes.set_title(f"Sparse inference: {gain}\n{note}", fontsize=10)
    save_figure(figure, path)


def overtaking(points: Sequence[tuple[float, float]]) -> str:
    """Say from which sparsity on every ratio is above 1, between measured points in a line."""
    below = [index for index, (_, ratio) in enumerate(points) if ratio < 1]
    if not below:
        return "faster throughout"
    (a, low), *beyond = points[below[-1] :]
    if not beyond:
        return f"slower at {a:.0%} too"
    b, high = beyond[0]
    return f"faster from {a + (b - a) * (1 - low) / (high - low):.0%} on"
