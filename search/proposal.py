"""Which config a trial evaluates, and whether somebody evaluated it before.

The config stands in the trial's user attribute "config", whoever chose it: the sampler, a preset or a hand-written
file. Its digest decides what is equal. An equal evaluated trial answers at once; an equal trial that another slot has
in hand is waited for, because running it twice would cost more.
"""

import time
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from hyquant.config import QuantConfig, digest
from search.locks import FileLock
from search.study import StudyConfig
from search.trials import find_record
from spaces.suggest import preset_params, suggest

_POLL_S = 0.5


def enqueue_presets(study: optuna.Study, config: StudyConfig) -> int:
    """Queue the presets of the study's space, once in its life; return how many were added."""
    if study.user_attrs.get("presets_enqueued"):
        return 0
    space = config.valid_space
    for preset in space.presets:
        params = preset_params(space, preset.name)
        study.enqueue_trial(params, user_attrs={"preset": preset.name}, skip_if_exists=True)
    study.set_user_attr("presets_enqueued", True)
    return len(space.presets)


def enqueue_point(study: optuna.Study, config: QuantConfig) -> int:
    """Queue one hand-written config and return its trial's number; it has no parameters, so samplers pass it over."""
    trial = optuna.create_trial(
        state=TrialState.WAITING, user_attrs={"handwritten": config.model_dump(mode="json"), "token": time.time_ns()}
    )
    study.add_trial(trial)
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return next(t.number for t in waiting if t.user_attrs.get("token") == trial.user_attrs["token"])


def choose_config(trial: optuna.Trial, config: StudyConfig) -> QuantConfig:
    """Return what a trial evaluates: its hand-written config, or a point of the study's space."""
    handwritten = trial.user_attrs.get("handwritten")
    if handwritten is not None:
        return QuantConfig.model_validate(handwritten)
    return suggest(trial, config.valid_space, num_steps=config.workload.settings.num_steps)


def claim(
    trial: optuna.Trial, config: QuantConfig, lock_path: Path, *, while_waiting: Callable[[], None]
) -> FrozenTrial | None:
    """Write a trial's config into it, and return the evaluated trial of an equal config if there is one.

    If another trial with an equal config is running, it is waited for: its record then answers, or, if it failed, this
    trial evaluates the config itself. Reading and writing happen under a lock of this host; two hosts may in rare cases
    evaluate one config twice.

    Args:
        trial: The running trial.
        config: What it chose.
        lock_path: File lock shared by the workers of the study.
        while_waiting: Called about twice a second while waiting.
    """
    key = digest(config)
    trial.set_user_attr("config", config.model_dump(mode="json"))
    while True:
        with FileLock(lock_path).held():
            trials = trial.study.get_trials(deepcopy=False)
            record = find_record(trials, key)
            if record is not None or not _is_claimed_elsewhere(trials, key, trial.number):
                trial.set_user_attr("config_digest", key)
                return record
        while_waiting()
        time.sleep(_POLL_S)


def _is_claimed_elsewhere(trials: list[FrozenTrial], key: str, number: int) -> bool:
    """Say whether another running trial holds the config; only the holder has the digest among its attributes."""
    return any(
        trial.state == TrialState.RUNNING and trial.number != number and trial.user_attrs.get("config_digest") == key
        for trial in trials
    )
