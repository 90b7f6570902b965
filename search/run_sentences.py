"""What a run says about trials and the study: one line each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna

from search.confirmation import Confirmation, confirmations_among
from search.earlier import earlier_note
from search.readable import readable
from search.retry import queued_again
from search.study import StudyConfig
from search.trials import trial_reason, trial_state


def trial_sentence(trial: optuna.trial.FrozenTrial, config: StudyConfig) -> str:
    """Return one line on a finished trial."""
    state, reason = trial_state(trial), trial_reason(trial)
    names = [objective.metric for objective in config.objectives]
    values = ", ".join(f"{name} {readable(value)}" for name, value in zip(names, trial.values or (), strict=False))
    return f"trial {trial.number} {state}" + (f": {values}" if values else "") + (f": {reason}" if reason else "")


def study_notes(attributes: Mapping[str, Any], config: StudyConfig) -> list[str]:
    """Return what workers have to tell about the study as a whole, in its attributes, in order."""
    sentences = [attributes.get("ceiling"), earlier_note(attributes)]
    again = [again_sentence(number, found, config) for number, found in confirmations_among(attributes).items()]
    return [str(sentence) for sentence in (*sentences, *again) if sentence]


def again_sentence(number: int, confirmation: Confirmation, config: StudyConfig) -> str:
    """Return one line on a member of the front that was measured again."""
    names = [objective.metric for objective in config.objectives]
    values = ", ".join(
        f"{name} {readable(value)}" for name, value in zip(names, confirmation.values or (), strict=False)
    )
    return f"trial {number} measured again: {values}" if values else f"trial {number} {confirmation.reason}"


def lost_in_words(trials: Iterable[optuna.trial.FrozenTrial], numbers: Sequence[int]) -> str:
    """Return what became of trials that were lost: "trial 3 was lost with a worker, queued again".

    Args:
        trials: All trials of the study, read after the lost ones were taken back.
        numbers: Those that were lost, at least one.
    """
    known = queued_again(trials)
    queued, given_up = [n for n in numbers if n in known], [n for n in numbers if n not in known]
    sentences = [f"{numbers_in_words(queued)} lost with a worker, queued again"] if queued else []
    if given_up:
        sentences.append(f"{numbers_in_words(given_up)} lost with a worker, not tried again")
    return "; ".join(sentences)


def numbers_in_words(numbers: Sequence[int]) -> str:
    """Return "trial 3 was" or "trials 3, 4 were"."""
    return f"trial{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))} {'were' if len(numbers) > 1 else 'was'}"
