"""One contract for every storage that a study may have: SQLite, PostgreSQL, MariaDB and Optuna's proxy, all real.

Workers are threads that opened the storage each for itself, so that they share connections and caches as little as
processes of two hosts do. Every test has a database of its own name of a study; servers are started once.
"""

import itertools
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from hyquant.config import QuantConfig, W8A8Dynamic
from search.confirmation import confirmations
from search.databases import open_database, open_storage
from search.errors import StoreError
from search.floor_agreement import agreed_floor
from search.lease import GRACE_S, LEASE, LeaseWatch
from search.noise_floor import noise_floor
from search.patience import Patience
from search.poison import poisoned_by
from search.processes import this_worker
from search.prompts import StudyPrompts
from search.proposal import claim, take
from search.proxy import serve
from search.resume import HANDED_BACK, hand_back_trials, queue_forgotten_trials, reclaim_lost_trials
from search.sharing import MemberClaims
from search.storage import create_study, open_study, require_intact, stored_config, stored_floor, stored_prompts
from search.trials import count_states, trial_reason, trial_result
from tests.toys.ports import free_port
from tests.toys.servers import mariadb, postgres

NAMES = (f"study-{index}" for index in itertools.count())
LONG = "a long prompt of 世界 and 🎬, " * 8000  # 240 kB: MySQL's TEXT ends at 64 KiB
SERVERS = {"postgresql": ("initdb", postgres), "mariadb": ("mariadb-install-db", mariadb)}


@pytest.fixture(scope="module", params=["sqlite", "postgresql", "mariadb", "grpc"])
def place(request, tmp_path_factory):
    """The store's folder and the address of a storage that is ready for studies."""
    store = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        if request.param == "sqlite":
            yield store, None
        elif request.param == "grpc":
            port = free_port()
            database = open_database(store, create=True, url=None, patience=Patience())
            server = serve(database, "127.0.0.1", port)
            yield store, f"grpc://127.0.0.1:{port}"
            server.stop(None).wait()
        else:
            binary, start = SERVERS[request.param]
            if shutil.which(binary) is None:
                pytest.skip(f"{binary} is not installed")
            yield store, stack.enter_context(start()).url


@pytest.fixture
def open_again(place, small_study):
    """Open the test's study as another worker would; the first call made it."""
    store, url = place
    config = small_study.model_copy(update={"name": next(NAMES), "storage": url, "store": str(store)})
    create_study(store, config, StudyPrompts(calibration=("a",), search=("b", LONG)), url=url)
    return lambda: open_study(store, config.name, url=url)


def test_a_name_in_capitals_is_another_study_or_is_refused(place, open_again, small_study):
    """MySQL finds the first study by it, and says so nowhere."""
    store, url = place
    name = open_again().study_name.upper()
    config = small_study.model_copy(update={"name": name, "storage": url, "store": str(store)})
    create = partial(create_study, store, config, StudyPrompts(calibration=("a",), search=("b",)), url=url)
    if url is not None and url.startswith("mysql"):
        with pytest.raises(StoreError, match=f"takes {name!r} for {name.lower()!r}"):
            create()
    else:
        study, is_new = create()

        assert (study.study_name, is_new) == (name, True)


