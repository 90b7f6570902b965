"""Timing calls against each other."""

import math
from collections.abc import Callable, Mapping
from statistics import median

_LEAST_S = 5e-3


def median_seconds(
    calls: Mapping[str, Callable[[], object]], now: Callable[[], float], rounds: int, *, least_s: float = _LEAST_S
) -> dict[str, float]:
    """Return median seconds of each call; in each round all take their turn, and short ones are repeated.

    Args:
        calls: What to time, by name; each is called twice before.
        now: Tells the seconds, after everything that was begun has ended.
        rounds: How often everything is timed.
        least_s: A measurement repeats a call until it lasts this long.
    """
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        started = now()
        call()
        repeats[name] = max(1, math.ceil(least_s / max(now() - started, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = now()
            for _ in range(repeats[name]):
                call()
            found[name].append((now() - started) / repeats[name])
    return {name: median(values) for name, values in found.items()}
