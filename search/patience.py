"""A storage that waits for a database that is away: it tries again for some minutes, and nothing is done twice.

A database is restarted, a network is cut for a minute, SQLite is locked: none of that is a reason to lose a trial. An
operation that failed for such a reason is repeated with growing, jittered pauses until `PATIENCE_S` are over; then a
`StoreError` says so, and later calls try once. How long is waited for a database that has not answered yet depends on
what it says:

    it is starting or recovering                      `PATIENCE_S`, for it will answer
    it refuses the user, has no such name, no such host     not at all: the address is wrong
    nobody listens, or nothing comes back             `FIRST_PATIENCE_S`, a restart; the address may be wrong

A slot is told by its order that the study is there, so its database counts as one that has answered.

The answer to a write may be lost after the write was made. Repeating it is harmless for attributes, parameters and
values. Two operations are not repeatable by nature and are recognised instead:

    create_new_trial            the new trial carries a token, which is looked for before a second attempt
    set_trial_state_values      a trial that is finished as we wanted it, with our mark in it, was finished by us

A waiting trial that was popped without our hearing of it stays without a lease, and is queued again by whoever sees
that (`search.lease`).
"""

import logging
import random
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from search.errors import StoreError
from search.redaction import redacted

logger = logging.getLogger(__name__)

_SQLITE_PASSES = ("locked", "busy", "full", "disk I/O error")

PATIENCE_S = 300.0
FIRST_PATIENCE_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CREATED_BY, FINISHED_BY = "created_by", "finished_by"

_STARTING = ("starting up", "not yet accepting connections", "shutting down", "in recovery mode", "server shutdown")
"""What PostgreSQL says with SQLSTATE 57P03, which its client library does not pass on, and MySQL with error 1053."""
_REFUSED = (
    *("authentication failed", "no password supplied", "no pg_hba.conf entry", "does not exist", "failed to resolve"),
    *("access denied", "unknown database", "name or service not known"),
)
"""What servers and resolvers say about a wrong user, password, name of a database, or host."""

_Answer = TypeVar("_Answer")


def database_errors() -> tuple[type[Exception], ...]:
    """Return what storages raise of their own; gRPC's error only if anything has imported it, else none can come."""
    grpc = sys.modules.get("grpc")
    rpc: tuple[type[Exception], ...] = () if grpc is None else (grpc.RpcError,)
    return (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, *rpc)


def is_away(error: BaseException) -> bool:
    """Say whether an error means that a database cannot be reached or is busy, so that trying again may help."""
    if isinstance(error, StorageInternalError):
        return error.__cause__ is not None and is_away(error.__cause__)
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        if isinstance(error.orig, sqlite3.Error):
            return any(word in str(error.orig) for word in _SQLITE_PASSES)
        families = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)
        return error.connection_invalidated or isinstance(error, families)
    # A session goes on being used after its connection broke where Optuna reads trials and tries a slower query.
    if isinstance(error, sqlalchemy.exc.TimeoutError | sqlalchemy.exc.PendingRollbackError):
        return True
    grpc = sys.modules.get("grpc")
    if grpc is not None and isinstance(error, grpc.RpcError):
        return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return False


def first_line(error: BaseException) -> str:
    """Return what a database said, in one line and without passwords."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error
    details = cause.details() if hasattr(cause, "details") else None
    text = str(details or getattr(cause, "orig", None) or cause).strip() or type(cause).__name__
    return redacted(text.splitlines()[0])


class Patience:
    """How long one process waits for one database.

    Args:
        is_known: Whether the database has answered before, another process of the same work.
        patience_s: For how long one operation is tried again.
        clock: Monotonic seconds.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        *,
        is_known: bool = False,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._sleep = sleep
        self._limit_s: float | None = patience_s if is_known else None

    def call(self, do: Callable[[], _Answer], again: Callable[[], _Answer] | None = None) -> _Answer:
        """Do something until the database answers; `again` replaces it from the second attempt on.

        Raises:
            StoreError: If it did not answer for too long; the next call tries once.
        """
        started, pause_s = self._clock(), FIRST_PAUSE_S
        while True:
            try:
                answer = do()
            except database_errors() as error:
                if not is_away(error):
                    raise
                waited_s = self._clock() - started
                if waited_s >= self._limit_of(error):
                    self._limit_s = 0.0
                    raise StoreError(
                        f"the study's database must answer, but it did not for {waited_s:.0f} s: {first_line(error)}; "
                        f"see that it runs and is reachable, then start this command again"
                    ) from error
                if pause_s in (FIRST_PAUSE_S, LONGEST_PAUSE_S):
                    logger.warning("waiting for the study's database: %s", first_line(error))
                self._sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                do = again or do
            else:
                self._limit_s = self._patience_s
                return answer

    def _limit_of(self, error: BaseException) -> float:
        if self._limit_s is not None:
            return self._limit_s
        words = first_line(error).lower()
        if any(starting in words for starting in _STARTING):
            return self._patience_s
        return 0.0 if any(refused in words for refused in _REFUSED) else FIRST_PATIENCE_S


