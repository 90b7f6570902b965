"""Numbers as people read them in tables, lines and pictures."""

import math

_SMALLEST_GAP = 1e-9


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    """Return a number with its interval, if it has one: "0.83 [0.81, 0.85]"."""
    ends = "" if interval is None else f" [{', '.join(map(readable, interval))}]"
    return f"{readable(value)}{ends}"


def readable(value: float) -> str:
    """Return a number in four digits; just below 1, with two digits of its distance to 1, as similarities need it.

    0.978 and 0.999 998 7 would both be "1" or nearly so in a fixed number of digits, and the second is the news.
    """
    gap = 1.0 - value
    if not _SMALLEST_GAP < gap < 0.1:
        return f"{value:.4g}"
    return f"{value:.{1 - math.floor(math.log10(gap))}f}"
