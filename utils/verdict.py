"""When a difference between methods counts, and what a title may say of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

NAMED = 6  # methods of which a title names all


def failed_to_learn(dense: float, best: float) -> bool:
    """Tell whether a run never began to learn: before pruning it has less than half the top-1 of the best run."""
    return dense < best / 2


def beyond_spread(better: Mapping, worse: Mapping) -> bool:
    """Tell whether a difference counts: both have n > 1, and means differ by more than the spread of the difference.

    The spread is the root of the summed squares of the two standard deviations over seeds.

    Args:
        better, worse: `n`, `top1_mean` and `top1_std` of each.
    """
    if min(better["n"], worse["n"]) < 2:
        return False
    return better["top1_mean"] - worse["top1_mean"] > math.hypot(better["top1_std"], worse["top1_std"])


def finding(rows: Sequence[Mapping], *, ratio: float) -> str:
    """Say which method keeps most at a ratio if it beats each other one beyond the spread, else which are level.

    A method of which a run failed to learn, and one of which there is one run, are named apart. Those that are behind
    are named where there are few.

    Args:
        rows: `method`, `ratio`, `n`, `top1_mean` and `top1_std` of each method; `top1_seeds` and `failed` of each seed,
            and `dense_mean`, empty where zeros were there before training ended, may be missing.
        ratio: fraction removed; 0 before pruning.
    """
    here = sorted((row for row in rows if row["ratio"] == ratio), key=lambda row: -row["top1_mean"])
    where = f"at {ratio:g} removed" if ratio else "before pruning"
    failed = [row for row in here if any_failed([row])]  # their spread is so large that they would be level with all
    counted = [row for row in here if row["n"] > 1 and row not in failed]
    single = [row for row in here if row["n"] < 2 and row not in failed]
    if len(here) == 1 and not failed:
        return f"{where}, {_alone(here[0], rows)}"
    if len(counted) + len(failed) < 2 or not counted:
        known = f", single runs, which name no winner: {_named([*counted, *single])}" if counted or single else ""
        return f"{where}{known}{_failures(failed, best=0.0)}"
    best = counted[0]["top1_mean"]
    learned = " of those that always learned" if any(median(row["top1_seeds"]) > best for row in failed) else ""
    one = f"; one run: {_named(single)}" if single else ""
    return f"{where}{learned}{_comparison(counted, few=len(here) <= NAMED)}{one}{_failures(failed, best=best)}"


def _alone(row: Mapping, rows: Sequence[Mapping]) -> str:
    """Say what the only method keeps, and what it kept at the ratio before."""
    fewer = [other for other in rows if other["method"] == row["method"] and other["ratio"] < row["ratio"]]
    before = max(fewer, key=lambda other: other["ratio"], default=None)
    return f"{row['method']} has {_figures(row)}" + (f", at {before['ratio']:g} {_figures(before)}" if before else "")


def _comparison(rows: Sequence[Mapping], *, few: bool) -> str:
    """Say which of some methods keeps most, or are level; where there are few, which are behind too."""
    best, *others = rows
    level = [row for row in others if not beyond_spread(best, row)]
    behind = [row for row in others if row not in level]
    but = f"; behind: {_named(behind)}" if behind and few else ""
    if not level:
        return f" {best['method']} keeps most, {_figures(best)}{but}"
    words = "level at the top, within the spread" if behind else "no difference beyond the spread"
    return f", {words}: {_named([best, *level])}{but}"


def _failures(rows: Iterable[Mapping], *, best: float) -> str:
    """Say how many runs failed, and what was in the middle of the others where that is more than the best."""
    said = ""
    for row in rows:
        how = "failed to learn, or lost it in the cut," if row.get("dense_mean") == "" else "failed to learn"
        middle = median(row["top1_seeds"])
        said += f"; {row['method']} {how} in {sum(row['failed'])} of {row['n']}"
        said += f" (median {middle:.2f}%)" if middle > best else ""
    return said


def _figures(row: Mapping) -> str:
    spread = f" ± {row['top1_std']:.2f}" if row["n"] > 1 else ""
    return f"{row['top1_mean']:.2f}{spread}%"


def _named(rows: Iterable[Mapping]) -> str:
    return "; ".join(f"{row['method']} {_figures(row)}" for row in rows)


def any_failed(rows: Iterable[Mapping]) -> bool:
    """Tell whether a run of some rows failed to learn."""
    return any(any(row.get("failed", ())) for row in rows)
