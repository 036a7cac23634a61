"""What a study found: one row a method and ratio, as Markdown, CSV and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from utils.files.atomic import write_text
from utils.files.lock import folder_lock
from utils.logger import duration, say, warn, write_csv
from utils.plot_methods import plot_pareto, plot_study
from utils.studies.jobs import final_jobs, require_same_study, tuning_jobs
from utils.studies.measurements import SAVED, read_measured, read_summary
from utils.studies.rows import final_rows
from utils.studies.study import CONTROLS, Study, choose, held_out_accuracy, run_folder
from utils.verdict import any_failed


def _percent(row: dict, key: str) -> str:
    value, spread = row[f"{key}_mean"], row[f"{key}_std"]
    return "" if value == "" else f"{value:.2f}" + (f" ± {spread:.2f}" if spread != "" else "")


def _top1(row: dict) -> str:
    """Format top-1, with the median where a run failed to learn: there a mean says little."""
    text = f" (median {median(row['top1_seeds']):.2f})" if any_failed([row]) else ""
    return _percent(row, "top1") + text


def top1_table(rows: list[dict], title: str) -> list[str]:
    """Format top-1 with a line a method and a column a ratio, as Markdown.

    Args:
        rows: `method`, `ratio`, `top1_mean` and `top1_std` in percent (empty for n = 1); with `failed`, `top1_seeds`.
        title: the heading.
    """
    ratios, methods = sorted({row["ratio"] for row in rows}), list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["method"], row["ratio"]): _top1(row) for row in rows}
    lines = [f"## {title}", "", "| | " + " | ".join(f"{ratio:g}" if ratio else "dense" for ratio in ratios) + " |"]
    lines.append("|---" * (len(ratios) + 1) + "|")
    lines += [f"| {m} | " + " | ".join(cells.get((m, ratio), "") for ratio in ratios) + " |" for m in methods]
    return [*lines, ""]


def _details(rows: list[dict]) -> list[str]:
    columns = (
        "method",
        "ratio",
        "chosen",
        "seeds",
        "dense top-1",
        "pruned top-1",
        "compression",
        "speed-up",
        "seconds",
    )
    lines = ["## Each choice", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        edge = f" (grid ends at {row['on_edge']})" if row["on_edge"] else ""
        cells = [row["method"], f"{row['ratio']:g}", row["coefficients"] + edge]
        cells += [f"{row['n']} ({_numbers(row['seeds'])})", _percent(row, "dense"), _top1(row)]
        cells += [
            f"{row['compression']:.1f}",
            f"{row['speedup']:.1f}",
            f"{row['seconds']:.0f}" if row["seconds"] != "" else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def tuned(study: Study, out: Path) -> dict[str, dict[str, dict[float, float]]]:
    """Return the held-out top-1 of every configuration by method, name and ratio, without what diverged."""
    return {m: {c.name: held_out_accuracy(study, out, c) for c in study.of_method(m)} for m in study.methods}


def _tuning(study: Study, out: Path, found: dict[str, dict[str, dict[float, float]]]) -> list[str]:
    lines = ["## Tuning: top-1 on the held-out images", ""]
    lines += ["| method | coefficients | dense | " + " | ".join(f"{ratio:g}" for ratio in study.percent) + " |"]
    lines.append("|---" * (len(study.percent) + 3) + "|")
    for method, configs in found.items():
        for name, accuracy in configs.items():
            cells = [f"{accuracy[ratio]:.2f}" if ratio in accuracy else "" for ratio in (0.0, *study.percent)]
            cells = cells if accuracy else [_without_accuracy(study, out, method, name)]
            lines.append(f"| {method} | {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _without_accuracy(study: Study, out: Path, method: str, name: str) -> str:
    """Say why a configuration has no accuracy on the held-out images."""
    runs = [run for c in study.of_method(method) if c.name == name for run in c.runs(study.percent)]
    folders = [run_folder(out, run, seed) for run in runs for seed in study.tune_seeds]
    if any((folder / "failed.json").exists() for folder in folders):
        return "diverged or failed"
    begun = any((folder / name).exists() for folder in folders for name in ("run/log.csv", "val/prune.json"))
    return "unfinished" if begun else "not run"


def held_out_points(study: Study, out: Path) -> dict[str, list[tuple[float, float]]]:
    """Return every tuned run at every ratio, and dense: multiply-adds left as a fraction, and top-1."""
    points: dict[str, list[tuple[float, float]]] = {method: [] for method in study.methods}
    for job in tuning_jobs(study, out, ""):
        report = read_measured(job.measurement("global"), need=SAVED)
        if report is not None:
            dense = [(1.0, report["before"]["top1"])] if job.config.ratio is None else []
            pruned = [(r["macs_nonzero"] / r["macs_dense"], r["after"]["top1"]) for r in report["results"]]
            points[job.config.method] += [*dense, *pruned]
    return points


def tried(study: Study, out: Path) -> dict[str, list[int]]:
    """Return how many configurations of each method were trained, diverged ones too, at its ratios in turn."""
    jobs = [job for job in tuning_jobs(study, out, "") if job.done]
    counts = {}
    for method in study.methods:
        own = [(job.config, ratio) for job in jobs if job.config.method == method for ratio in job.percent]
        whole = [ratio for (_, ratio), seeds in Counter(own).items() if seeds == len(study.tune_seeds)]
        asked = study.of_method(method)[0].runs(study.percent).values()
        counts[method] = [whole.count(ratio) for ratios in asked for ratio in ratios]
    return counts


def _numbers(values: Iterable[float]) -> str:
    return " ".join(str(value) if isinstance(value, int) else f"{value:g}" for value in values)  # seeds are whole


def _what_was_done(study: Study, out: Path, rows: list[dict]) -> list[str]:
    """Say what the numbers are, over which seeds, and how long it took."""
    counts = tried(study, out)
    configurations = _spans(counts)
    lines = [
        "Top-1 in percent after pruning this fraction of the weights once, mean ± standard deviation over the seeds.",
        _seeds_line(study, rows),
        *([f"Configurations tried for each ratio: {configurations}."] if configurations else []),
        _time_line(out),
    ]
    own = [method for method in study.methods if study.of_method(method)[0].kind != "once" and max(counts[method])]
    if own:
        text = "zeros before training ends, each ratio in a run of its own with as many epochs in all"
        lines.append(f"{', '.join(own)} {'has its' if len(own) == 1 else 'have their'} {text}.")
    failed = sorted({f"{row['method']} {row['coefficients']}, seed {seed}" for row in rows for seed in _failed(row)})
    if failed:
        lost = "Failed to learn, or lost it in a cut during training (at its end less than half the best top-1)"
        lines.append(f"{lost}: {'; '.join(failed)}.")
    if diverged := _diverged(study, out):
        lines.append(f"Chosen, and diverged or failed with another seed, so in no mean: {'; '.join(diverged)}.")
    return [*lines, ""]


def _seeds_line(study: Study, rows: list[dict]) -> str:
    """Say which seeds chose the coefficients, and which measured the result."""
    finished = {tuple(row["seeds"]) for row in rows}
    seeds = sorted({seed for some in finished for seed in some})
    fewer = "" if len(finished) < 2 else "; where a row has fewer, it names them"
    chosen = f"Coefficients were chosen with seed {_numbers(study.tune_seeds)} on held-out training images"
    return chosen + (f"; on the test images n = {len(seeds)} (seeds {_numbers(seeds)}){fewer}." if seeds else ".")


def _time_line(out: Path) -> str:
    """Say how many runs were trained, and how long they took."""
    summaries = filter(None, map(read_summary, out.glob("*/*/seed*/run/summary.json")))
    seconds = [summary["seconds"] for summary in summaries]
    runs = f"{len(seconds)} run{' was' if len(seconds) == 1 else 's were'} trained"
    return f"{runs}, in {duration(sum(seconds))} taken together, evaluation included."


def _diverged(study: Study, out: Path) -> list[str]:
    """Name the runs of chosen configurations that have no measurement because they failed."""
    chosen = dict.fromkeys(config for choice in choose(study, out).values() for config in choice.values())
    runs = [(config, seed) for config in chosen for seed in study.seeds]
    failed = [run for run in runs if (run_folder(out, *run) / "failed.json").exists()]
    return [f"{config.method} {config.name}, seed {seed}" for config, seed in failed]


def _spans(counts: dict[str, list[int]]) -> str:
    """Say how many configurations each method had, from the ratio with the fewest to that with the most."""
    some = {method: n for method, n in counts.items() if max(n)}
    spans = {method: " to ".join(map(str, dict.fromkeys((min(n), max(n))))) for method, n in some.items()}
    return ", ".join(f"{method} {span}" for method, span in spans.items())


def _failed(row: dict) -> list[int]:
    return [seed for seed, failed in zip(row["seeds"], row["failed"], strict=True) if failed]


def _as_text(row: dict) -> dict:
    """Return a row of table.csv: what each seed has in one cell, failures as the seeds that failed."""
    return row | {"failed": _numbers(_failed(row))} | {key: _numbers(row[key]) for key in ("seeds", "top1_seeds")}


def has_runs(out: Path) -> bool:
    """Tell whether a folder of outputs has anything for a table: a run that began, was measured or failed."""
    return any(next(out.glob(f"*/*/seed*/{name}"), None) for name in ("failed.json", "*/*.json"))


def write_report(study: Study, out: Path, *, command: str) -> dict:
    """Write table.md, table.csv, and the figures for which there is something: see `draw_figures`.

    Args:
        study: its definition.
        out: folder of its outputs.
        command: what repeats it, for the table.

    Returns:
        The rows of table.csv by scheme.

    Raises:
        ValueError: the folder holds runs with other options; nothing is written.
    """
    require_same_study([*tuning_jobs(study, out, "."), *final_jobs(study, out, ".")])  # wherever the images are
    rows = {scheme: final_rows(study, out, scheme=scheme) for scheme in ("global", *CONTROLS)}
    found = tuned(study, out)
    text = [f"# {study.title}", "", f"    {command}", ""]
    text += _what_was_done(study, out, rows["global"])
    if rows["global"]:
        text += top1_table(
            rows["global"], "On the test images, coefficients chosen per ratio on held-out training images"
        )
        text += _details(rows["global"])
    for scheme in CONTROLS:
        if rows[scheme]:
            text += top1_table(rows[scheme], f"Control: {scheme} pruning of the same networks")
    text += _tuning(study, out, found)
    write_text(out / "table.md", "\n".join(text))
    write_csv(out / "table.csv", [{"scheme": s} | _as_text(row) for s, of_scheme in rows.items() for row in of_scheme])
    say(f"wrote in {out}: {', '.join(['table.md', 'table.csv', *draw_figures(study, out, rows['global'])])}")
    return rows


@contextmanager
def tables(study: Study, out: Path, *, command: str) -> Iterator[dict]:
    """Write the report of a study at the end of the block, however it ends; yield what it returns, filled in then.

    Where the block ends by an error, that is the one to be seen: a report that fails then is a note.
    """
    rows: dict = {}

    def write() -> None:
        with folder_lock(out, name=".report.lock", on_wait=say):  # so that the last part's is the last table
            rows.update(write_report(study, out, command=command) if has_runs(out) else {})

    try:
        yield rows
    except BaseException:
        try:
            write()
        except (ValueError, OSError) as error:
            warn(f"the tables are those of before: {error}")
        raise
    write()


def draw_figures(study: Study, out: Path, rows: list[dict]) -> list[str]:
    """Draw accuracy_vs_sparsity.png and pareto.png; remove one of an earlier table for which there is nothing now.

    Args:
        study: its definition.
        out: folder of its outputs.
        rows: from `final_rows`.

    Returns:
        The names of what was drawn.
    """
    points = held_out_points(study, out)
    figures = {"accuracy_vs_sparsity.png": (plot_study, rows)}
    figures["pareto.png"] = (plot_pareto, points if any(points.values()) else None)
    for name, (draw, content) in figures.items():
        if content:
            draw(content, out / name, title=study.title)
        else:
            (out / name).unlink(missing_ok=True)
    return [name for name, (_, content) in figures.items() if content]
