"""How much each search parameter decides about each objective.

A parameter matters if the best tenth of the trials uses other values of it than all trials do.

Source: PED-ANOVA (arXiv:2304.10255) in its conditional form (arXiv:2601.20800), as Optuna implements it.
"""

import warnings

import optuna
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from search.study import Objective

MIN_TRIALS = 10
"""Below this many complete trials the best tenth is one trial, and shares mean nothing."""


def importances(study: optuna.Study, objectives: tuple[Objective, ...]) -> dict[str, dict[str, float]]:
    """Return each parameter's share by objective; they add up to 1.

    With fewer than `MIN_TRIALS` complete trials there is nothing to say: {}.
    """
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < MIN_TRIALS:
        return {}
    found: dict[str, dict[str, float]] = {}
    for index, objective in enumerate(objectives):
        sign = -1.0 if objective.direction == "maximize" else 1.0

        def loss(trial: FrozenTrial, index: int = index, sign: float = sign) -> float:
            return sign * float(trial.values[index])

        with warnings.catch_warnings():
            # Optuna warns that it minimizes (we negate) and that a conditional parameter was seen seldom.
            warnings.simplefilter("ignore", UserWarning)
            found[objective.metric] = get_param_importances(study, target=loss)
    return found