def at_once(*calls):
    """Run calls in threads that begin together, and return their answers in order."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_what_a_study_is_comes_back_whole_and_without_its_places(open_again, place, small_study):
    study = open_again()

    require_intact(study)
    expected = small_study.model_copy(update={"name": study.study_name})
    assert stored_config(study) == expected.without_places()
    assert stored_prompts(study).search[1] == LONG
    assert "storage" not in study.user_attrs["study_config"]
    assert str(place[1] or place[0]) not in str(study.user_attrs)


def test_a_long_result_constraints_and_values_come_back_as_they_were_told(open_again, make_result):
    study = open_again()
    result = make_result(reason=LONG)
    trial = study.ask()
    trial.set_user_attr("result", result.model_dump(mode="json"))
    trial.set_constraint("collapsed", 0.25)
    study.tell(trial, (0.1 + 0.2, 1e-9))
    pruned = study.ask()
    pruned.set_constraint("collapsed", 1.0)
    study.tell(pruned, state=TrialState.PRUNED)

    complete, infeasible = open_again().trials

    assert trial_result(complete) == result
    assert complete.values == [0.1 + 0.2, 1e-9]
    assert complete.constraints == {"collapsed": 0.25}
    assert (infeasible.state, infeasible.constraints) == (TrialState.PRUNED, {"collapsed": 1.0})


def test_every_waiting_trial_is_popped_exactly_once(open_again):
    study = open_again()
    for x in range(12):
        study.enqueue_trial({"x": x})
    workers = [open_again() for _ in range(4)]

    popped = at_once(
        *[lambda worker=worker: [worker.ask().suggest_int("x", 0, 99) for _ in range(3)] for worker in workers]
    )

    assert sorted(itertools.chain(*popped)) == list(range(12))


def test_a_waiting_trial_that_is_asked_for_by_number_is_taken_once_and_leaves_those_before_it(open_again):
    study = open_again()
    for x in range(3):
        study.enqueue_trial({"x": x})
    workers = [open_again() for _ in range(4)]

    taken = at_once(*[lambda worker=worker: take(worker, 1) for worker in workers])

    (trial,) = [trial for trial in taken if trial is not None]
    assert trial.suggest_int("x", 0, 99) == 1
    assert [trial.state.name for trial in study.trials] == ["WAITING", "RUNNING", "WAITING"]
    study.tell(1, state=TrialState.FAIL)
    assert take(open_again(), 1) is None


def test_trials_made_at_once_have_numbers_without_a_gap(open_again):
    workers = [open_again() for _ in range(4)]

    at_once(*[lambda worker=worker: [worker.ask() for _ in range(5)] for worker in workers])

    assert [trial.number for trial in open_again().trials] == list(range(20))


def test_a_config_that_two_hosts_choose_at_once_is_evaluated_once(open_again, make_result):
    """Whoever may evaluate writes a result; the others must get that one as their record."""
    config = QuantConfig(linear=W8A8Dynamic())
    evaluated = []

    def work(study):
        trial = study.ask()
        record = claim(trial, config, while_waiting=lambda: None)
        if record is None:
            evaluated.append(trial.number)
            trial.set_user_attr("result", make_result("dynamic").model_dump(mode="json"))
        else:
            trial.set_user_attr("reused_from", record.number)
        study.tell(trial, (0.9, 0.8))

    workers = [open_again() for _ in range(4)]
    at_once(*[lambda worker=worker: work(worker) for worker in workers])

    assert len(evaluated) == 1
    assert count_states(open_again()) | {"complete": 1, "reused": 3} == count_states(open_again())


def test_a_member_of_the_front_is_claimed_by_one_slot(open_again):
    claims = [MemberClaims(open_again(), this_worker(slot)) for slot in range(4)]

    for number in range(5):
        claimed = at_once(*[lambda one=one, number=number: one.claim([number]) for one in claims])
        assert claimed.count(None) >= 3

    assert confirmations(open_again()) == {}


def test_slots_that_measure_the_noise_floor_at_once_have_one_in_the_end(open_again):
    """Each had looked for one and found none."""
    floors = [noise_floor({"ssim": [1.0]}, {"a": {"ssim": [1.0 - slot / 10]}}) for slot in range(4)]
    studies = [open_again() for _ in floors]

    calls = [partial(agreed_floor, studies[slot], floors[slot], this_worker(slot)) for slot in range(4)]
    agreed = at_once(*calls)

    assert agreed == [stored_floor(open_again())] * 4
    assert agreed[0] in floors
    assert [agreed_floor(open_again(), floor, this_worker(4)) for floor in (None, *floors)] == [agreed[0]] * 5


def test_a_claim_is_free_again_when_its_slot_gave_it_up_or_died(open_again):
    now = [0.0]
    watch = LeaseWatch(clock=lambda: now[0])
    first, second = (MemberClaims(open_again(), this_worker(slot), watch) for slot in range(2))

    assert first.claim([3, 5]) == 3
    assert second.claim([3]) is None
    assert second.claim([3, 5]) == 5
    with first.held(3), second.held(5):
        assert second.claim([3]) is None
    assert second.claim([3]) == 3
    while first.claim([3]) is None:  # `second` renews nothing any more: it is dead
        now[0] += 5.0
    assert now[0] == GRACE_S


def test_a_lost_trial_is_taken_back_once_by_two_observers(open_again):
    trial = open_again().ask()
    trial.set_user_attr("worker", this_worker(0).model_copy(update={"started": "1"}).model_dump())
    observers = [open_again() for _ in range(4)]

    taken = at_once(*[lambda study=study: reclaim_lost_trials(study) for study in observers])

    states = [trial.state for trial in open_again().trials]
    assert sorted(map(len, taken)) == [0, 0, 0, 1]
    assert states == [TrialState.FAIL, TrialState.WAITING]


def test_a_result_told_after_the_trial_was_taken_away_is_refused(open_again):
    study, observer = open_again(), open_again()
    trial = study.ask()
    observer.tell(trial.number, state=TrialState.FAIL)

    with pytest.raises(UpdateFinishedTrialError):
        trial.set_user_attr(LEASE, 2)
    assert study.tell(trial, (0.5, 0.5), skip_if_finished=True).state == TrialState.FAIL


def test_a_trial_that_is_handed_back_is_queued_again_and_is_no_lost_attempt(open_again):
    study = open_again()
    for _ in range(5):  # more often than a trial may be lost
        trial = study.ask()
        assert trial.suggest_int("x", 0, 10**6) == study.trials[0].params["x"]
        trial.set_user_attr("worker", this_worker(0, crew="here-0").model_dump())
        assert hand_back_trials(study, "elsewhere-0") == []
        assert hand_back_trials(study, "here-0") == [trial.number]

    assert count_states(study)["waiting"] == 1
    assert "its worker left" in trial_reason(study.trials[0])


def test_what_was_failed_but_not_queued_is_queued_once_by_the_next_run(open_again):
    """Whoever took these trials back was killed before it could queue them; a bug is no such trial."""
    study = open_again()
    lost, left, bug, blamed, blamed_again = (study.ask() for _ in range(5))
    left.set_user_attr("reason", HANDED_BACK)
    bug.set_user_attr("stage", "render")
    bug.set_user_attr("reason", "stage render: ValueError")
    for trial in (blamed, blamed_again):
        trial.set_user_attr("config_digest", "a config")
        trial.set_user_attr("reason", "its worker died")
    for trial in (lost, left, bug, blamed):
        trial.suggest_int("x", trial.number, 9)
        study.tell(trial, state=TrialState.FAIL)

    assert queue_forgotten_trials(open_again()) == [lost.number, blamed.number, left.number]
    study.tell(blamed_again, state=TrialState.FAIL)
    assert queue_forgotten_trials(open_again()) == []  # it was blamed twice, so it is marked

    assert poisoned_by(open_again().user_attrs, "a config") == (blamed.number, blamed_again.number)
    waiting = [trial for trial in open_again().trials if trial.state == TrialState.WAITING]
    assert [trial.params for trial in waiting] == [lost.params, blamed.params, left.params]
    assert ["retry_history" in trial.system_attrs for trial in waiting] == [True, True, False]


def test_an_unknown_study_is_one_sentence(place):
    with pytest.raises(StoreError, match="is not in"):
        open_study(place[0], "no such study", url=place[1])


def test_optuna_sees_an_ordinary_study(open_again):
    """Nothing of ours stands between Optuna's own tools and the database."""
    study = open_again()
    study.set_user_attr("note", {"a": [1, 2.5, None]})
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1.0), n_trials=2)

    assert len(open_again().best_trials) >= 1
    assert open_again().user_attrs["note"] == {"a": [1, 2.5, None]}
    assert optuna.study.StudyDirection.MAXIMIZE in open_again().directions


def test_a_trial_whose_creation_is_repeated_by_optuna_is_there_once(place, monkeypatch):
    """Optuna repeats by itself what failed after its commit; the database's answer is lost there."""
    store, url = place
    if url is not None and url.startswith("grpc://"):
        pytest.skip("a proxy's database is the one that repeats")
    storage = open_storage(store, url=url, create=True)
    study = optuna.create_study(storage=storage, study_name=next(NAMES))
    dialect = storage._backend._backend.engine.dialect
    commit, failures = dialect.do_commit, [True]

    def commit_and_lose_the_answer(connection):
        commit(connection)
        if failures:
            failures.clear()
            raise dialect.loaded_dbapi.OperationalError("server closed the connection")

    monkeypatch.setattr(dialect, "do_commit", commit_and_lose_the_answer)
    storage.create_new_trial(study._study_id)
    study.ask()

    assert not failures
    assert [trial.number for trial in study.trials] == [0, 1]
