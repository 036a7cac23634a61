"""Draw every figure under results/ and benchmarks/ again, each from the numbers that are committed with it.

    python results/redraw.py                           # all of them
    python results/redraw.py results/mnist_lenet300    # only those in these folders

Needs no images and no networks but those in pretrained_models/. Writes the tables of the studies too, from the same
numbers. Ends at a figure that it cannot draw, with its name and exit status 1, as at a folder that has none.
"""

import argparse
import csv
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's folder, wherever this is called from

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

from benchmarks.report import plot_scaling, plot_sparsity
from utils import options, plots
from utils.files.checkpoint import load_checkpoint
from utils.logger import say
from utils.paths import REPOSITORY
from utils.run import read_json, run_script
from utils.studies.adaptivity import draw
from utils.studies.report import write_report
from utils.studies.study import load_study
from utils.training.outputs import draw_curves, draw_regularization

# Comparisons: the runs below the folder and their labels.
COMPARED = {
    "results/cifar10_resnet20": {
        "none/pruned": "no penalty",
        "l1/pruned": "L1, xi 1e-4",
        "halo/pruned": "HALO, xi 1e-4, psi 1e-4",
    },
    "results/mnist_lenet300": {
        "none": "no penalty",
        "l1_3e-5": "L1, xi 3e-5",
        "l1_1e-4": "L1, xi 1e-4",
        "l1_2e-4": "L1, xi 2e-4",
        "ws_1e-4_1e-4": "SWS, xi 1e-4, psi 1e-4",
        "halo_3e-5_1e-5": "HALO, xi 3e-5, psi 1e-5",
        "halo_1e-4_1e-4": "HALO, xi 1e-4, psi 1e-4",
    },
}
# Single networks of a study: the run that each is, and its file in pretrained_models/, None where it is not kept.
SINGLE = {
    "results/replication/mnist_lenet300/chosen_0.95": ("HALO/xi3e-05_psi3e-05/seed1", "mnist_lenet300_halo_0.95"),
    "results/replication/mnist_lenet300/chosen_0.99": ("HALO/xi3e-06_psi0.0003/seed1", "mnist_lenet300_halo_0.99"),
    "results/replication/mnist_lenet5/chosen_0.99": ("HALO/xi1e-05_psi0.001/seed1", "mnist_lenet5_halo_0.99"),
    "results/replication/cifar10_resnet20/chosen_0.98": ("HALO/xi0.0001_psi0.0001/seed1", "cifar10_resnet20_halo_0.98"),
    "results/replication/cifar10_vgg16/chosen_0.95": ("HALO/xi1e-08_psi1e-08/seed1", "cifar10_vgg16_halo_0.95"),
    "results/replication/cifar100_resnet50/halo_1e-8": ("HALO/xi1e-08_psi1e-08/seed1", None),
    "results/replication/cifar100_resnet50/halo_2e-6": (
        "HALO stronger/xi2e-06_psi1e-08/seed1",
        "cifar100_resnet50_halo_0.9",
    ),
}
# Energies that were measured alone: the file in which the same layers stand without a penalty, as "none".
BASELINES = {"results/replication/cifar100_resnet50/halo_2e-6": "../halo_1e-8/energy.json"}


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    folders = [REPOSITORY / "results", REPOSITORY / "benchmarks"]
    text = "only the figures in these (default: results benchmarks)"
    parser.add_argument("folders", metavar="FOLDER", nargs="*", default=folders, help=text)
    return parser


