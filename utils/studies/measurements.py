"""What runs have left as JSON, read as numbers that can be compared: prune.json, summary.json, seconds.json."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from utils.files.texts import read_text
from utils.run import read_json

SAVED = ("macs_nonzero", "macs_dense", "compression_ratio", "theoretical_speedup")  # not in files before 0.1


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} holds no {what}: use another copy, or remove it")


def is_number(value: object, low: float = 0.0, high: float = math.inf) -> bool:
    """Tell whether a value is a finite number in [low, high]."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max and low <= value <= high


def read_measurement(path: str | Path, *, need: Iterable[str] = ()) -> dict | None:
    """Read a prune.json; None if there is none.

    Args:
        path: the file.
        need: keys that every ratio must have as numbers, of SAVED.

    Raises:
        ValueError: it is damaged, or lacks an accuracy.
    """
    report, path = read_json(path), Path(path)
    if report is None:
        return None
    results = report.get("results")
    if not isinstance(results, list) or not _has_top1(report.get("before")):
        raise _damaged(path, "accuracy before pruning, or no results after it")
    for result in results:
        if not isinstance(result, Mapping) or not is_number(result.get("asked"), high=1):
            raise _damaged(path, "ratio in [0, 1] under 'asked'")
        if not _has_top1(result.get("after")):
            raise _damaged(path, f"accuracy in percent at ratio {result['asked']:g}")
        wrong = [key for key in need if not is_number(result.get(key))]
        if wrong or ("macs_dense" in need and not result["macs_dense"]):
            raise _damaged(path, f"number under {(*wrong, 'macs_dense')[0]!r} at ratio {result['asked']:g}")
    return report


def read_measured(folder: Path, *, need: Iterable[str] = ()) -> dict | None:
    """Do what `read_measurement` does for a folder of a study, which is named after what was measured.

    Args:
        folder: `val` of the held-out images, `test` of the test images, `test_random` of another scheme on them.
        need: as in `read_measurement`.

    Raises:
        ValueError: it is damaged, or of other images or another scheme: nothing may be chosen on the test images.
    """
    report = read_measurement(folder / "prune.json", need=need)
    images, _, scheme = folder.name.partition("_")
    for key, value in {"images": images, "scheme": scheme or "global"}.items():
        if report is not None and report.get(key) != value:
            raise ValueError(f"{folder / 'prune.json'} has {key} {report.get(key)}, not {value}: remove it")
    return report


def _has_top1(value: object) -> bool:
    return isinstance(value, Mapping) and is_number(value.get("top1"), high=100)


def accuracies_of(report: Mapping) -> dict[float, float]:
    """Return top-1 in percent by ratio from the content of a prune.json, 0 for the network before pruning."""
    return {0.0: report["before"]["top1"]} | {r["asked"]: r["after"]["top1"] for r in report["results"]}


def in_columns(runs: Mapping[str, Mapping[float, float]], reports: Iterable[str]) -> dict[str, dict[float, float]]:
    """Return top-1 by ratio so that equal ratios have one number.

    Args:
        runs: label to true sparsity to top-1.
        reports: their prune.json.

    Returns:
        The same by the ratio that some report was asked for, where what is left differs from that by less than 5% and
        0.00005, else by the true one to four digits, beyond 0.99 to six.
    """
    asked = {ratio for path in reports for ratio in read_accuracies(path)}

    def column(sparsity: float) -> float:
        near = min(asked, key=lambda ratio: abs(ratio - sparsity))
        close = abs(near - sparsity) <= min(5e-5, 0.05 * (1 - sparsity))
        return near if close else round(sparsity, 4 if sparsity < 0.99 else 6)

    return {label: {column(sparsity): top1 for sparsity, top1 in run.items()} for label, run in runs.items()}


def read_accuracies(path: str | Path) -> dict[float, float]:
    """Return what `accuracies_of` does for a prune.json; empty without the file.

    Raises:
        ValueError: it is damaged.
    """
    report = read_measurement(path)
    return {} if report is None else accuracies_of(report)


def read_summary(path: str | Path) -> dict | None:
    """Read a summary.json; None if there is none.

    Raises:
        ValueError: it is damaged, or lacks the options of the run or its seconds.
    """
    summary = read_json(path)
    if summary is not None and not (
        isinstance(summary.get("arguments"), Mapping) and is_number(summary.get("seconds"))
    ):
        raise _damaged(Path(path), "'arguments' and 'seconds' of a run")
    return summary


def read_seconds(path: str | Path) -> dict[str, float]:
    """Read a seconds.json, of a study; empty without the file.

    Raises:
        ValueError: it is damaged.
    """
    seconds = read_json(path) or {}
    if not all(map(is_number, seconds.values())):
        raise _damaged(Path(path), "seconds of runs")
    return seconds


def read_log(folder: str | Path, *, columns: Iterable[str], epochs: object) -> list[dict[str, float]]:
    """Read columns of numbers from the log.csv of a finished run, a row an epoch.

    Raises:
        ValueError: it is missing or damaged, or not the log of this run, whose summary.json has its checksum.
    """
    path = Path(folder) / "log.csv"
    try:
        text, summary = read_text(path), read_summary(path.with_name("summary.json"))
    except FileNotFoundError as error:
        raise ValueError(f"no log {path}: give the folder of a finished run") from error
    stated = (summary or {}).get("log_sha256")  # files before 0.2 have none
    if stated is not None and stated != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError(f"{path} was damaged or edited, summary.json has another checksum of it: use another copy")
    try:
        rows = [{key: float(row[key]) for key in columns} for row in csv.DictReader(io.StringIO(text))]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise _damaged(path, f"numbers in its columns {', '.join(columns)}") from error
    if len(rows) != epochs or not rows or not all(math.isfinite(v) for row in rows for v in row.values()):
        raise _damaged(path, f"number in each of {epochs} rows")
    return rows