class PatientStorage(BaseStorage):
    """Optuna's storage interface over another storage, with patience.

    Args:
        backend: The storage that does the work.
        patience: What is known of its database; None is nothing yet.
    """

    def __init__(self, backend: BaseStorage, patience: Patience | None = None) -> None:
        self._backend = backend
        self._patiently = (patience or Patience()).call

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial exactly once."""
        token = uuid.uuid4().hex
        draft = optuna.create_trial(state=TrialState.RUNNING) if template_trial is None else template_trial
        attributes = {**draft.user_attrs, CREATED_BY: token}
        marked = optuna.create_trial(
            state=draft.state,
            values=draft.values,
            params=draft.params,
            distributions=draft.distributions,
            user_attrs=attributes,
            system_attrs=draft.system_attrs,
            intermediate_values=draft.intermediate_values,
        )
        marked.datetime_start, marked.datetime_complete = draft.datetime_start, draft.datetime_complete

        def create() -> int:
            return self._backend.create_new_trial(study_id, marked)

        def create_unless_there() -> int:
            trials = self._backend.get_all_trials(study_id, deepcopy=False)
            found = (trial._trial_id for trial in reversed(trials) if trial.user_attrs.get(CREATED_BY) == token)
            number = next(found, None)
            return create() if number is None else number

        return self._patiently(create, create_unless_there)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Change a trial's state exactly once; a finished state carries a mark of who finished it."""
        token = uuid.uuid4().hex
        if state.is_finished():
            self.set_trial_user_attr(trial_id, FINISHED_BY, token)

        def change() -> bool:
            return self._backend.set_trial_state_values(trial_id, state, values)

        def change_unless_done() -> bool:
            try:
                return change()
            except UpdateFinishedTrialError:
                found = self._backend.get_trial(trial_id)
                if found.state != state or found.user_attrs.get(FINISHED_BY) != token:
                    raise
                return True

        return self._patiently(change, change_unless_done)

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """Delegate; a study that is there already is opened by Optuna."""
        return self._patiently(lambda: self._backend.create_new_study(directions, study_name))

    def delete_study(self, study_id: int) -> None:
        """Delegate."""
        self._patiently(lambda: self._backend.delete_study(study_id))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Delegate."""
        self._patiently(lambda: self._backend.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Delegate."""
        self._patiently(lambda: self._backend.set_study_system_attr(study_id, key, value))

    def get_study_id_from_name(self, study_name: str) -> int:
        """Delegate."""
        return self._patiently(lambda: self._backend.get_study_id_from_name(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        """Delegate."""
        return self._patiently(lambda: self._backend.get_study_name_from_id(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Delegate."""
        return self._patiently(lambda: self._backend.get_study_directions(study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Delegate."""
        return self._patiently(lambda: self._backend.get_study_user_attrs(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Delegate."""
        return self._patiently(lambda: self._backend.get_study_system_attrs(study_id))

    def get_all_studies(self) -> list[FrozenStudy]:
        """Delegate."""
        return self._patiently(self._backend.get_all_studies)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Delegate."""
        self._patiently(lambda: self._backend.set_trial_param(trial_id, param_name, param_value_internal, distribution))

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Delegate."""
        self._patiently(lambda: self._backend.set_trial_intermediate_value(trial_id, step, intermediate_value))

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Delegate."""
        self._patiently(lambda: self._backend.set_trial_user_attr(trial_id, key, value))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Delegate."""
        self._patiently(lambda: self._backend.set_trial_system_attr(trial_id, key, value))

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """Delegate."""
        return self._patiently(lambda: self._backend.get_trial_id_from_study_id_trial_number(study_id, trial_number))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Delegate."""
        return self._patiently(lambda: self._backend.get_trial(trial_id))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Delegate."""
        return self._patiently(lambda: self._backend.get_all_trials(study_id, deepcopy, states))

    def remove_session(self) -> None:
        """Delegate."""
        self._backend.remove_session()
