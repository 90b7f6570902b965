"""What a stored trial is in our words; Optuna's states, attributes and constraints read in one place.

    complete    COMPLETE with objective values          infeasible  PRUNED, a constraint is violated
    stopped     PRUNED, a member of the front beat it   reused      answered from the record of an equal config
    failed      FAIL                                    running, waiting as in Optuna

Complete, infeasible and stopped trials are *evaluated*: they cost a rendering and count towards the budget.
"""

from collections.abc import Iterable, Sequence
from operator import mul
from typing import Literal, TypeVar

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hyquant.config import FrozenModel, QuantConfig
from search.confirmation import confirmations
from search.lean import CONFIG, RESULT, inflated
from search.result import TrialResult
from search.retry import may_retry
from search.rungs import Scored
from search.scoring import measured_figures
from search.stored import read_stored
from spaces.strategy import FLOAT, strategy_of

Stored = TypeVar("Stored", bound=FrozenModel)
State = Literal["complete", "infeasible", "stopped", "failed", "running", "waiting", "reused"]

EVALUATED: tuple[State, ...] = ("complete", "infeasible", "stopped")
STATES: tuple[State, ...] = ("complete", "infeasible", "stopped", "failed", "running", "waiting", "reused")
LATENCY_KIND = "latency_kind"
LOST = "its worker was killed or lost"


def trial_state(trial: FrozenTrial) -> State:
    """Return the state of a trial in our words."""
    if trial.state == TrialState.COMPLETE:
        return "complete" if reused_from(trial) is None else "reused"
    if trial.state == TrialState.PRUNED:
        if reused_from(trial) is not None:
            return "reused"
        return "infeasible" if any(value > 0 for value in trial.constraints.values()) else "stopped"
    if trial.state == TrialState.FAIL:
        return "failed"
    return "running" if trial.state == TrialState.RUNNING else "waiting"


def trial_result(trial: FrozenTrial) -> TrialResult | None:
    """Return what a trial found out, or None if it has not finished or failed.

    Raises:
        StoreError: If something else is stored.
    """
    return _attribute(trial, RESULT, TrialResult)


def has_result(trial: FrozenTrial) -> bool:
    """Say whether a trial found something out, without reading what."""
    return trial.user_attrs.get(RESULT) is not None


def store_result(trial: optuna.Trial, result: TrialResult) -> None:
    """Write what a trial found out, as text: all trials are kept in memory, where objects take thrice as much.

    What is asked of every trial again and again, the kind of its latency, stands beside it.
    """
    trial.set_user_attr(LATENCY_KIND, None if result.latency is None else result.latency.kind)
    trial.set_user_attr(RESULT, result.model_dump_json())


def trial_config(trial: FrozenTrial) -> QuantConfig | None:
    """Return the config of a trial, or None before it was chosen.

    Raises:
        StoreError: If something else is stored.
    """
    return _attribute(trial, CONFIG, QuantConfig)


def _attribute(trial: FrozenTrial, name: str, kind: type[Stored]) -> Stored | None:
    stored = inflated(trial.user_attrs.get(name))
    read = kind.model_validate_json if isinstance(stored, str) else kind.model_validate
    return None if stored is None else read_stored(read, stored, f"the {name} of trial {trial.number}")


def trial_reason(trial: FrozenTrial) -> str | None:
    """Return in words why a trial failed, may not win or was not run; None for a complete one."""
    state = trial_state(trial)
    if state == "failed":
        then = "a trial with the same parameters was queued in its place" if may_retry(trial) else "it was its last try"
        return str(trial.user_attrs.get("reason", f"{LOST}; {then}"))
    if state == "reused":
        if tries := trial.user_attrs.get("poisoned"):
            return f"its config ended its worker in trials {', '.join(map(str, tries))}, and is not tried again"
        return f"the same config as trial {reused_from(trial)}"
    result = trial_result(trial)
    return None if result is None else result.reason


def reused_from(trial: FrozenTrial) -> int | None:
    """Return the number of the trial whose record answered this one, if it was not run itself."""
    number = trial.user_attrs.get("reused_from")
    return None if number is None else int(number)


def is_evaluated(trial: FrozenTrial) -> bool:
    """Say whether a trial counts towards the budget."""
    return trial_state(trial) in EVALUATED


