"""The best of earlier studies on the same model, queued for a new one: what was good once is tried first again."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FixedTrial

from hyquant.config import QuantConfig, digest
from search.errors import StoreError
from search.overview import TrialRow, read_overview
from search.study import StudyConfig
from spaces.space import SearchSpace
from spaces.suggest import preset_params, suggest

FINGERPRINT = "model_fingerprint"
NOTE = "earlier_presets"


def enqueue_earlier(study: optuna.Study, config: StudyConfig, fingerprint: str, storage: BaseStorage) -> None:
    """Note which model a study is about, and queue the best of earlier ones, once in its life.

    An earlier study counts if its model has the same fingerprint and its target is the same; newer studies come first,
    and of each its picks before the rest of its front. A config counts if its parameters mean the same in this space.
    What the space's presets hold is left out. Studies that were last run before fingerprints were noted do not count.

    Args:
        study: The new study.
        config: Its config; `presets.earlier` is the most that is queued.
        fingerprint: Of its model.
        storage: Where the new study and the earlier ones are.
    """
    if NOTE in study.user_attrs or study.user_attrs.get(FINGERPRINT, fingerprint) != fingerprint:
        return
    is_new = FINGERPRINT not in study.user_attrs and not any(
        t.state.is_finished() for t in study.get_trials(deepcopy=False)
    )
    study.set_user_attr(FINGERPRINT, fingerprint)
    if not is_new:
        return
    num_steps, space = config.workload.settings.num_steps, config.valid_space
    known = {
        digest(suggest(FixedTrial(preset_params(space, p.name)), space, num_steps=num_steps)) for p in space.presets
    }
    queued: list[str] = []
    for other, row, params in _candidates(study.study_name, config, fingerprint, storage):
        if len(queued) == config.presets.earlier:
            break
        point = _meant(params, space, num_steps)
        if point is not None and digest(point) not in known:
            known.add(digest(point))
            queued.append(f"trial {row.number} of {other}")
            study.enqueue_trial(params, user_attrs={"preset": queued[-1]})
    study.set_user_attr(NOTE, queued)


def earlier_note(attributes: Mapping[str, Any]) -> str | None:
    """Return in one sentence what was queued from earlier studies by a study's attributes, None if nothing was."""
    queued = attributes.get(NOTE)
    return f"queued from earlier studies on this model: {', '.join(queued)}" if queued else None


def _candidates(
    own_name: str, config: StudyConfig, fingerprint: str, storage: BaseStorage
) -> Iterator[tuple[str, TrialRow, dict[str, object]]]:
    """Yield name, trial and parameters of what earlier studies offer and this space can hold, best first."""
    summaries = optuna.get_all_study_summaries(storage=storage)
    for summary in sorted(summaries, key=_started, reverse=True):
        attributes = summary.user_attrs
        if summary.study_name == own_name or attributes.get(FINGERPRINT) != fingerprint:
            continue
        earlier = optuna.load_study(study_name=summary.study_name, storage=storage)
        try:
            overview = read_overview(earlier)
        except StoreError:
            continue
        if overview.config.target != config.target:
            continue
        trials = earlier.get_trials(deepcopy=False)
        num_steps = overview.config.workload.settings.num_steps
        for row in sorted(overview.front, key=lambda row: not row.picks):
            params = dict(trials[row.number].params)
            if row.config is not None and _meant(params, config.valid_space, num_steps) == row.config:
                yield summary.study_name, row, params


def _started(summary: optuna.study.StudySummary) -> float:
    return 0.0 if summary.datetime_start is None else summary.datetime_start.timestamp()


def _meant(params: dict[str, object], space: SearchSpace, num_steps: int) -> QuantConfig | None:
    """Return the config that parameters stand for in a space; None if the space does not hold them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # so Optuna says that a value is out of a parameter's range
        try:
            return suggest(FixedTrial(params), space, num_steps=num_steps)
        except (ValueError, KeyError, UserWarning):
            return None
