"""Area that points dominate, in likeness on a log axis against latency: the yardstick of the tabular benchmark."""

from collections.abc import Iterable, Sequence
from math import log10
from statistics import mean

from search.hypervolume import hypervolume
from tools.bench.tabular.table import Row, Table

RESOLUTION = 1e-7
"""Of a cosine in float32; videos that differ by less are equal."""

Loss = tuple[float, float]


def loss(row: Row) -> Loss:
    """Return (log10 of 1 - clip_reference, loop time over float's); smaller is better."""
    return log10(max(1 - mean(row.scores["clip_reference"]), RESOLUTION)), row.ratio


def is_feasible(row: Row) -> bool:
    """Say whether no clip collapsed and motion is between half and twice the float video's."""
    return not any(row.scores["collapsed"]) and 0.5 <= mean(row.scores["motion_energy_ratio"]) <= 2.0


def reference_point(table: Table) -> Loss:
    """Return the worst likeness of a feasible row, and the latency of the float model."""
    return max(loss(row)[0] for row in table.rows if is_feasible(row)), 1.0


def area(losses: Iterable[Loss], worst: Loss) -> float:
    """Return the area between the points' staircase and the worst point; points beyond it add nothing."""
    return hypervolume(list(losses), worst)


def areas_over_time(rows: Sequence[Row], worst: Loss, ended: Sequence[bool]) -> list[float]:
    """Return the area of those among the first 1, 2, ... rows that are feasible and did not end at a rung."""
    kept: list[Loss] = []
    found = []
    for row, has_ended in zip(rows, ended, strict=True):
        kept += [loss(row)] if is_feasible(row) and not has_ended else []
        found.append(area(kept, worst))
    return found
