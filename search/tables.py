"""Optuna's tables, with trials that are created exactly once even where Optuna itself repeats.

Optuna repeats the creation of a trial up to five times by itself, on any error of the database, also on one that came
after the commit: a server that is stopped at that moment would leave a second, empty trial. Here a repetition looks for
the trial's token first, in the same transaction, in which the study's row is locked.

Finished trials are read lean (`search.lean`), because Optuna keeps all of them in memory.
"""

import json
from typing import Any

from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy.orm import Session

from search.lean import LeanTrials
from search.patience import CREATED_BY


class Tables(RDBStorage):
    """Optuna's storage on a database; a trial with a token (`search.patience`) is there once.

    Args:
        url: Address of the database, with its driver.
        options: What `RDBStorage` takes by name.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._tried: set[str] = set()
        self._lean_trials = LeanTrials()
        super().__init__(url, **options)

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Session
    ) -> models.TrialModel:
        """Make the rows of a trial in a transaction, or find those that an earlier attempt made."""
        token = None if template_trial is None else template_trial.user_attrs.get(CREATED_BY)
        if token in self._tried and (found := _created(session, study_id, token)) is not None:
            return found
        if token is not None:
            self._tried.add(token)
        return super()._get_prepared_new_trial(study_id, template_trial, session)

    def _build_frozen_trial_from_trial_model(self, trial: models.TrialModel) -> FrozenTrial:
        """Make a trial of its rows."""
        return self._lean_trials.lean(super()._build_frozen_trial_from_trial_model(trial))


def _created(session: Session, study_id: int, token: str) -> models.TrialModel | None:
    attribute = models.TrialUserAttributeModel
    marked = session.query(models.TrialModel).join(attribute, attribute.trial_id == models.TrialModel.trial_id)
    return marked.filter(
        models.TrialModel.study_id == study_id, attribute.key == CREATED_BY, attribute.value_json == json.dumps(token)
    ).one_or_none()
