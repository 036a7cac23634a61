"""Put the results of several pruning runs side by side: a table, and accuracy against sparsity in one figure.

    python compare_pruning.py none/pruned/prune.json halo/pruned/prune.json --labels none HALO --save compare.png

Prints a table in Markdown: top-1 on the test images before pruning and at every ratio that all runs have.
"""

import argparse
from pathlib import Path

from utils import options, plots
from utils.logger import say
from utils.run import refuse_existing, run_script
from utils.studies.study import read_accuracies


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    parser.add_argument("reports", metavar="PRUNE_JSON", nargs="+", help="prune.json files of the same data set")
    parser.add_argument("--labels", metavar="TEXT", nargs="+", help="names of the runs (default: their paths)")
    parser.add_argument("--sentence", action="store_true", help="end with one sentence on what was kept")
    parser.add_argument("--save", metavar="FILE", help="draw the figure, as PNG")
    parser.add_argument("--overwrite", action="store_true", help="replace a figure that exists")
    return parser


def read_report(path: str) -> dict[float, float]:
    """Return top-1 in percent by ratio, 0 for the network before pruning.

    Raises:
        ValueError: the file is missing or not written by the pruning stage.
    """
    try:
        accuracies = read_accuracies(Path(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no prune.json of cifar_prune_iterative.py: give that file") from error
    if not accuracies:
        raise ValueError(f"{path} does not exist: give a prune.json of cifar_prune_iterative.py")
    return accuracies


def finding(runs: dict[str, dict[float, float]]) -> str:
    """Say in one sentence what each run keeps at the highest common ratio that costs the last one at most a point.

    Where every ratio costs it more than that, the lowest.

    Raises:
        OptionError: they have no ratio in common.
    """
    *_, last = runs.values()
    ratios = sorted(set.intersection(*(set(run) for run in runs.values())) - {0.0})
    if not ratios:
        raise options.OptionError("--sentence needs a ratio at which all runs were pruned: leave it out")
    ratio = max((r for r in ratios if last[r] >= last[0.0] - 1), default=ratios[0])
    kept = ", ".join(f"{label} has {run[ratio]:.2f}% of {run[0.0]:.2f}% top-1 left" for label, run in runs.items())
    return f"With {100 * ratio:g}% of the weights removed at once and no training after it, {kept}."


def main(args: argparse.Namespace) -> dict:
    """Print the table and draw the figure.

    Returns:
        Label to ratio to top-1 in percent.
    """
    labels = args.labels or args.reports
    if len(set(labels)) != len(args.reports):
        raise options.OptionError("give as many different --labels as there are reports")
    if args.save:
        refuse_existing([Path(args.save)], overwrite=args.overwrite)
    runs = {label: read_report(path) for label, path in zip(labels, args.reports, strict=True)}
    ratios = sorted(set.intersection(*(set(run) for run in runs.values())))
    say("| | " + " | ".join("dense" if ratio == 0 else f"{ratio:g}" for ratio in ratios) + " |")
    say("|---" * (len(ratios) + 1) + "|")
    for label, run in runs.items():
        say(f"| {label} | " + " | ".join(f"{run[ratio]:.2f}" for ratio in ratios) + " |")
    if args.save:
        best = max(runs, key=lambda label: runs[label][ratios[-1]])
        title = f"at {ratios[-1]:g} pruned, {best} keeps most: {runs[best][ratios[-1]]:.2f}% top-1"
        plots.plot_comparison(runs, args.save, title=title)
    if args.sentence:
        say(f"\n{finding(runs)}")
    return runs


if __name__ == "__main__":
    run_script(main, get_parser())