def count_states(trials: optuna.Study | Iterable[FrozenTrial]) -> dict[str, int]:
    """Return how many trials of a study are in each state."""
    found = trials.get_trials(deepcopy=False) if isinstance(trials, optuna.Study) else trials
    states = [trial_state(trial) for trial in found]
    return {state: states.count(state) for state in STATES}


def unfinished(trials: Iterable[FrozenTrial]) -> tuple[int, ...]:
    """Return the numbers of the trials that wait or run."""
    return tuple(trial.number for trial in trials if not trial.state.is_finished())


def num_evaluated(counts: dict[str, int]) -> int:
    """Return how many trials count towards the budget."""
    return sum(counts[state] for state in EVALUATED)


def front(study: optuna.Study) -> list[FrozenTrial]:
    """Return the complete trials that no other dominates, by number; each config once.

    Trials that broke a bound or failed when they were measured again are no members. Values of different seeds are not
    compared: trials are held against each other by their first values, and those that were measured again also by the
    values of then.
    """
    again = confirmations(study)
    signs = [1.0 if direction == StudyDirection.MINIMIZE else -1.0 for direction in study.directions]
    holding = [trial for trial in competitors(study) if trial.number not in again or again[trial.number].values]
    first = {trial.number: tuple(map(mul, signs, trial.values)) for trial in holding}
    members = [trial for trial in holding if not is_dominated(first[trial.number], first.values())]
    second = {t.number: tuple(map(mul, signs, again[t.number].values or ())) for t in members if t.number in again}
    return [t for t in members if t.number not in second or not is_dominated(second[t.number], second.values())]


def competitors(study: optuna.Study) -> list[FrozenTrial]:
    """Return the complete trials of a study whose values are comparable."""
    stored = study.user_attrs.get("study_config", {}).get("objectives", ())
    return comparable(study.get_trials(deepcopy=False), [objective["metric"] for objective in stored])


def comparable(trials: Iterable[FrozenTrial], objectives: Iterable[str]) -> list[FrozenTrial]:
    """Return the complete trials whose values are comparable, by the metrics of the objectives.

    Where latency is an objective, trials whose latency is simulated compete only if there is no native one: the seconds
    of float arithmetic and those of integer kernels are not the same quantity. A trial of the float model runs neither,
    and competes with both.
    """
    complete = [trial for trial in trials if trial_state(trial) == "complete"]
    if any(metric.startswith("latency") for metric in objectives):
        others = [trial for trial in complete if not is_simulated(trial)]
        complete = complete if all(map(is_float, others)) else others
    return complete


def scored_front(study: optuna.Study) -> list[Scored]:
    """Return the members of the front with all that a trial under way is held against."""
    found = []
    for trial in front(study):
        result = trial_result(trial)
        if result is not None:
            figures = measured_figures(result.latency, result.weight_bytes, result.peak_memory_bytes or 0)
            found.append(Scored(trial.number, result.metrics, figures, result.latency_kind, result.timed_on))
    return found


def is_simulated(trial: FrozenTrial) -> bool:
    """Say whether a trial's latency is that of float arithmetic standing in for integer kernels."""
    if LATENCY_KIND in trial.user_attrs:
        return bool(trial.user_attrs[LATENCY_KIND] == "simulated")
    result = trial_result(trial)  # of a version that did not write the kind by itself
    return result is not None and result.latency is not None and result.latency.kind == "simulated"


def is_float(trial: FrozenTrial) -> bool:
    """Say whether a trial is one of the float model itself, which has no kernels to be native or simulated."""
    config = trial_config(trial)
    return config is not None and strategy_of(config) == FLOAT


def is_dominated(own: tuple[float, ...], others: Iterable[tuple[float, ...]]) -> bool:
    """Say whether another is nowhere worse and somewhere better; losses are minimized."""
    return any(own != other and all(a <= b for a, b in zip(other, own, strict=True)) for other in others)


def find_record(trials: Sequence[FrozenTrial], config_digest: str) -> FrozenTrial | None:
    """Return the evaluated trial of an equal config, if there is one."""
    return next((t for t in trials if t.user_attrs.get("config_digest") == config_digest and is_evaluated(t)), None)


def trailing(trials: Sequence[FrozenTrial], state: State) -> int:
    """Return how many of the last finished trials in a row are in a state."""
    count = 0
    for trial in reversed([trial for trial in trials if trial.state.is_finished()]):
        if trial_state(trial) != state:
            break
        count += 1
    return count
