"""The figures of one run or network. Drawn without pyplot, so no display and no global state is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from models import with_depth
from utils.paths import portable_path
from utils.plot_style import (
    DARK,
    LIGHT,
    MIDDLE,
    legend_below,
    legend_label,
    looks,
    save_figure,
    sparsity_axis,
    tick_label,
)

MARKED = 30  # epochs up to which each has a mark; marks of more hide the lines
MOST_IN_TITLE = 3  # networks that a title names; of more, those with the smallest and the largest number


def plot_curves(history: Sequence[dict], path: str | Path, *, title: str) -> None:
    """Draw cross-entropy, penalty (where there is one), accuracy and learning rate against the epoch.

    Args:
        history: the rows of log.csv, at least one.
        path: PNG to write.
        title: what the figure shows.
    """
    held_out = "val" if "val_top1" in history[0] else "test"
    epochs = [row["epoch"] for row in history]
    penalties = [row["train_loss_penalized"] - row["train_loss"] for row in history]
    count = 4 if any(penalties) else 3
    figure = Figure(figsize=(7, 2.4 * count + 0.8), layout="constrained")
    panels = list(figure.subplots(count, 1, sharex=True))
    rate, accuracy, loss = panels[-1], panels[-2], panels[0]
    size = 3 if len(epochs) <= MARKED else 0

    def line(axes: Axes, values: Sequence[float], label: str, style: str, colour: str) -> None:
        axes.plot(epochs, values, style, color=colour, label=label, markersize=size)

    for axes, key in ((loss, "loss"), (accuracy, "top1")):
        line(axes, [row[f"train_{key}"] for row in history], "train", "o-", DARK)
        line(axes, [row[f"{held_out}_{key}"] for row in history], held_out, "s--", LIGHT)
    loss.set(ylabel="cross-entropy (nats)", yscale=_spread_scale(row["train_loss"] for row in history))
    accuracy.set(ylabel="top-1 (%)")
    if count == 4:
        panels[1].plot(epochs, penalties, "^-", color=MIDDLE, markersize=size)
        panels[1].set(ylabel="penalty after the epoch (nats)", yscale=_spread_scale(penalties))
    line(rate, [row["lr"] for row in history], "weights", "o-", DARK)
    if history[0]["reg_lr"] != "":
        line(rate, [row["reg_lr"] for row in history], "lam", "s--", LIGHT)
    rate.set(ylabel="learning rate", xlabel="epoch", yscale=_spread_scale(row["lr"] for row in history))
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels:
        axes.grid(alpha=0.3)
    for axes in (loss, accuracy, rate):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.suptitle(title)
    save_figure(figure, path)


def _spread_scale(values: Iterable[float]) -> str:
    """Return the scale on which values can be read: logarithmic where they span a factor of ten, all positive."""
    values = list(values)
    return "log" if min(values) > 0 and max(values) >= 10 * min(values) else "linear"


def plot_accuracy_vs_sparsity(report: Mapping, path: str | Path) -> None:
    """Draw top-1 against sparsity.

    Args:
        report: the content of prune.json, with one ratio at least.
        path: PNG to write.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    before, results = report["before"], sorted(report["results"], key=lambda result: result["sparsity"])
    at = sparsity_axis(axes, {part["sparsity"] for part in (before, *results)})
    axes.axhline(before["top1"], color=MIDDLE, linestyle=":", label="before pruning")
    x = [at[result["sparsity"]] for result in results]
    y = [result["after"]["top1"] for result in results]
    axes.plot([at[before["sparsity"]], *x], [before["top1"], *y], "o-", color=DARK, label="pruned")
    if "recalibrated" in results[0]:
        y = [result["recalibrated"]["top1"] for result in results]
        axes.plot(x, y, "s--", color=LIGHT, label="pruned, BatchNorm recalibrated")
    axes.set(ylabel=f"{report['images']} top-1 (%)")
    legend_below(figure, axes.get_legend_handles_labels()[0])
    last = f"{results[-1]['after']['top1']:.2f}% at sparsity {results[-1]['sparsity']:.3f}"
    name = f"{report['dataset']}, {with_depth(report['arch'], report['depth'])}, {report['scheme']} pruning"
    source = f" of {portable_path(report['checkpoint'])}" if "checkpoint" in report else ""
    figure.suptitle(f"top-1 {before['top1']:.2f}% before pruning, {last}\n{name}{source}")
    save_figure(figure, path)


def layers_title(report: Mapping) -> str:
    """Say how many weights of a network are zero, and which file it is; from the report of check_params.py."""
    return f"{100 * report['sparsity']:.2f}% of the prunable weights are zero\n{portable_path(report['checkpoint'])}"


