"""What must hold when the faults are over, each as a row of the closing table."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from hyquant.devices import resolve_device
from hyquant.distributed import Group
from search.locks import HostLock
from search.objective import run_trial
from search.prepare import prepare_workbench
from search.repair import agreement
from search.stages import Stages
from search.storage import stored_config, stored_prompts
from search.trials import front, is_evaluated, trial_config
from tools.chaos.follow import Follower, finished
from tools.chaos.servers import TRACKING_URI

TOLERANCE = 1e-6
"""Relative; values are float32 arithmetic of one machine in one order, so they usually agree to the last bit."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was found."""

    what: str
    holds: bool
    found: str


def checks(study: optuna.Study, follower: Follower, url: str, store: Path, scratch: Path) -> Iterator[Check]:
    """Yield every check of a study that has run to its end.

    Args:
        study: The study.
        follower: What was seen on the way.
        url: Address of the database, for plain SQL.
        store: A worker's store.
        scratch: Folder for the quiet process's own cache.
    """
    trials = study.get_trials(deepcopy=False)
    states = Counter(trial.state.name for trial in trials)
    open_ones = [trial.number for trial in trials if not trial.state.is_finished()]
    yield Check("every trial is in a final state", not open_ones, f"{dict(states)}; not final: {open_ones}")
    rows = finished(url)
    twice = [number for number, found in rows.items() if len(found) != 1]
    yield Check(
        "exactly once, and it never changed", not twice and not follower.changed, str([*twice, *follower.changed])
    )
    numbers = [trial.number for trial in trials]
    yield Check("numbers have no gap", numbers == list(range(len(numbers))), f"0 to {len(numbers) - 1}")
    evaluated = [trial for trial in trials if is_evaluated(trial)]
    digests = Counter(trial.user_attrs["config_digest"] for trial in evaluated)
    repeated = [key for key, count in digests.items() if count > 1]
    yield Check("no config was evaluated twice", not repeated, f"{len(digests)} evaluated; twice: {repeated}")
    lost = [number for number, one in follower.seen.items() if [one] != rows.get(number)]
    yield Check("no finished trial was lost", not lost, f"{len(follower.seen)} seen on the way; lost: {lost}")
    differences = agreement(store, study, TRACKING_URI)
    yield Check("Optuna and MLflow agree", not differences, "; ".join(differences) or f"{len(trials)} trials")
    yield from _front_checks(study, evaluated, scratch)


def _front_checks(study: optuna.Study, evaluated: Sequence[FrozenTrial], scratch: Path) -> Iterator[Check]:
    values = {trial.number: quiet for trial, quiet in zip(evaluated, _again(study, evaluated, scratch), strict=True)}
    differing = [trial.number for trial in evaluated if not _agree(trial.values, values[trial.number])]
    yield Check("values equal those of a quiet run", not differing, f"{len(values)} compared; differ: {differing}")
    expected = non_dominated({number: one for number, one in values.items() if one is not None})
    found = sorted(trial.number for trial in front(study))
    yield Check("the front equals that of a quiet run", found == expected, f"{found}, quiet {expected}")


def non_dominated(values: dict[int, tuple[float, ...]]) -> list[int]:
    """Return the numbers whose values no other's beat, all minimized; written apart from the product's front."""
    return sorted(
        number
        for number, own in values.items()
        if not any(
            all(theirs <= mine for theirs, mine in zip(other, own, strict=True)) and other != own
            for other in values.values()
        )
    )


def _again(study: optuna.Study, trials: Sequence[FrozenTrial], scratch: Path) -> Iterator[tuple[float, ...] | None]:
    """Evaluate the configs of trials in this process, with a cache of its own and nobody else about."""
    config = stored_config(study)
    bench = prepare_workbench(
        config,
        stored_prompts(study),
        group=Group(),
        device=resolve_device(config.model.device),
        cache=scratch / "cache",
        lock=HostLock(scratch / "locks"),
    )
    for trial in trials:
        point = trial_config(trial)
        assert point is not None, "an evaluated trial has a config"
        measurement = run_trial(bench, point, Stages(Group()))
        assert measurement is not None, "the only rank measures"
        yield measurement.result.values


def _agree(stored: Sequence[float] | None, quiet: Sequence[float] | None) -> bool:
    if stored is None or quiet is None:
        return stored is None and quiet is None
    return all(math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for a, b in zip(stored, quiet, strict=True))
