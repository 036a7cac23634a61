"""What was measured of the chosen configurations: one row a method and ratio."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from utils.files.lock import holder_of
from utils.studies.measurements import SAVED, read_measured, read_summary
from utils.studies.methods import Config
from utils.studies.study import Study, choose, on_edge, run_folder
from utils.verdict import failed_to_learn


def final_rows(study: Study, out: Path, *, scheme: str = "global") -> list[dict]:
    """Return the measurements of the chosen configurations on the test images.

    Args:
        study: its definition.
        out: folder of its outputs.
        scheme: how the networks were pruned.

    Returns:
        For each method and ratio that has a finished run: coefficients, n and the seeds, mean and standard deviation
        (empty for n = 1) of top-1 pruned and dense in percent, top-1 of each seed and whether it failed to learn,
        compression ratio, theoretical speed-up, seconds of training (empty where those of a part are gone).
    """
    found = {}
    for method, choice in choose(study, out).items():
        if scheme != "global" and method not in study.controls:  # of an earlier form of the study
            continue
        for ratio, config in choice.items():
            runs = [run for seed in study.seeds if (run := _measurement(out, config, seed, scheme, ratio))]
            if runs:
                found[method, ratio] = config, runs
    best = max((run["dense"] for _, runs in found.values() for run in runs), default=0.0)
    return [_row(study, out, method, ratio, *of, best=best) for (method, ratio), of in found.items()]


def _measurement(out: Path, config: Config, seed: int, scheme: str, ratio: float) -> dict | None:
    folder = run_folder(out, config, seed)
    report = read_measured(folder / ("test" if scheme == "global" else f"test_{scheme}"), need=SAVED)
    results = report["results"] if report else []
    result = next((r for r in results if r["asked"] == ratio), None)
    parts = [run_folder(out, part, seed) for part in (config, config.before) if part]
    if result is None or any(map(_in_training, parts)):
        return None
    seconds = [*map(_seconds, parts)]
    return {
        "seed": seed,
        "top1": result["after"]["top1"],
        "dense": report["before"]["top1"],
        "compression": result["compression_ratio"],
        "speedup": result["theoretical_speedup"],
        "seconds": None if None in seconds else sum(seconds),
    }


def _in_training(folder: Path) -> bool:
    """Tell whether a network that was measured and deleted is just being trained again."""
    run = folder / "run"
    there = holder_of(run / ".lock") or any((run / f"{name}.pth.tar").exists() for name in ("checkpoint", "init"))
    return bool(there) and not (run / "summary.json").exists() and not (run / "final.pth.tar").exists()


def _seconds(folder: Path) -> float | None:
    """Return how long a training took; None where its folder is gone, as that of a network before a cut may be.

    Raises:
        ValueError: nothing says so.
    """
    if not folder.exists():
        return None
    summary = read_summary(folder / "run" / "summary.json")
    if summary is None:
        raise ValueError(f"{folder} was trained, but its run/summary.json is gone: bring it back, or remove the folder")
    return summary["seconds"]


def _row(study: Study, out: Path, method: str, ratio: float, config: Config, runs: list[dict], *, best: float) -> dict:
    def spread(key: str) -> float | str:
        return stdev(run[key] for run in runs) if len(runs) > 1 else ""

    once = config.ratio is None  # else no network was dense at the end of training

    return {
        "method": method,
        "ratio": ratio,
        "coefficients": " ".join(f"{key}={value:g}" for key, value in config.coefficients),
        "on_edge": " ".join(on_edge(study, config, out)),
        "n": len(runs),
        "top1_mean": mean(run["top1"] for run in runs),
        "top1_std": spread("top1"),
        "dense_mean": mean(run["dense"] for run in runs) if once else "",
        "dense_std": spread("dense") if once else "",
        "compression": mean(run["compression"] for run in runs),
        "speedup": mean(run["speedup"] for run in runs),
        "seconds": "" if any(run["seconds"] is None for run in runs) else mean(run["seconds"] for run in runs),
        "seeds": [run["seed"] for run in runs],
        "top1_seeds": [run["top1"] for run in runs],
        "failed": [failed_to_learn(run["dense"], best) for run in runs],
    }
