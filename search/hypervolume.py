"""How much a front dominates, in one number.

The hypervolume of points is the volume of all that at least one of them dominates, up to a reference point: with two
objectives the area under a staircase. It grows whenever a new point is not dominated.
"""

from collections.abc import Sequence

Losses = tuple[float, ...]


def hypervolume(points: Sequence[Losses], reference: Losses) -> float:
    """Return the volume that points dominate, exactly, for any number of objectives.

    Cuts along the last objective: between two successive values of it, the points that are better there dominate a
    slice whose area is a hypervolume of one objective less.

    Args:
        points: Losses, smaller is better everywhere; points that do not reach the reference add nothing.
        reference: The worst that counts, one per objective.

    Source: hypervolume by slicing objectives; While, Hingston, Barone and Huband, IEEE Transactions on Evolutionary
    Computation 10 (2006).
    """
    inside = sorted((p for p in points if all(map(float.__lt__, p, reference))), key=lambda p: p[-1])
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - inside[0][0]
    ends = [*(point[-1] for point in inside[1:]), reference[-1]]
    return sum(
        (end - point[-1]) * hypervolume([p[:-1] for p in inside[: count + 1]], reference[:-1])
        for count, (point, end) in enumerate(zip(inside, ends, strict=True))
        if end > point[-1]
    )
