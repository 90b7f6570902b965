"""A storage whose database goes away: what was committed before the answer was lost is not done twice."""

import random
from functools import partial

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from search.databases import open_storage, with_driver
from search.errors import InstallError, StoreError
from search.patience import FIRST_PATIENCE_S, PATIENCE_S, Patience, PatientStorage, is_away
from search.retry import queue_again


def gone(text="server closed the connection"):
    return sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception(text))


class Flaky(InMemoryStorage):
    """A database that fails a share of its calls, half of them before the work is done and half of them after it."""

    def __init__(self, seed, share=0.3):
        super().__init__()
        self.draw = random.Random(seed)
        self.share = share

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if not name.startswith(("set_", "get_", "create_")) or name == "get_trial_id_from_study_id_trial_number":
            return found

        def call(*arguments, **named):
            lot = self.draw.random()
            if lot < self.share / 2:
                raise gone()
            answer = found(*arguments, **named)
            if lot < self.share:
                raise gone()
            return answer

        return call


class Time:
    """A clock that goes on only by sleeping."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds


def patient(backend):
    time = Time()
    storage = PatientStorage(backend, Patience(clock=lambda: time.now, sleep=time.sleep))
    share, backend.share = backend.share, 0.0
    storage.get_all_studies()  # it has answered once, so it is waited for from now on
    backend.share = share
    return storage, time


@pytest.mark.parametrize("seed", range(5))
def test_a_study_over_a_flaky_database_equals_one_over_a_sound_database(seed):
    backend = Flaky(seed)
    storage, _ = patient(backend)
    study = optuna.create_study(
        storage=storage, study_name="x", load_if_exists=True, sampler=optuna.samplers.RandomSampler(seed)
    )
    sound = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))

    for each in (study, sound):
        for _ in range(20):
            trial = each.ask()
            trial.set_user_attr("x", trial.suggest_float("x", 0, 1))
            each.tell(trial, trial.params["x"])
        each.add_trial(optuna.create_trial(state=TrialState.WAITING))
    backend.share = 0.0

    def told(trials):
        return [(t.number, t.state, t.params, t.values, t.user_attrs.get("x")) for t in trials]

    assert told(study.trials) == told(sound.trials)


def test_a_lost_trial_is_queued_again_once_although_answers_are_lost():
    backend = Flaky(3, share=0.6)
    storage, _ = patient(backend)
    study = optuna.create_study(storage=storage, study_name="x", load_if_exists=True)
    for _ in range(10):
        trial = study.ask()
        study.tell(trial.number, state=TrialState.FAIL)
        queue_again(study, study.trials[trial.number])
    backend.share = 0.0

    waiting = [trial.system_attrs["failed_trial"] for trial in study.trials if trial.state == TrialState.WAITING]
    assert len(waiting) == len(set(waiting))
    assert sum(trial.state == TrialState.FAIL for trial in study.trials) == 10


def test_what_somebody_else_finished_is_not_taken_for_ones_own():
    """The connection breaks while an observer fails the trial: its worker must not believe that it told its result."""
    backend = Flaky(0, share=0.0)
    storage, _ = patient(backend)
    study = optuna.create_study(storage=storage, study_name="x", load_if_exists=True)
    observer = PatientStorage(backend)

    def break_off_while_the_observer_acts(observed, trial_id, state, values):
        del backend.set_trial_state_values
        observer.set_trial_state_values(trial_id, observed)
        raise gone()

    for observed in (TrialState.FAIL, TrialState.COMPLETE):
        trial = study.ask()
        backend.set_trial_state_values = partial(break_off_while_the_observer_acts, observed)
        with pytest.raises(UpdateFinishedTrialError):
            storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])


def test_patience_ends_with_one_sentence_and_is_short_after_that():
    backend = Flaky(0, share=0.0)
    storage, time = patient(backend)
    backend.share = 1.0

    with pytest.raises(StoreError, match=r"did not for 30\d s: server closed the connection; see that it runs"):
        storage.get_all_studies()
    waited_s = time.now
    with pytest.raises(StoreError):
        storage.get_all_studies()

    assert PATIENCE_S <= waited_s < PATIENCE_S + 10
    assert time.now == waited_s


STARTING = "connection failed: FATAL:  the database system is starting up"


@pytest.mark.parametrize(
    ("words", "is_known", "limit_s"),
    [
        ('connection failed: FATAL:  password authentication failed for user "u"', False, 0.0),
        ("failed to resolve host 'no.such.host': [Errno -2] Name or service not known", False, 0.0),
        ("(1049, \"Unknown database 'nodb'\")", False, 0.0),
        ("connection failed: Connection refused", False, FIRST_PATIENCE_S),
        (STARTING, False, PATIENCE_S),
        ("FATAL:  the database system is not yet accepting connections", False, PATIENCE_S),
        ("failed to resolve host 'db': [Errno -3] Temporary failure in name resolution", True, PATIENCE_S),
        ("connection failed: Connection refused", True, PATIENCE_S),
    ],
)
def test_a_database_that_has_not_answered_is_waited_for_by_what_it_says(words, is_known, limit_s):
    time = Time()
    patience = Patience(is_known=is_known, clock=lambda: time.now, sleep=time.sleep)

    def refuse():
        raise gone(words)

    with pytest.raises(StoreError, match="must answer"):
        patience.call(refuse)
    assert limit_s <= time.now < limit_s + 9


def test_a_database_is_opened_when_it_has_started():
    time = Time()
    says = iter([STARTING] * 8)

    def open_it():
        if (words := next(says, None)) is not None:
            raise gone(words)
        return "open"

    assert Patience(clock=lambda: time.now, sleep=time.sleep).call(open_it) == "open"
    assert time.now > FIRST_PATIENCE_S


def test_what_a_database_says_about_a_mistake_is_not_repeated():
    mistakes = [
        sqlalchemy.exc.ProgrammingError("SELECT x", {}, Exception("no such column")),
        sqlalchemy.exc.DataError("INSERT", {}, Exception("Data too long")),
        KeyError("no such trial"),
    ]

    assert not any(map(is_away, mistakes))
    assert is_away(gone())
    assert is_away(sqlalchemy.exc.PendingRollbackError("Can't reconnect until invalid transaction is rolled back."))


def test_addresses_get_the_drivers_that_we_install():
    assert with_driver("postgresql://u@h/d") == "postgresql+psycopg://u@h/d"
    assert with_driver("mariadb://h/d") == with_driver("mysql://h/d") == "mysql+pymysql://h/d"
    assert with_driver("postgresql+psycopg2://h/d") == "postgresql+psycopg2://h/d"


@pytest.mark.parametrize(
    ("url", "kind", "words"),
    [
        ("postgresql+asyncdb://u:secret@h/d", StoreError, "must be an address"),
        ("postgresql+psycopg2://u:secret@h/d", InstallError, "hyq-search\\[servers\\]"),
        ("no address", StoreError, "a storage must be postgresql:"),
        ("grpc://127.0.0.1", StoreError, "must be grpc://HOST:PORT"),
        ("grpc://127.0.0.1:1", StoreError, "start it with `hyq-search storage-proxy`"),
    ],
)
def test_an_address_that_cannot_be_opened_is_one_sentence_without_its_password(tmp_path, url, kind, words, monkeypatch):
    monkeypatch.setattr("search.databases.CONNECT_TIMEOUT_S", 1)

    with pytest.raises(kind, match=words) as caught:
        open_storage(tmp_path, url=url)

    assert "secret" not in str(caught.value)


def test_sqlite_on_a_full_disk_is_waited_for():
    """A real SQLite that may not grow: its own words for a full disk."""
    engine = sqlalchemy.create_engine("sqlite://")
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 2")
        connection.exec_driver_sql("CREATE TABLE first (a)")
        with pytest.raises(sqlalchemy.exc.OperationalError, match="full") as caught:
            connection.exec_driver_sql("CREATE TABLE second (a)")
    assert is_away(caught.value)
    with engine.connect() as connection, pytest.raises(sqlalchemy.exc.OperationalError) as caught:
        connection.exec_driver_sql("SELECT * FROM nothing")
    assert not is_away(caught.value)
