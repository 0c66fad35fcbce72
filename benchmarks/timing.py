"""Times of several ways to do one thing, taken side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def wall(way: Callable[[], object]) -> float:
    """Seconds of one call by the process's clock."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def side_by_side(
    ways: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 2,
    clock: Callable[[Callable[[], object]], float] = wall,
) -> dict[str, float]:
    """Median seconds of each way; the ways take turns, so that a slow spell of the machine meets them all.

    Args:
        ways: name -> call. Each call is one measurement and must do its own cycling through cold data.
        repeats: measurements of each.
        warmup: rounds that do not count.
        clock: the seconds that one call takes.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warmup + repeats):
        for name, way in ways.items():
            elapsed = clock(way)
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}
