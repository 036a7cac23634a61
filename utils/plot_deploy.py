"""The figure of the deploying stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from utils.plot_style import DARK, LIGHT, MIDDLE, save_figure

FORMS = {  # label, colour, marker, line
    "dense": ("dense, eager", MIDDLE, "o", "-"),
    "compiled": ("dense, torch.compile", "#7a7a7a", "s", "--"),
    "shrunk": ("shrunk, eager", LIGHT, "^", "-."),
    "sparse": ("sparse", DARK, "v", "-"),
}


def plot_deploy(report: Mapping, path: str | Path) -> None:
    """Draw milliseconds an image by form and batch, and how many channels of every layer are kept.

    Args:
        report: the content of OUT.json.
        path: PNG to write.
    """
    layers, times = report["layers"], report["milliseconds"]
    figure = Figure(figsize=(8, 5 + 0.22 * len(layers)), layout="constrained")
    speed, widths = figure.subplots(2, 1, height_ratios=[3.4, 0.4 + 0.22 * len(layers)])
    for form, (label, colour, marker, line) in FORMS.items():
        points = [(int(batch), row[form]["ms"] / int(batch)) for batch, row in times.items() if form in row]
        if points:
            speed.plot(*zip(*points, strict=True), line, marker=marker, color=colour, label=label)
    batches = [int(batch) for batch in times]
    speed.set(xscale="log", yscale="log", xlabel="images a batch", ylabel="milliseconds an image")
    speed.set_xticks(batches, [str(batch) for batch in batches])
    speed.xaxis.set_minor_locator(NullLocator())
    speed.grid(alpha=0.3, which="both")
    speed.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    names = [layer["name"] for layer in layers]
    widths.barh(names, [layer["channels"] for layer in layers], color="#d9d9d9", label="before")
    widths.barh(names, [layer["kept"] for layer in layers], color=LIGHT, label="shrunk")
    widths.invert_yaxis()
    widths.margins(y=0.01)
    widths.set(xlabel="channels or units of the layer")
    widths.tick_params(axis="y", labelsize=8)
    widths.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    network = report["arch"] + (f" {report['depth']}" if report["depth"] else "")
    what = f"{report['dataset']}, {network}, {100 * report['sparsity']:.2f}% zeros, {report['hardware']}"
    figure.suptitle(f"{report['sentence']}\n{what}", fontsize=11)
    save_figure(figure, path)
