"""What measuring a member of the front again has shown, and where that is stored.

The best of many noisy trials is in part a lucky one. When the budget is used, members of the front are therefore
rendered from fresh noise and timed once more (`search.confirming`), and picks go by these values alone. A finished
trial of Optuna cannot be changed, so they stand among the study's own attributes, one per trial: "confirmed:12".
"""

from collections.abc import Iterable, Mapping
from typing import Any

import optuna

from hyquant.config import FrozenModel
from search.poison import MAX_TRIES
from search.result import TrialResult

_PREFIX, _ENDED = "confirmed:", "confirming_ended:"


class Confirmation(FrozenModel):
    """A member of the front measured again.

    Attributes:
        result: What a whole trial with fresh seeds found out; None if it failed.
        float_scores: Means of the metrics of the float videos of these seeds, for those that read no reference.
        failure: Why there is no result.
    """

    result: TrialResult | None
    float_scores: Mapping[str, float] = {}
    failure: str | None = None

    @property
    def values(self) -> tuple[float, ...] | None:
        """Return the values of the objectives; None if the config does not hold what it promised."""
        return None if self.result is None else self.result.values

    @property
    def reason(self) -> str | None:
        """Return why the config is no longer offered; None if it holds."""
        if self.values is not None:
            return None
        why = self.failure if self.result is None else self.result.reason
        return f"measured again with fresh seeds: {why}"


def confirmations(study: optuna.Study) -> dict[int, Confirmation]:
    """Return what was measured again, by number of the trial."""
    return confirmations_among(study.user_attrs)


def confirmations_among(attributes: Mapping[str, Any]) -> dict[int, Confirmation]:
    """Return what was measured again by what stands among a study's own attributes."""
    return {number: Confirmation.model_validate(attributes[f"{_PREFIX}{number}"]) for number in confirmed(attributes)}


def confirmed(attributes: Iterable[str]) -> list[int]:
    """Return which trials were measured again by the names of a study's own attributes."""
    return [int(key.removeprefix(_PREFIX)) for key in attributes if key.startswith(_PREFIX)]


def note_ended_worker(study: optuna.Study, number: int, who: str) -> None:
    """Note that a worker ended while it measured a member again; of one that ended two this is what is found out.

    Args:
        study: The study.
        number: The member.
        who: Names the worker.
    """
    study.set_user_attr(f"{_ENDED}{number}:{who}", True)
    tries = sum(key.startswith(f"{_ENDED}{number}:") for key in study.user_attrs)
    if tries >= MAX_TRIES and number not in confirmations(study):
        store_confirmation(study, number, Confirmation(result=None, failure=f"its worker ended {tries} times"))


def store_confirmation(study: optuna.Study, number: int, confirmation: Confirmation) -> None:
    """Keep what measuring a trial again has shown."""
    study.set_user_attr(f"{_PREFIX}{number}", confirmation.model_dump(mode="json"))
