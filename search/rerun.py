"""Run a stored trial again, anywhere, and say whether its scores agree within the noise floor.

Config, prompts, seeds and settings are those of the stored study, which is only read; statistics and float videos are
made anew in a scratch folder, so that nothing is taken on trust. Clips of the same noise are held against each other,
prompt by prompt:

    distance = mean over prompts of |score now - score then|
    allowance = 2 * noise floor      for metrics with a reference: float clips and candidate clips may both have moved
              = 2 * distance of the float clips' own scores, now and then, for the other metrics

A metric agrees if its distance is within its allowance, or is no more than rounding. PSNR is compared as the root mean
square error that it stands for, because decibels of two nearly equal clips have no bound.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from hyquant.config import FrozenModel
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from search.errors import SearchError
from search.locate import StudyRef, opened_study
from search.locks import HostLock
from search.noise_floor import NoiseFloor
from search.objective import run_trial
from search.prepare import prepare_workbench
from search.prompts import StudyPrompts
from search.provenance import differences
from search.result import MetricResult, TrialResult
from search.stages import Stages
from search.storage import float_results, stored_config, stored_floor, stored_prompts
from search.study import StudyConfig
from search.trials import trial_result

ROUNDING = 1e-5
"""Distances of no more than this share of the scores are rounding."""

_PSNR = "psnr_db"


class MetricAgreement(FrozenModel):
    """One metric then and now.

    Attributes:
        metric: Its name.
        then, now: Means over the same prompts.
        distance: Mean distance over prompts, in the unit of the metric; of the RMSE for PSNR.
        allowance: How far apart they may be.
    """

    metric: str
    then: float
    now: float
    distance: float
    allowance: float

    @property
    def agrees(self) -> bool:
        """Say whether the scores are no farther apart than the noise floor allows."""
        return self.distance <= self.allowance


class Rerun(FrozenModel):
    """A trial run again.

    Attributes:
        number: The trial.
        metrics: One per metric that was scored.
        changed: What differs in provenance; None if the trial has none.
    """

    number: int
    metrics: tuple[MetricAgreement, ...]
    changed: tuple[str, ...] | None

    @property
    def agrees(self) -> bool:
        """Say whether every metric agrees."""
        return all(metric.agrees for metric in self.metrics)


@dataclass(frozen=True)
class StoredTrial:
    """What is stored of a trial and its study."""

    config: StudyConfig
    prompts: StudyPrompts
    result: TrialResult
    floats: Mapping[str, MetricResult]
    floor: NoiseFloor | None


def run_again(ref: StudyRef, number: int) -> Rerun:
    """Render and score a stored trial again on one process; nothing is written to its store.

    Raises:
        SearchError: If the study has no such trial, or it was never scored.
        TrialFailed: If it cannot be run here.
    """
    stored = read_trial(ref, number)
    # All that was rendered then is rendered now; rungs, and with them other trials, have no say.
    config = stored.config.model_copy(update={"rungs": None})
    if ref.config is not None:  # a study file says where the model is on this machine
        config = config.model_copy(update={"model": ref.config.model})
    with tempfile.TemporaryDirectory(prefix="hyq-again-") as folder:
        bench = prepare_workbench(
            config,
            stored.prompts,
            group=Group(),
            device=resolve_device(config.model.device),
            cache=Path(folder),
            lock=HostLock(),
        )
        bench.floor = stored.floor  # the yardstick of then; another one would be measured for nothing
        measurement = run_trial(bench, stored.result.config, Stages(Group()))
        assert measurement is not None, "the only rank measures"
        now, before = measurement.result, stored.result.provenance
        return Rerun(
            number=number,
            metrics=agreements(
                stored.result.metrics, now.metrics, stored.floor, (stored.floats, bench.float_results), config.metrics
            ),
            changed=None if before is None or now.provenance is None else differences(before, now.provenance),
        )


def read_trial(ref: StudyRef, number: int) -> StoredTrial:
    """Read what is stored of a trial.

    Raises:
        StoreError: If the study is not there.
        SearchError: If it has no such trial, or the trial was never scored.
    """
    with opened_study(ref) as study:
        trials = study.get_trials(deepcopy=False)
        result = trial_result(trials[number]) if 0 <= number < len(trials) else None
        if result is None or not result.metrics:
            raise SearchError(
                f"only a trial with scores can be run again, but study {ref.name} has none of number {number}; see "
                "hyq-search status"
            )
        return StoredTrial(
            stored_config(study), stored_prompts(study), result, float_results(study), stored_floor(study)
        )


def agreements(
    then: Mapping[str, MetricResult],
    now: Mapping[str, MetricResult],
    floor: NoiseFloor | None,
    floats: tuple[Mapping[str, MetricResult], Mapping[str, MetricResult]],
    names: Sequence[str],
) -> tuple[MetricAgreement, ...]:
    """Compare the scores of a trial with those of its rerun.

    Args:
        then: Stored metrics, over all prompts or the first few.
        now: Metrics of the rerun, over all prompts.
        floor: The study's noise floor; None allows rounding alone.
        floats: Scores of the float videos, then and now.
        names: Metrics to compare; those that were not scored then are left out.
    """
    found = []
    for name in (name for name in names if name in then):
        old = then[name].values
        new = now[name].values[: len(old)] if name in now else ()
        if len(new) < len(old):
            new = (float("nan"),) * len(old)  # lost, or not finite: it agrees with nothing
        noise = 0.0
        if floor is not None and name in floor.metrics:
            noise = _distance(name, floor.metrics[name].values, floor.metrics[name].perfect)
        elif name in floats[0] and name in floats[1]:
            noise = _distance(name, floats[0][name].values, floats[1][name].values)
        scale = fmean(abs(_compared(name, value)) for value in old)
        found.append(
            MetricAgreement(
                metric=name,
                then=fmean(old),
                now=fmean(new),
                distance=_distance(name, old, new),
                allowance=2 * noise + ROUNDING * scale,
            )
        )
    return tuple(found)


def _distance(name: str, ones: Sequence[float], others: Sequence[float]) -> float:
    pairs = zip(ones, others, strict=True)
    return fmean(abs(_compared(name, one) - _compared(name, other)) for one, other in pairs)


def _compared(name: str, value: float) -> float:
    return 10 ** (-value / 20) if name == _PSNR else value
