"""The front measured again: which members, with what noise, and on which bench."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import optuna
from optuna.trial import FrozenTrial

from hyquant.config import QuantConfig
from search.confirmation import Confirmation, confirmations, confirmed
from search.errors import DiskTrouble, TrialFailed
from search.floor_measuring import Agree, own_floor
from search.noise_floor import NoiseFloor
from search.objective import run_trial
from search.overview import offered, read_overview
from search.stages import Stages
from search.study import StudyConfig
from search.workbench import Workbench

CONFIRM_SEED_OFFSET = 3_000_000
"""Fresh noise: neither calibration, search nor a certificate draws from these seeds."""


def pending(study: optuna.Study, config: StudyConfig) -> list[int]:
    """Return the members of the front that are still to be measured again, in their order.

    First come those that the first values of all members would offer, then those farthest along the front from what is
    measured, until `confirm.members` members are measured; those that have since left the front do not count. What a
    raised budget has put on the front and would offer is measured even if as many members are.
    """
    if config.confirm is None:
        return []
    overview = read_overview(study)
    front, measured = [row.number for row in overview.front], confirmations(study)
    known = [number for number in front if number in measured]
    points = [row.point for row in overview.front]
    at_first = offered(overview.config, points, overview.float_scores, overview.floor).values()
    first = dict.fromkeys((*known, *list(dict.fromkeys(at_first))[: config.confirm.members]))
    return spread(front, first=first, count=max(config.confirm.members, len(first)))[len(known) :]


class PendingMembers:
    """What `pending` says to somebody who asks again and again, read anew only when it may have changed.

    Reading it takes every finished trial with all that it found out; while others measure, nothing of that changes.

    Args:
        study: The study.
        config: Its config.
    """

    def __init__(self, study: optuna.Study, config: StudyConfig) -> None:
        self._study, self._config = study, config
        self._read_at: object = None
        self._members: list[int] = []

    def among(self, trials: Iterable[FrozenTrial]) -> list[int]:
        """Return the members that are still to be measured again, in their order.

        Args:
            trials: All of the study, as they were just read.
        """
        now = sum(trial.state.is_finished() for trial in trials), confirmed(self._study.user_attrs)
        if now != self._read_at:
            self._read_at, self._members = now, pending(self._study, self._config)
        return self._members


def spread(front: Sequence[int], *, first: Iterable[int], count: int) -> list[int]:
    """Return some members of a front: given ones, then each time the one farthest along it from all before.

    Args:
        front: Numbers of all members, best quality first.
        first: Which of them come first.
        count: How many to return at most.

    Example:
        >>> spread([4, 5, 6, 7, 8], first=[4, 8], count=3)
        [4, 8, 6]
    """
    place = {number: index for index, number in enumerate(front)}
    order = list(first)[:count]
    while len(order) < min(count, len(front)):
        rest = [number for number in front if number not in order]
        order.append(max(rest, key=lambda number: min(abs(place[number] - place[other]) for other in order)))
    return order


def bench_for_again(bench: Workbench) -> Workbench:
    """Return a bench with the same prompts and fresh seeds, on which every trial sees all prompts.

    Its float videos are rendered by the first trial that needs them; everything else is shared with `bench`, the noise
    floor of each prompt too: see `measure_again`.
    """
    workload = bench.config.workload
    prompts = bench.prompts.search * _num_seeds(bench)
    first = workload.seed + CONFIRM_SEED_OFFSET
    return replace(
        bench,
        config=bench.config.model_copy(update={"rungs": None}),
        pairs=[(prompt, first + index) for index, prompt in enumerate(prompts)],
        references=[],
        float_results={},
        floor=_over_seeds(bench.floor, bench),
        is_judge_ready=False,
    )


def measure_again(
    again: Workbench, config: QuantConfig, stages: Stages, *, agree: Agree = own_floor
) -> Confirmation | None:
    """Evaluate a config on fresh seeds; every rank of the group calls it with the same config.

    The noise floor is the study's, measured on the first seeds: it must be the same for all members, whichever process
    measures them, and measuring it on the fresh seeds would cost renderings and change no pick.

    Args:
        again: What `bench_for_again` returned.
        config: What to evaluate.
        stages: Where times and failures are kept.
        agree: Which noise floor the study has; asked on rank 0 alone, while the bench has none.

    Returns:
        What it found out on rank 0; None elsewhere.

    Raises:
        DiskTrouble: On every rank, if a disk refused; that says nothing about the config.
    """
    try:
        measurement = run_trial(again, config, stages, agree=lambda own: own or _over_seeds(agree(None), again))
    except DiskTrouble:
        raise
    except TrialFailed as failure:
        return Confirmation(result=None, failure=str(failure)) if again.group.rank == 0 else None
    if measurement is None:
        return None
    return Confirmation(
        result=measurement.result.model_copy(update={"stage_seconds": dict(stages.seconds)}),
        float_scores={name: result.mean for name, result in again.float_results.items()},
    )


def _over_seeds(floor: NoiseFloor | None, bench: Workbench) -> NoiseFloor | None:
    """Return a study's floor with each prompt as often as it has fresh seeds."""
    return None if floor is None else floor.at([*range(len(bench.prompts.search))] * _num_seeds(bench))


def _num_seeds(bench: Workbench) -> int:
    assert bench.config.confirm is not None, "a study that measures nothing again needs no bench for it"
    return bench.config.confirm.seeds
