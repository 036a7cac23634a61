"""Times that can be compared: interleaved repetitions in one process, medians, and ratios of neighbours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleave(
    functions: Mapping[str, Callable[[], object]], *, repeats: int, inner: int = 1, warm_up: int = 2
) -> dict[str, list[float]]:
    """Time functions in turn, so that whatever else the machine does falls on all of them alike.

    Args:
        functions: what to time, by name.
        repeats: how often each is timed.
        inner: calls in one timing.
        warm_up: calls of each that are not counted: allocation, caches, compilation.

    Returns:
        Seconds a call by name, one a repetition.
    """
    for function in functions.values():
        for _ in range(warm_up):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(inner):
                function()
            times[name].append((time.perf_counter() - start) / inner)
    return times


def rows(times: Mapping[str, list[float]], *, reference: str, faster: bool) -> list[dict]:
    """Summarise interleaved times against one of them.

    Args:
        times: from `interleave`.
        reference: the one to compare with.
        faster: report how many times faster each is than the reference; else how many times longer it takes.

    Returns:
        For each its name, n, median milliseconds and their spread, and the median over repetitions of the ratio.
    """
    result = []
    for name, values in times.items():
        pairs = [(a / b if faster else b / a) for a, b in zip(times[reference], values, strict=True)]
        low, _, high = statistics.quantiles(values, n=4)
        result.append(
            {
                "what": name,
                "n": len(values),
                "ms": 1e3 * statistics.median(values),
                "ms_quartiles": [1e3 * low, 1e3 * high],
                "ratio": statistics.median(pairs),
            }
        )
    return result
