"""Put the results of several pruning runs side by side: a table, and accuracy against sparsity in one figure.

    python compare_pruning.py none/pruned/prune.json halo/pruned/prune.json --labels none HALO --save compare.png

Prints a table in Markdown: top-1 before pruning and at every ratio that a run has; a cell is empty where a run was not
pruned at that ratio. A network that had zeros before its cut goes by its true sparsity, before and after it. All runs
must be of one network on the same images, unless --mixed says otherwise.
"""

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

import argparse
from collections.abc import Mapping
from pathlib import Path

from models import with_depth
from utils import options
from utils.logger import say
from utils.paths import labels_of
from utils.plot_methods import plot_comparison
from utils.run import refuse_existing, run_script
from utils.studies.measurements import accuracies_of, in_columns, is_number, read_measurement

COMPARED = ("dataset", "images", "arch", "depth")  # in which runs must agree


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    parser.add_argument("reports", metavar="PRUNE_JSON", nargs="+", help="prune.json files")
    parser.add_argument("--labels", metavar="TEXT", nargs="+", help="names of the runs (default: their paths)")
    parser.add_argument("--sentence", action="store_true", help="end with one sentence on what was kept")
    parser.add_argument("--mixed", action="store_true", help="allow different data sets and networks")
    parser.add_argument("--save", metavar="FILE", help="draw the figure, as PNG")
    parser.add_argument("--overwrite", action="store_true", help="replace a figure that exists")
    return parser


def read_report(path: str) -> tuple[dict, dict[float, float]]:
    """Return what a run is of, and its top-1 in percent by true sparsity, or as asked of a network dense before.

    Raises:
        ValueError: the file is missing or not written by the pruning stage.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give a prune.json, such as {Path(path) / 'prune.json'}")
    try:
        report = read_measurement(path)
    except ValueError as error:  # whose remedy is for a file of ours, which this need not be
        what = str(error).rpartition(": ")[0]
        raise ValueError(f"{what}; it is no prune.json of cifar_prune_iterative.py: use another file") from error
    if report is None:
        raise ValueError(f"{path} does not exist: give a prune.json of cifar_prune_iterative.py")
    kinds = {key: (int, type(None)) if key == "depth" else str for key in COMPARED}
    if not all(key in report and isinstance(report[key], kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} does not say what it is of ({', '.join(COMPARED)}): use another copy")
    setting = {key: report[key] for key in COMPARED}
    if not report["before"].get("sparsity"):
        return setting, accuracies_of(report)
    measured = [(report["before"], report["before"]), *((result, result["after"]) for result in report["results"])]
    if not all(is_number(cut.get("sparsity"), high=1) for cut, _ in measured):
        raise ValueError(f"{path} does not say its sparsity in numbers from 0 to 1: use another copy")
    return setting, {cut["sparsity"]: accuracy["top1"] for cut, accuracy in measured}


def require_alike(runs: Mapping[str, Mapping]) -> None:
    """Refuse to compare runs of different data sets or networks.

    Raises:
        OptionError: two differ, with in what.
    """
    (first, setting), *others = runs.items()
    for label, other in others:
        for key in COMPARED:
            if other[key] != setting[key]:
                text = f"{first} has {key} {setting[key]}, {label} has {other[key]}"
                raise options.OptionError(f"{text}: compare runs that agree, or give --mixed")


def print_table(runs: Mapping[str, Mapping[float, float]]) -> None:
    """Print a line a run and a column a ratio."""
    ratios = sorted({ratio for run in runs.values() for ratio in run})
    say("| | " + " | ".join("dense" if ratio == 0 else f"{ratio:g}" for ratio in ratios) + " |")
    say("|---" * (len(ratios) + 1) + "|")
    for label, run in runs.items():
        say(f"| {label} | " + " | ".join(f"{run[ratio]:.2f}" if ratio in run else "" for ratio in ratios) + " |")


def describe(settings: Mapping[str, Mapping]) -> str:
    """Return a title: what the runs are of, and that single runs name no winner."""
    names = {f"{s['dataset']}, {with_depth(s['arch'], s['depth'])}" for s in settings.values()}
    what = names.pop() if len(names) == 1 else f"{len(names)} different data sets or networks"
    return f"{what}: top-1 after pruning\none run each (n = 1): one shows no spread, so no winner is named"


def finding(runs: dict[str, dict[float, float]]) -> str:
    """Say in one sentence what each run keeps at the highest common ratio that costs the last one at most a point.

    Where every ratio costs it more than that, the lowest.

    Raises:
        OptionError: they have no ratio in common, or one was not dense before.
    """
    for label, run in runs.items():
        if 0.0 not in run:
            raise options.OptionError(f"--sentence is of dense networks and their cut, {label} had zeros: leave it out")
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
    labels = args.labels or labels_of(args.reports)
    if not len(set(labels)) == len(labels) == len(args.reports):
        raise options.OptionError("give as many different --labels as there are reports")
    if args.save:
        refuse_existing([Path(args.save)], overwrite=args.overwrite, inputs=args.reports)
    settings, runs = {}, {}
    for label, path in zip(labels, args.reports, strict=True):
        settings[label], runs[label] = read_report(path)
    runs = in_columns(runs, args.reports)
    if not args.mixed:
        require_alike(settings)
    sentence = finding(runs) if args.sentence else ""
    print_table(runs)
    if args.save:
        images = " and ".join(sorted({setting["images"] for setting in settings.values()}))
        plot_comparison(runs, args.save, title=describe(settings), images=images)
        say(f"\nwrote {args.save}")
    if args.sentence:
        say(f"\n{sentence}")
    return runs


if __name__ == "__main__":
    run_script(main, get_parser())