def plot_layers(layers: Sequence[dict], path: str | Path, *, title: str) -> None:
    """Draw sparsity and density of every layer as stacked bars (Figure 1a), with the percentage left of each.

    Args:
        layers: `name` and `sparsity` of each.
        path: PNG to write.
        title: what the figure shows.
    """
    figure = Figure(figsize=(8, 1.5 + 0.25 * len(layers)), layout="constrained")
    axes = figure.subplots()
    names = [tick_label(layer["name"].removesuffix(".weight")) for layer in layers]
    sparsity = [layer["sparsity"] for layer in layers]
    axes.barh(names, sparsity, color=DARK, label="sparsity (zeros)")
    left = axes.barh(names, [1 - s for s in sparsity], left=sparsity, color=LIGHT, label="density (left, in percent)")
    axes.bar_label(left, [f"{100 * (1 - s):.3g}%" for s in sparsity], padding=3, fontsize=8)
    axes.set(xlabel="fraction of the layer's weights", xlim=(0, 1), ylim=(len(names) - 0.4, -0.6))
    legend_below(figure, axes.get_legend_handles_labels()[0])
    figure.suptitle(title)
    save_figure(figure, path)


def plot_energy(
    networks: Mapping[str, Mapping[str, Mapping]],
    path: str | Path,
    *,
    pool: str,
    energies: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Draw how many directions of every layer hold how much of the eigenvalue energy (Figure 1c).

    A layer has as many directions, the eigenvectors of the covariance, as channels. One network: a table of layers and
    levels, dark where many directions are needed. Several: a panel a layer, with the cumulative energy of each.

    Args:
        networks: network to layer to `channels` and `components`, as in the JSON of compute_energy.py.
        path: PNG to write.
        pool: how maps were pooled, for the label.
        energies: network to layer to eigenvalues, descending, of sum 1; without them the points at the levels of
            `components` are joined by straight lines.
    """
    alone = len(networks) == 1
    figure = _energy_table(next(iter(networks.values()))) if alone else _energy_panels(networks, energies)
    means = {
        label: np.mean([layer["components"]["95%"] / layer["channels"] for layer in layers.values()])
        for label, layers in networks.items()
    }
    said = {label: f"{100 * mean:.0f}% ({label})" for label, mean in means.items()}
    parts = ", ".join(said.values())
    if len(said) > MOST_IN_TITLE:
        parts = f"{said[min(means, key=means.get)]} to {said[max(means, key=means.get)]}"
    head = f"directions for 95% of the energy of the covariance, {pool} pooling,"
    figure.suptitle(f"{head}\nmean over layers: {parts}")
    save_figure(figure, path)


def _energy_table(layers: Mapping[str, Mapping]) -> Figure:
    """Return a figure of one network: a row a layer, a column a level, in each cell the share of directions needed."""
    levels = list(next(iter(layers.values()))["components"])
    needed = np.array(
        [[layer["components"][level] / layer["channels"] for level in levels] for layer in layers.values()]
    )
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(layers)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(needed, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(levels)), levels)
    names = [tick_label(f"{name} ({layer['channels']})") for name, layer in layers.items()]
    axes.set_yticks(range(len(layers)), names, fontsize=9)
    axes.set(xlabel="of the energy, held by this share of the layer's directions (their number in brackets)")
    for row, layer in enumerate(layers.values()):
        for column, level in enumerate(levels):
            share, colour = needed[row, column], "white" if needed[row, column] > 0.5 else "black"
            percent = "<1%" if 0 < share < 0.01 else f"{100 * share:.0f}%"
            text = f"{percent}  ({layer['components'][level]})"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    return figure


def _energy_panels(
    networks: Mapping[str, Mapping[str, Mapping]], energies: Mapping[str, Mapping[str, Tensor]] | None
) -> Figure:
    """Return a figure of several networks: a panel a layer, the cumulative energy of each network."""
    layers, look = list(next(iter(networks.values()))), looks(networks)
    columns = 2 if len(layers) in (2, 4) else min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(4.2 * columns, 1.2 + 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in axes[len(layers) :]:
        panel.set_axis_off()
    for panel, name in zip(axes, layers, strict=False):
        for label, network in networks.items():
            x, y = _reached(network[name])
            style = look[label]
            panel.plot(x, y, style["marker"], **{key: style[key] for key in ("color", "markerfacecolor", "markersize")})
            if energies is not None:
                y = np.concatenate([[0], energies[label][name].cumsum(0)])
                x = np.arange(len(y)) / (len(y) - 1)
            else:
                x, y = [0, *x, 1], [0, *y, 1]
            panel.plot(x, y, color=style["color"], linestyle=style["linestyle"])
            panel.plot([], [], label=legend_label(label), **style)
        panel.set(ylim=(0, 1.03), xlim=(0, 1.01))
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
    for panel in axes[::columns]:
        panel.set(ylabel="cumulative energy")
    for panel in axes[max(0, len(layers) - columns) : len(layers)]:
        panel.set(xlabel="fraction of the directions, largest first")
    label = "marks: 50, 90, 95, 99%" + (", joined by straight lines" if energies is None else "")
    marks = Line2D([], [], color="none", label=label)
    legend_below(figure, [*axes[0].get_legend_handles_labels()[0], marks])
    return figure


def _reached(layer: Mapping) -> tuple[list[float], list[float]]:
    """Return the share of directions at which each level of energy is reached, and the levels, of a layer not dead."""
    pairs = [(count / layer["channels"], float(level[:-1]) / 100) for level, count in layer["components"].items()]
    return [share for share, _ in pairs if share], [level for share, level in pairs if share]
