"""What a study found: one row a method and ratio, as Markdown, CSV and figures."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from utils import plots
from utils.files.atomic import write_text
from utils.logger import duration, write_csv
from utils.run import read_json
from utils.studies.study import CONTROLS, Config, Study, choose, held_out_accuracy, on_edge, run_folder


def final_rows(study: Study, out: Path, *, scheme: str = "global") -> list[dict]:
    """Return the measurements of the chosen configurations on the test images.

    Args:
        study: its definition.
        out: folder of its outputs.
        scheme: how the networks were pruned.

    Returns:
        For each method and ratio that has a finished run: coefficients, n, mean and standard deviation (empty for
        n = 1) of top-1 pruned and dense in percent, compression ratio, theoretical speed-up, seconds of training.
    """
    rows = []
    for method, choice in choose(study, out).items():
        for ratio, config in choice.items():
            runs = [found for seed in study.seeds if (found := _measurement(out, config, seed, scheme, ratio))]
            if runs:
                rows.append(_row(study, method, ratio, config, runs))
    return rows


def _measurement(out: Path, config: Config, seed: int, scheme: str, ratio: float) -> dict | None:
    folder = run_folder(out, config, seed)
    report = read_json(folder / ("test" if scheme == "global" else f"test_{scheme}") / "prune.json")
    result = next((r for r in (report or {"results": []})["results"] if r["asked"] == ratio), None)
    if result is None:
        return None
    summary = read_json(folder / "run" / "summary.json")
    return {
        "top1": result["after"]["top1"],
        "dense": report["before"]["top1"],
        "compression": result["compression_ratio"],
        "speedup": result["theoretical_speedup"],
        "seconds": summary["seconds"],
    }


def _row(study: Study, method: str, ratio: float, config: Config, runs: list[dict]) -> dict:
    def spread(key: str) -> float | str:
        return stdev(run[key] for run in runs) if len(runs) > 1 else ""

    return {
        "method": method,
        "ratio": ratio,
        "coefficients": " ".join(f"{key}={value:g}" for key, value in config.coefficients),
        "on_edge": " ".join(on_edge(study, config)),
        "n": len(runs),
        "top1_mean": mean(run["top1"] for run in runs),
        "top1_std": spread("top1"),
        "dense_mean": mean(run["dense"] for run in runs),
        "dense_std": spread("dense"),
        "compression": mean(run["compression"] for run in runs),
        "speedup": mean(run["speedup"] for run in runs),
        "seconds": mean(run["seconds"] for run in runs),
    }


def _percent(row: dict, key: str) -> str:
    spread = row[f"{key}_std"]
    return f"{row[f'{key}_mean']:.2f}" + (f" ± {spread:.2f}" if spread != "" else "")


def top1_table(rows: list[dict], title: str) -> list[str]:
    """Format top-1 with a line a method and a column a ratio, as Markdown.

    Args:
        rows: `method`, `ratio`, `top1_mean` and `top1_std` in percent (empty for n = 1).
        title: the heading.
    """
    ratios, methods = sorted({row["ratio"] for row in rows}), list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["method"], row["ratio"]): _percent(row, "top1") for row in rows}
    lines = [f"## {title}", "", "| | " + " | ".join(f"{ratio:g}" if ratio else "dense" for ratio in ratios) + " |"]
    lines.append("|---" * (len(ratios) + 1) + "|")
    lines += [f"| {m} | " + " | ".join(cells.get((m, ratio), "") for ratio in ratios) + " |" for m in methods]
    return [*lines, ""]


def _details(rows: list[dict]) -> list[str]:
    columns = ("method", "ratio", "chosen", "n", "dense top-1", "pruned top-1", "compression", "speed-up", "seconds")
    lines = ["## Each choice", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        edge = f" (grid ends at {row['on_edge']})" if row["on_edge"] else ""
        cells = [row["method"], f"{row['ratio']:g}", row["coefficients"] + edge, str(row["n"])]
        cells += [_percent(row, "dense"), _percent(row, "top1")]
        cells += [f"{row['compression']:.1f}", f"{row['speedup']:.1f}", f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def tuned(study: Study, out: Path) -> dict[str, dict[str, dict[float, float]]]:
    """Return the held-out top-1 of every configuration by method, name and ratio; empty where it diverged."""
    return {m: {c.name: held_out_accuracy(study, out, c) for c in study.of_method(m)} for m in study.methods}


def _tuning(study: Study, found: dict[str, dict[str, dict[float, float]]]) -> list[str]:
    lines = ["## Tuning: top-1 on the held-out images", ""]
    lines += ["| method | coefficients | dense | " + " | ".join(f"{ratio:g}" for ratio in study.percent) + " |"]
    lines.append("|---" * (len(study.percent) + 3) + "|")
    for method, configs in found.items():
        for name, accuracy in configs.items():
            cells = [f"{value:.2f}" for value in accuracy.values()] or ["diverged or not run"]
            lines.append(f"| {method} | {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _training_time(out: Path) -> str:
    """Say how many runs were trained, and how long that took in total."""
    seconds = [read_json(path)["seconds"] for path in out.glob("*/*/seed*/run/summary.json")]
    return f"{len(seconds)} runs were trained, in {duration(sum(seconds))} taken together, evaluation included."


def write_report(study: Study, out: Path, *, command: str) -> dict:
    """Write table.md, table.csv, accuracy_vs_sparsity.png and pareto.png.

    Args:
        study: its definition.
        out: folder of its outputs.
        command: what repeats it, for the table.

    Returns:
        The rows of table.csv by scheme.
    """
    rows = {scheme: final_rows(study, out, scheme=scheme) for scheme in ("global", *CONTROLS)}
    found = tuned(study, out)
    text = [f"# {study.title}", "", f"    {command}", ""]
    text += [
        "Top-1 in percent, mean ± standard deviation over seeds, after pruning this fraction of the weights once.",
        _training_time(out),
        "",
    ]
    if rows["global"]:
        text += top1_table(
            rows["global"], "On the test images, coefficients chosen per ratio on held-out training images"
        )
        text += _details(rows["global"])
    for scheme in CONTROLS:
        if rows[scheme]:
            text += top1_table(rows[scheme], f"Control: {scheme} pruning of the same networks")
    text += _tuning(study, found)
    write_text(out / "table.md", "\n".join(text))
    write_csv(out / "table.csv", [{"scheme": s} | row for s, of_scheme in rows.items() for row in of_scheme])
    if rows["global"]:
        plots.plot_study(rows["global"], out / "accuracy_vs_sparsity.png", title=study.title)
    if any(any(configs.values()) for configs in found.values()):
        plots.plot_pareto(found, out / "pareto.png", title=study.title)
    return rows
