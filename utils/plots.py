"""The figures of a run. Drawn without pyplot, so no display and no global state is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from utils.files.atomic import atomic_write

DARK, LIGHT, MIDDLE = "#1f3b73", "#e08a1e", "#5c9ead"  # dark, light and between, in greyscale too
SMALLEST = 1e-9  # what is smaller, zeros too, is drawn here
POINTS = 200_000  # points of a scatter plot; more only makes the file slow to draw


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        OSError: the file cannot be written; what it held before is untouched.
    """
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def plot_curves(history: Sequence[dict], path: str | Path, *, title: str) -> None:
    """Draw loss, accuracy and learning rate against the epoch.

    Args:
        history: the rows of log.csv, at least one.
        path: PNG to write.
        title: what the figure shows.
    """
    held_out = "val" if "val_top1" in history[0] else "test"
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(7, 8), layout="constrained")
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True)

    def line(axes, key: str, label: str, style: str, colour: str) -> None:
        axes.plot(epochs, [row[key] for row in history], style, color=colour, label=label, markersize=3)

    line(loss, "train_loss", "train, cross-entropy", "o-", DARK)
    line(loss, "train_loss_penalized", "train, with penalty", "^:", MIDDLE)
    line(loss, f"{held_out}_loss", f"{held_out}, cross-entropy", "s--", LIGHT)
    loss.set(ylabel="loss (nats)", yscale="log")
    line(accuracy, "train_top1", "train top-1", "o-", DARK)
    line(accuracy, f"{held_out}_top1", f"{held_out} top-1", "s--", LIGHT)
    accuracy.set(ylabel="accuracy (%)")
    line(rate, "lr", "weights", "o-", DARK)
    if history[0]["reg_lr"] != "":
        line(rate, "reg_lr", "lam", "s--", LIGHT)
    rate.set(ylabel="learning rate", xlabel="epoch")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    if all(row["lr"] > 0 for row in history):
        rate.set(yscale="log")
    for axes in (loss, accuracy, rate):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_accuracy_vs_sparsity(rows: Sequence[dict], path: str | Path, *, title: str) -> None:
    """Draw top-1 against sparsity.

    Args:
        rows: of accuracy_vs_sparsity.csv, the unpruned network first.
        path: PNG to write.
        title: what the figure shows.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(rows[1:], key=lambda row: row["sparsity"])
    axes.axhline(rows[0]["top1"], color=MIDDLE, linestyle=":", label="before pruning")
    x = [row["sparsity"] for row in ordered]
    axes.plot(x, [row["top1"] for row in ordered], "o-", color=DARK, label="pruned")
    if "top1_recalibrated" in ordered[0]:
        y = [row["top1_recalibrated"] for row in ordered]
        axes.plot(x, y, "s--", color=LIGHT, label="pruned, BatchNorm recalibrated")
    axes.set(xlabel="sparsity (fraction of prunable weights that are zero)", ylabel="test top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(title)
    save_figure(figure, path)


def plot_comparison(runs: Mapping[str, Mapping[float, float]], path: str | Path, *, title: str) -> None:
    """Draw top-1 against the fraction of weights removed, one line a run.

    Args:
        runs: label to ratio to top-1 in percent.
        path: PNG to write.
        title: what the figure shows.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (label, run) in enumerate(runs.items()):
        ratios = sorted(run)
        look, colour = ("o-", "s--", "^:", "D-.")[number % 4], (DARK, LIGHT, MIDDLE, "black", "#999999")[number % 5]
        axes.plot(range(len(ratios)), [run[r] for r in ratios], look, color=colour, label=label)
        axes.set_xticks(range(len(ratios)), ["dense" if r == 0 else f"{r:g}" for r in ratios])
    axes.set(xlabel="fraction of the prunable weights removed (not to scale)", ylabel="test top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(title)
    save_figure(figure, path)


def _look(number: int) -> dict:
    style = ("o-", "s--", "^:", "D-.", "v-", "x--", "P:")[number % 7]
    colour = ("#999999", LIGHT, MIDDLE, "black", DARK, "#b5485d", "#c9b458")[number % 7]
    return {"fmt": style, "color": colour, "markersize": 4}


def _whole_and_close_up(ratios: Sequence[float], top: float, ylabel: str) -> tuple[Figure, tuple[Axes, Axes]]:
    """Return a figure of two panels over the same ratios; the right one shows the best few percent only."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = tuple(figure.subplots(1, 2))
    for axes in panels:
        axes.set_xticks(range(len(ratios)), ["dense" if r == 0 else f"{r:g}" for r in ratios], rotation=30)
        axes.set(xlabel="fraction of the prunable weights removed (not to scale)")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=ylabel)
    panels[1].set(ylabel=f"{ylabel}, close-up", ylim=(top - 5, top + 0.5))
    return figure, panels


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) if len(labels) < 6 else 3)


def plot_study(
    rows: Sequence[dict], path: str | Path, *, title: str, finding: str | None = None, images: str = "test"
) -> None:
    """Draw the accuracy of every method against the fraction removed, with standard deviations over seeds.

    Args:
        rows: `method`, `ratio`, `n`, `top1_mean` and `top1_std`, as from `utils.studies.report.final_rows`.
        path: PNG to write.
        title: what the study asks.
        finding: what it shows; by default which method keeps most at the highest ratio.
        images: which images the accuracy was measured on, for the label.
    """
    ratios, methods = sorted({r["ratio"] for r in rows}), list(dict.fromkeys(r["method"] for r in rows))
    figure, panels = _whole_and_close_up(ratios, max(r["top1_mean"] for r in rows), f"{images} top-1 (%)")
    for number, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        x = [ratios.index(row["ratio"]) + 0.08 * (number - len(methods) / 2) for row in mine]  # side by side
        y, spread = [row["top1_mean"] for row in mine], [row["top1_std"] or 0 for row in mine]
        for axes in panels:
            axes.errorbar(x, y, yerr=spread, label=method, capsize=3, **_look(number))
    _legend_below(figure, panels[0])
    best = max((row for row in rows if row["ratio"] == ratios[-1]), key=lambda row: row["top1_mean"])
    counts = {row["n"] for row in rows}
    seeds = f"n = {min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "")
    finding = finding or f"at {ratios[-1]:g} removed, {best['method']} keeps most: {best['top1_mean']:.2f}%"
    figure.suptitle(f"{title}\n{finding}\n(mean, standard deviation over seeds, {seeds})")
    save_figure(figure, path)


def plot_pareto(tuned: Mapping[str, Mapping[str, Mapping[float, float]]], path: str | Path, *, title: str) -> None:
    """Draw every tuned run on the held-out images, and for each method the best at each ratio.

    Args:
        tuned: method to name of the configuration to ratio to top-1 in percent (0: dense).
        path: PNG to write.
        title: what the study asks.
    """
    ratios = sorted({ratio for configs in tuned.values() for run in configs.values() for ratio in run})
    highest = max(value for configs in tuned.values() for run in configs.values() for value in run.values())
    figure, panels = _whole_and_close_up(ratios, highest, "top-1 on the held-out images (%)")
    for number, (method, configs) in enumerate(tuned.items()):
        runs, look = [run for run in configs.values() if run], _look(number)
        if not runs:
            continue
        best = [max(run[ratio] for run in runs) for ratio in ratios]
        for axes in panels:
            for run in runs:
                values = [run[ratio] for ratio in ratios]
                axes.plot(range(len(ratios)), values, "-", color=look["color"], alpha=0.3, linewidth=0.8)
            axes.errorbar(range(len(ratios)), best, label=f"{method}, best of {len(runs)}", **look)
    _legend_below(figure, panels[0])
    figure.suptitle(f"{title}\nall tuned runs (thin) and the best of each method at each ratio")
    save_figure(figure, path)


def plot_layers(layers: Sequence[dict], path: str | Path, *, title: str) -> None:
    """Draw sparsity and density of every layer as stacked bars (Figure 1a).

    Args:
        layers: `name` and `sparsity` of each.
        path: PNG to write.
        title: what the figure shows.
    """
    figure = Figure(figsize=(8, 1.5 + 0.25 * len(layers)), layout="constrained")
    axes = figure.subplots()
    names = [layer["name"].removesuffix(".weight") for layer in layers]
    sparsity = [layer["sparsity"] for layer in layers]
    axes.barh(names, sparsity, color=DARK, label="sparsity (zeros)")
    axes.barh(names, [1 - s for s in sparsity], left=sparsity, color=LIGHT, label="density (left)")
    axes.invert_yaxis()
    axes.set(xlabel="fraction of the layer's weights", xlim=(0, 1))
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_energy(energies: Mapping[str, Mapping[str, Tensor]], path: str | Path, *, pool: str) -> None:
    """Draw the cumulative eigenvalue energy of every layer (Figure 1c).

    One network: its layers in one plot, from dark (first) to light (last). Several: one plot a layer, with a legend.

    Args:
        energies: network to layer to eigenvalues, descending, of sum 1.
        path: PNG to write.
        pool: how maps were pooled, for the label.
    """
    layers = list(next(iter(energies.values())))
    alone = len(energies) == 1
    columns = 1 if alone else min(3, len(layers))
    rows = 1 if alone else -(-len(layers) // columns)
    figure = Figure(figsize=(9, 6) if alone else (4.5 * columns, 0.6 + 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in axes[1 if alone else len(layers) :]:
        panel.set_axis_off()
    for number, (label, layer_energies) in enumerate(energies.items()):
        for index, (name, energy) in enumerate(layer_energies.items()):
            panel = axes[0 if alone else index]
            shade = str(0.75 * index / max(len(layers) - 1, 1)) if alone else (DARK, LIGHT, MIDDLE)[number % 3]
            style = ("-", "--", ":", "-.")[(index if alone else number) % 4]
            cumulative = np.concatenate([[0], energy.cumsum(0)])
            fraction = np.arange(len(cumulative)) / len(energy)
            panel.plot(fraction, cumulative, style, color=shade, label=name if alone else label)
            panel.set(ylim=(0, 1.02), xlim=(0, 1))
            panel.grid(alpha=0.3)
            if not alone:
                panel.set_title(name, fontsize=9)
    axes[0].legend(fontsize=7, ncols=2 if alone and len(layers) > 12 else 1)
    figure.supxlabel("fraction of the channels (largest eigenvalues first)")
    figure.supylabel(f"cumulative energy of the\ncovariance, {pool} pooling")
    figure.suptitle(_energy_title(energies))
    save_figure(figure, path)


def _energy_title(energies: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Say how much of the channels the networks need for 95% of the energy, on average over layers."""

    def need(layers: Mapping[str, Tensor]) -> float:
        return float(np.mean([int((e.cumsum(0) < 0.95).sum() + 1) / len(e) for e in layers.values()]))

    parts = [f"{100 * need(layers):.0f}% ({label})" for label, layers in energies.items()]
    return "channels for 95% of the energy, mean over layers:\n" + ", ".join(parts)


def equilibrium(lam: np.ndarray, *, xi: float, psi: float, decay: float) -> np.ndarray:
    """Return the |w| at which a HALO coefficient lam stands still: lam^3 * (psi + decay * lam) / (2 * xi).

    Args:
        lam: positive values.
        xi, psi: coefficients of HALO, xi > 0.
        decay: weight decay of lam.
    """
    return lam**3 * (psi + decay * lam) / (2 * xi)


def _histogram(axes, values: np.ndarray, colour: str, label: str) -> None:
    values = np.log10(np.maximum(values, SMALLEST))
    axes.hist(values, bins=80, color=colour)
    axes.set(xlabel=label, ylabel="count")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", labelrotation=20)
    axes.grid(alpha=0.3)


def plot_regularization(
    weights: np.ndarray, lambdas: np.ndarray, path: str | Path, *, title: str, still: tuple[float, float, float] | None
) -> None:
    """Draw the histograms of log10 |w| and log10 |lam|, and |lam| against |w|.

    Args:
        weights: the penalised weights, (n,).
        lambdas: their lam, (n,) for HALO, (1,) for SWS, (0,) where nothing is learned: then |w| alone is drawn.
        path: PNG to write.
        title: what the figure shows.
        still: xi, psi and the weight decay of lam, for the line on which lam is at rest; None draws no line.
    """
    weights, lambdas = np.abs(weights), np.abs(lambdas)
    panels = 1 if len(lambdas) == 0 else 2 if len(lambdas) != len(weights) else 3
    figure = Figure(figsize=(5 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _histogram(axes[0], weights, DARK, f"log10 |w|   (from {SMALLEST:g} on)")
    if panels > 1:
        _histogram(axes[1], lambdas, LIGHT, "log10 |lam|")
    if panels == 3:
        step = -(-len(weights) // POINTS)
        w, lam = np.maximum(weights[::step], SMALLEST), np.maximum(lambdas[::step], SMALLEST)
        mesh = axes[2].hexbin(w, lam, xscale="log", yscale="log", bins="log", gridsize=70, cmap="Greys", mincnt=1)
        figure.colorbar(mesh, ax=axes[2], label="weights per cell")
        if still is not None and still[0] > 0 and (still[1] > 0 or still[2] > 0):
            line = np.geomspace(max(lam.min(), 1e-6), lam.max(), 200)
            at = equilibrium(line, xi=still[0], psi=still[1], decay=still[2])
            inside = (at > w.min()) & (at < w.max())
            if inside.any():
                axes[2].plot(at[inside], line[inside], "--", color=LIGHT, linewidth=2, label="lam at rest")
                axes[2].legend()
        axes[2].set(xlabel="|w|", ylabel="|lam|")
    figure.suptitle(title)
    save_figure(figure, path)