def call(*command: str | Path) -> None:
    """Run a script of the project.

    Raises:
        ValueError: it failed, with what it said.
    """
    done = subprocess.run([sys.executable, *map(str, command)], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{command[0]} failed: {done.stderr.strip()}")


def curves(folder: Path, name: str) -> None:
    """Draw curves.png of a run, or of one network of a study."""
    run = folder.parent / SINGLE[name][0] / "run" if name in SINGLE else folder
    with open(run / "log.csv", newline="") as file:
        rows = [{key: float(v) if v else v for key, v in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise ValueError(f"{run / 'log.csv'} has no epoch")
    draw_curves(folder, rows, read_json(run / ("summary.json" if name in SINGLE else "config.json"))["arguments"])


def regularization(folder: Path, name: str) -> None:
    """Draw regularization.png of a run, or of one network of a study."""
    if name in SINGLE:
        summary = read_json(folder.parent / SINGLE[name][0] / "run" / "summary.json")
        draw_regularization(folder, summary["final"], summary["arguments"])
        return
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{folder / 'log.csv'} has no epoch")
    draw_regularization(folder, rows[-1], read_json(folder / "config.json")["arguments"])


def layers(folder: Path, name: str) -> None:
    """Draw layers.png from the report of check_params.py, or from the network itself where it is kept."""
    report = read_json(folder / "check.json")
    if report is not None:
        plots.plot_layers(report["layers"], folder / "layers.png", title=plots.layers_title(report))
        return
    if SINGLE[name][1] is None:
        raise ValueError(f"{name}/layers.png cannot be drawn: its network is not kept in pretrained_models")
    file = f"pretrained_models/{SINGLE[name][1]}.halo"
    config = load_checkpoint(REPOSITORY / file)["config"]
    model = ["-d", config["dataset"], "-a", config["arch"], *(["--depth", config["depth"]] if config["depth"] else [])]
    plot = ["--plot", folder / "layers.png", "--overwrite"]
    call("check_params.py", *model, "--no_data", "--checkpoint", file, *plot)


def energy(folder: Path, name: str) -> None:
    """Draw energy.png, beside no penalty where that was measured for the same layers."""
    report = read_json(folder / "energy.json")
    before = read_json(folder / BASELINES[name])["checkpoints"] if name in BASELINES else {}
    networks = {label: layers for label, layers in before.items() if label == "none"} | report["checkpoints"]
    plots.plot_energy(networks, folder / "energy.png", pool=report["pool"])


def accuracy_vs_sparsity(folder: Path, name: str) -> None:
    """Draw accuracy_vs_sparsity.png of a pruned network, of runs side by side, or of a study."""
    if (folder / "chosen.json").exists():
        study(folder)
    elif name in COMPARED:
        reports = [folder / run / "prune.json" for run in COMPARED[name]]
        save = ["--save", folder / "accuracy_vs_sparsity.png", "--overwrite"]
        call("compare_pruning.py", *reports, "--labels", *COMPARED[name].values(), *save)
    else:
        plots.plot_accuracy_vs_sparsity(read_json(folder / "prune.json"), folder / "accuracy_vs_sparsity.png")


def pareto(folder: Path, name: str) -> None:
    """Draw pareto.png of a study, which comes with its other figure where there is that."""
    if not (folder / "accuracy_vs_sparsity.png").exists():
        study(folder)


def study(folder: Path) -> None:
    """Write the tables and figures of a study; the command in its table stays.

    A figure that was not there says nothing yet, such as the one curve of an unfinished study: none is added.

    Raises:
        ValueError: its table has no command.
    """
    lines = (folder / "table.md").read_text().splitlines()
    command = next((line.strip() for line in lines if line.startswith("    ")), None)
    if command is None:
        raise ValueError(f"{folder}/table.md has no command: use another copy")
    before = {*folder.glob("*.png")}
    write_report(load_study(REPOSITORY / "results" / "studies" / f"{folder.name}.json"), folder, command=command)
    for figure in {*folder.glob("*.png")} - before:
        figure.unlink()


def controls(folder: Path, name: str) -> None:
    """Draw adaptivity.png."""
    report = read_json(folder / "adaptivity.json")
    draw(report["rows"], folder / "adaptivity.png", title=report["title"])


def scaling(folder: Path, name: str) -> None:
    """Draw scaling.png of the benchmarks."""
    tables = read_json(folder / "results.json")["tables"]
    plot_scaling(next(table for table in tables.values() if "compiled ms" in table[0]), folder / "scaling.png")


def sparse(folder: Path, name: str) -> None:
    """Draw sparse.png of the benchmarks."""
    plot_sparsity(read_json(folder / "sparse.json")["sparsity"], folder / "sparse.png")


DAMAGED = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile)  # what reading such data raises
DRAWN_BY: dict[str, Callable[[Path, str], None]] = {
    "accuracy_vs_sparsity.png": accuracy_vs_sparsity,
    "adaptivity.png": controls,
    "curves.png": curves,
    "energy.png": energy,
    "layers.png": layers,
    "pareto.png": pareto,
    "regularization.png": regularization,
    "scaling.png": scaling,
    "sparse.png": sparse,
}


def main(args: argparse.Namespace) -> dict:
    """Draw the figures.

    Returns:
        `drawn`, their number.

    Raises:
        ValueError: a folder has no figure, or a figure's data are missing or damaged.
    """
    found = {folder: [*Path(folder).resolve().rglob("*.png")] for folder in args.folders}
    for folder, paths in found.items():
        if not paths:
            raise ValueError(f"{folder} is no folder with a figure: give one below results or benchmarks")
    figures = sorted({path for paths in found.values() for path in paths})
    for path in figures:
        name = path.parent.relative_to(REPOSITORY).as_posix()
        try:
            DRAWN_BY[path.name](path.parent, name)
        except DAMAGED as error:
            raise ValueError(f"{name}/{path.name} cannot be drawn: {type(error).__name__} {error}") from error
        say(f"{name}/{path.name}")
    return {"drawn": len(figures)}


if __name__ == "__main__":
    run_script(main, get_parser())
