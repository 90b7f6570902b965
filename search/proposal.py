"""Which config a trial evaluates, and whether somebody evaluated it before.

The config stands in the trial's user attribute "config", whoever chose it: the sampler, a preset or a hand-written
file. Its digest decides what is equal. An equal evaluated trial answers at once; an equal trial that another slot has
in hand is waited for, because running it twice would cost more.
"""

import time
from collections.abc import Callable

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hyquant.config import QuantConfig, digest
from search.lean import CONFIG
from search.pauses import Pauses
from search.study import StudyConfig
from search.trials import find_record
from spaces.suggest import preset_params, suggest

HOLDS = "config_digest"
_FIRST_PAUSE_S = 0.5


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


def take(study: optuna.Study, number: int) -> optuna.Trial | None:
    """Begin one waiting trial, whatever waits before it, as `study.ask` begins the first; None if others have it."""
    trial_id = study.get_trials(deepcopy=False)[number]._trial_id
    try:
        is_taken = study._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
    except UpdateFinishedTrialError:
        return None
    return optuna.Trial(study, trial_id) if is_taken else None


def choose_config(trial: optuna.Trial, config: StudyConfig) -> QuantConfig:
    """Return what a trial evaluates: its hand-written config, or a point of the study's space."""
    handwritten = trial.user_attrs.get("handwritten")
    if handwritten is not None:
        return QuantConfig.model_validate(handwritten)
    return suggest(trial, config.valid_space, num_steps=config.workload.settings.num_steps)


def claim(trial: optuna.Trial, config: QuantConfig, *, while_waiting: Callable[[], None]) -> FrozenTrial | None:
    """Write a trial's config into it, and return the evaluated trial of an equal config if there is one.

    If another trial with an equal config is running, it is waited for: its record then answers, or, if it failed, this
    trial evaluates the config itself. That holds between hosts too, because only the storage is used: a trial writes
    the digest (it *holds* the config), and reads all trials after that. Of two that hold the same, the one that wrote
    later sees the other. A higher number lets go, at once or when it sees a lower one come, and waits; the lowest one
    keeps its hold and waits until the others have let go, or have finished because they read before it wrote.

    Args:
        trial: The running trial.
        config: What it chose.
        while_waiting: Called at every look while waiting.
    """
    key = digest(config)
    trial.set_user_attr(CONFIG, config.model_dump(mode="json"))

    def look() -> tuple[FrozenTrial | None, list[int]]:
        trials = trial.study.get_trials(deepcopy=False)
        return find_record(trials, key), _holders(trials, key, trial.number)

    is_holding, pauses = False, Pauses(_FIRST_PAUSE_S)
    while True:
        record, others = look()
        if not is_holding and (record is not None or all(other > trial.number for other in others)):
            trial.set_user_attr(HOLDS, key)
            is_holding = True
            record, others = look()
        if is_holding and (record is not None or not others):
            return record
        if is_holding and min(others) < trial.number:
            trial.set_user_attr(HOLDS, None)
            is_holding = False
        while_waiting()
        time.sleep(pauses.next_s())


def _holders(trials: list[FrozenTrial], key: str, number: int) -> list[int]:
    """Return the numbers of other running trials that hold a config."""
    running = (trial for trial in trials if trial.state == TrialState.RUNNING and trial.number != number)
    return [trial.number for trial in running if trial.user_attrs.get(HOLDS) == key]
