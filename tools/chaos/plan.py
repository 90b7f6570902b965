"""Which fault comes when: a seeded plan, made before anything runs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

DURATIONS_S = {
    "kill rank": 0.0,
    "kill agent": 0.0,
    "kill command": 0.0,
    "kill all workers": 0.0,
    "kill everything": 4.0,
    "hang rank": 5.0,
    "hang rank past lease": 80.0,
    "cut network": 6.0,
    "cut network past lease": 80.0,
    "kill postgres": 3.0,
    "postgres away": 40.0,
    "kill mlflow": 5.0,
    "fill disk": 20.0,
    "damage cache": 0.0,
}
"""Kinds of faults, and for how many seconds each lasts; a lease is lost after 60 s without a sign of life."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        number: From 0.
        kind: A key of `DURATIONS_S`.
        start_s: Seconds after the first trial began.
        worker: Index of the worker it hits, if that has a trial in hand; else the next that has.
        draw: A random number for whatever else is to be chosen.
    """

    number: int
    kind: str
    start_s: float
    worker: int
    draw: float

    @property
    def lasts_s(self) -> float:
        """Return for how many seconds it lasts."""
        return DURATIONS_S[self.kind]


def make_plan(num_faults: int, seed: int, pace_s: float, *, num_workers: int, only: Sequence[str] = ()) -> list[Fault]:
    """Return faults in the order they begin; every kind comes up about equally often, at random times.

    Args:
        num_faults: How many.
        seed: Of the plan.
        pace_s: Mean seconds between two.
        num_workers: How many workers there are to hit.
        only: Kinds to draw from; all if empty.
    """
    draw = random.Random(seed)
    kinds = list(only or DURATIONS_S)
    rounds = [draw.sample(kinds, len(kinds)) for _ in range(num_faults // len(kinds) + 1)]
    chosen = [kind for one in rounds for kind in one][:num_faults]
    start_s, plan = 0.0, []
    for number, kind in enumerate(chosen):
        start_s += pace_s * draw.uniform(0.5, 1.5)
        plan.append(Fault(number, kind, start_s, draw.randrange(num_workers), draw.random()))
    return plan
