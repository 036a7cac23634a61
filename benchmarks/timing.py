"""Times that can be compared: interleaved repetitions in one process, medians, and ratios of neighbours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from utils.stages.timing import interleave

__all__ = ["interleave", "rows"]


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
