"""Several p values at one error rate."""

from collections.abc import Mapping


def holm_adjusted(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p values that may each be held against the same alpha, in the order given.

    The chance that any true hypothesis is rejected stays below alpha, whatever the dependence between the tests.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979).
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
