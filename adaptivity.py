"""Is HALO adaptive, or only an L1 that grows? Compare finished HALO runs with runs that differ in lam alone.

    python adaptivity.py RUN [RUN ...] --percent 0.95 0.98 0.99 --save_dir runs/adaptivity

Each RUN is the folder of a training run with --halo and --val_split; the runs differ in their seed only. Every control
is trained as the run was, and measured on its held-out images. Leaves adaptivity.md, adaptivity.json, adaptivity.png
and a folder for each control. Stopped, the same command goes on where it was.
"""

if __name__ == "__main__":  # Ctrl-C ends in one line from here on, while torch is loaded too
    from utils.interrupts import leave_when_interrupted

    leave_when_interrupted()

import argparse
import shlex
import sys
from pathlib import Path
from statistics import mean, stdev

from utils import options
from utils.files.atomic import write_text
from utils.files.lock import folder_lock
from utils.logger import say
from utils.paths import portable_arguments
from utils.run import require_writable, run_script, write_json
from utils.studies.adaptivity import LABELS, HaloRun, describe_lambdas, draw, load_run, measure_control, prepare
from utils.studies.measurements import read_accuracies
from utils.studies.report import top1_table
from utils.verdict import failed_to_learn

CONTROLS = [name for name in LABELS if name != "halo"]


def get_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = options.Parser(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of finished HALO runs, one a seed")
    text = "fractions of the weights to remove"
    parser.add_argument(
        "--percent", type=options.real(0, high=1, nonzero=True), nargs="+", required=True, metavar="P", help=text
    )
    text = "epochs of the controls that go on from the end of a run"
    parser.add_argument("--epochs", type=options.whole(1), default=5, metavar="N", help=text)
    text = "controls to train beside the runs"
    parser.add_argument("--only", choices=CONTROLS, nargs="+", default=CONTROLS, metavar="CONTROL", help=text)
    parser.add_argument("--data", default="data", metavar="DIR", help="folder that holds the images")
    parser.add_argument("--save_dir", default="runs/adaptivity", metavar="DIR", help="the outputs")
    return parser


def load_runs(folders: list[str]) -> list[HaloRun]:
    """Read the runs.

    Raises:
        ValueError: one is unusable, or they differ in more than their seed.
    """
    runs = [load_run(folder) for folder in folders]
    for run in runs[1:]:
        first = runs[0]
        other = [key for key in run.setting | first.setting if run.setting.get(key) != first.setting.get(key)]
        if other:
            raise ValueError(f"{run.folder} differs from the first run in {other[0]}: give runs that differ in seed")
    if len({run.seed for run in runs}) < len(runs):
        raise ValueError("two runs have the same seed: give each once")
    return runs


def rows_of(found: dict[str, list[dict[float, float]]], percent: tuple[float, ...]) -> list[dict]:
    """Return mean and standard deviation over the runs, for each control and ratio (0: before pruning).

    Args:
        found: for each control the top-1 by ratio, of every run.
        percent: the ratios.
    """
    best = max(run[0.0] for runs in found.values() for run in runs)
    rows = []
    for name, runs in found.items():
        failed = [failed_to_learn(run[0.0], best) for run in runs]
        for ratio in (0.0, *percent):
            values = [run[ratio] for run in runs]
            spread = stdev(values) if len(values) > 1 else ""
            row = {"method": LABELS[name], "ratio": ratio, "n": len(values)}
            rows.append(row | {"top1_mean": mean(values), "top1_std": spread, "top1_seeds": values, "failed": failed})
    return rows


def write_report(out: Path, rows: list[dict], lambdas: list[dict], title: str) -> None:
    """Write adaptivity.md, adaptivity.json and adaptivity.png."""
    command = shlex.join(["python", "adaptivity.py", *portable_arguments(sys.argv[1:])])
    text = [f"# {title}", "", f"    {command}", ""]
    text += top1_table(rows, f"Top-1 (%) on the held-out images, mean ± standard deviation, n = {rows[0]['n']}")
    text += ["## lam at the end of each run", "", f"| {' | '.join(lambdas[0])} |", "|---" * len(lambdas[0]) + "|"]
    text += [f"| {row['seed']} | {' | '.join(f'{row[key]:.4g}' for key in row if key != 'seed')} |" for row in lambdas]
    write_text(out / "adaptivity.md", "\n".join([*text, ""]))
    write_json(out / "adaptivity.json", {"title": title, "command": command, "rows": rows, "lambdas": lambdas})
    draw(rows, out / "adaptivity.png", title=title)


def main(args: argparse.Namespace) -> dict:
    """Train and measure the controls of every run.

    Returns:
        `rows` of the table, and `lambdas`, what lam looks like at the end of each run.
    """
    runs, out, percent = load_runs(args.runs), Path(args.save_dir), tuple(sorted(set(args.percent)))
    require_writable(out, make=True)
    with folder_lock(out, remedy="choose another --save_dir"):
        prepare(out, runs[0].setting | {"epochs after the end": args.epochs}, runs)
        return compare(runs, out, percent, args)


def compare(runs: list[HaloRun], out: Path, percent: tuple[float, ...], args: argparse.Namespace) -> dict:
    """Train and measure the controls in a folder that is ours, and report."""
    found: dict[str, list[dict[float, float]]] = {name: [] for name in ("halo", *args.only)}
    for run in runs:
        for name in found:
            folder = out / name / f"seed{run.seed}"
            path = measure_control(run, name, folder, data=args.data, epochs=args.epochs, percent=percent)
            found[name].append(read_accuracies(path))
            accuracies = ", ".join(f"{ratio:g}: {found[name][-1][ratio]:.2f}" for ratio in (0.0, *percent))
            say(f"seed {run.seed}, {LABELS[name]}: {accuracies}")
    rows, lambdas = rows_of(found, percent), [{"seed": run.seed} | describe_lambdas(run) for run in runs]
    config = runs[0].state["config"]
    title = f"{config['dataset']}, {config['arch']}, HALO xi={config['xi']:g} psi={config['psi']:g}: is it adaptive?"
    write_report(out, rows, lambdas, title)
    say(f"wrote {out}/adaptivity.md, adaptivity.json, adaptivity.png")
    return {"rows": rows, "lambdas": lambdas}


if __name__ == "__main__":
    run_script(main, get_parser())
