"""When a difference between methods counts, and what a title may say of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

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

    A method of which a run failed to learn, and whose spread is therefore large, is named apart. Those that are behind
    are named where there are few.

    Args:
        rows: `method`, `ratio`, `n`, `top1_mean` and `top1_std` of each method.
        ratio: fraction removed; 0 before pruning.
    """
    here = sorted((row for row in rows if row["ratio"] == ratio), key=lambda row: -row["top1_mean"])
    where = f"at {ratio:g} removed" if ratio else "before pruning"
    best = here[0]
    if len(here) == 1:
        fewer = [row for row in rows if row["method"] == best["method"] and row["ratio"] < ratio]
        before = max(fewer, key=lambda row: row["ratio"], default=None)
        but = f", at {before['ratio']:g} {_figures(before)}" if before else ""
        return f"{where}, {best['method']} has {_figures(best)}{but}"
    if any(row["n"] < 2 for row in here):
        return f"{where}, single runs, which name no winner: {_named(here)}"
    failed = [row for row in here if any_failed([row])]  # level only because their spread is so large
    level = [row for row in here[1:] if not beyond_spread(best, row) and row not in failed]
    behind = [row for row in here[1:] if row not in level and row not in failed]
    but = f"; behind: {_named(behind)}" if behind and len(here) <= NAMED else ""
    but += "".join(f"; {row['method']} failed to learn in {sum(row['failed'])} of {row['n']}" for row in failed)
    if not level:
        return f"{where} {best['method']} keeps most, {_figures(best)}{but}"
    words = "level at the top, within the spread" if behind else "no difference beyond the spread"
    return f"{where}, {words}: {_named([best, *level])}{but}"


def _figures(row: Mapping) -> str:
    spread = f" ± {row['top1_std']:.2f}" if row["n"] > 1 else ""
    return f"{row['top1_mean']:.2f}{spread}%"


def _named(rows: Iterable[Mapping]) -> str:
    return "; ".join(f"{row['method']} {_figures(row)}" for row in rows)


def any_failed(rows: Iterable[Mapping]) -> bool:
    """Tell whether a run of some rows failed to learn."""
    return any(any(row.get("failed", ())) for row in rows)
