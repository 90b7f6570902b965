"""The front measured again: which members, with what noise, and on which bench."""

from dataclasses import replace

import optuna

from hyquant.config import QuantConfig
from search.confirmation import Confirmation, confirmations
from search.errors import DiskTrouble, TrialFailed
from search.objective import run_trial
from search.overview import read_overview
from search.stages import Stages
from search.study import StudyConfig
from search.workbench import Workbench

CONFIRM_SEED_OFFSET = 3_000_000
"""Fresh noise: neither calibration, search nor a certificate draws from these seeds."""


def pending(study: optuna.Study, config: StudyConfig) -> list[int]:
    """Return the members of the front that are still to be measured again, what is offered now first.

    No more than `confirm.members` members are measured; those that have since left the front do not count.
    """
    if config.confirm is None:
        return []
    known = confirmations(study)
    members = sorted(read_overview(study).front, key=lambda row: not row.picks)
    num_confirmed = sum(row.number in known for row in members)
    unknown = [row.number for row in members if row.number not in known]
    return unknown[: max(0, config.confirm.members - num_confirmed)]


def bench_for_again(bench: Workbench) -> Workbench:
    """Return a bench with the same prompts and fresh seeds, on which every trial sees all prompts.

    Its float videos are rendered by the first trial that needs them; everything else is shared with `bench`, the noise
    floor of each prompt too where it is known: it is the same for all members, so measuring it on the fresh seeds would
    cost renderings and change no pick.
    """
    confirm, workload = bench.config.confirm, bench.config.workload
    assert confirm is not None, "a study that measures nothing again needs no bench for it"
    prompts = bench.prompts.search * confirm.seeds
    first = workload.seed + CONFIRM_SEED_OFFSET
    return replace(
        bench,
        config=bench.config.model_copy(update={"rungs": None}),
        pairs=[(prompt, first + index) for index, prompt in enumerate(prompts)],
        references=[],
        float_results={},
        floor=None if bench.floor is None else bench.floor.at([*range(len(bench.prompts.search))] * confirm.seeds),
        is_judge_ready=False,
    )


def measure_again(again: Workbench, config: QuantConfig, stages: Stages) -> Confirmation | None:
    """Evaluate a config on fresh seeds; every rank of the group calls it with the same config.

    Returns:
        What it found out on rank 0; None elsewhere.

    Raises:
        DiskTrouble: On every rank, if a disk refused; that says nothing about the config.
    """
    try:
        measurement = run_trial(again, config, stages)
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
