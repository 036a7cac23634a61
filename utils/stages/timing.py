"""Times that can be compared: interleaved repetitions in one process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

SECONDS = 2.0  # that the repetitions of one comparison should take
REPEATS = (5, 51)  # at least and at most


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


def interleave_enough(functions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Time functions in turn, as often as SECONDS allow within REPEATS; see `interleave`."""
    once = sum(times[0] for times in interleave(functions, repeats=1).values())
    inner = max(1, math.ceil(2e-3 / once))  # so that no timing is of microseconds
    repeats = int(SECONDS / (inner * once))
    return interleave(functions, repeats=min(max(repeats, REPEATS[0]), REPEATS[1]), inner=inner, warm_up=1)
