import math
import os
import sqlite3
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from hyquant.config import QuantConfig, W8A8Dynamic, W8A8Static, digest
from search.blame import blame_within
from search.databases import _make_database
from search.errors import StoreError, StudyMismatch
from search.order import MAX_DEATHS_IN_A_ROW, SlotState, read_state, write_state
from search.patience import Patience
from search.poison import poisoned_by
from search.processes import ProcessId, this_process, this_worker
from search.prompts import StudyPrompts
from search.proposal import HOLDS, choose_config, claim, enqueue_point, enqueue_presets
from search.resume import NO_BLAME, Blame, differences, reclaim_lost_trials, require_same_study
from search.retry import MAX_RETRIES
from search.run_sentences import lost_in_words
from search.samplers import SAMPLERS, build_sampler
from search.storage import create_study, open_storage, open_study, stored_config, study_names
from search.study import Objective, SamplerConfig
from search.trials import (
    count_states,
    find_record,
    front,
    is_simulated,
    store_result,
    trailing,
    trial_config,
    trial_reason,
    trial_result,
    trial_state,
)

PROMPTS = StudyPrompts(calibration=("a",), search=("b",))


@pytest.fixture
def study_config(study_config):
    objectives = (
        Objective(metric="clip_reference", direction="maximize"),
        Objective(metric="latency_ratio", direction="minimize"),
    )
    return study_config.model_copy(update={"objectives": objectives})


@pytest.fixture
def study(tmp_path, study_config):
    return create_study(tmp_path, study_config, PROMPTS)[0]


def ask(study):
    """Ask without Optuna's warning that plain `ask` writes no heartbeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return study.ask()


def _evaluate(study, make_result, config=None, *, constraint=-1.0, values=(0.9, 0.8), kind="native"):
    """One trial as a worker ends it."""
    config = config or QuantConfig(linear=W8A8Dynamic())
    result = make_result()
    result = result.model_copy(update={"latency": result.latency.model_copy(update={"kind": kind})})

    def objective(trial):
        trial.set_user_attr("config", config.model_dump(mode="json"))
        trial.set_user_attr("config_digest", digest(config))
        store_result(trial, result)
        trial.set_constraint("collapsed", constraint)
        if constraint > 0:
            raise optuna.TrialPruned
        return values

    study.optimize(objective, n_trials=1)


def test_a_study_is_created_once_and_opened_by_name(tmp_path, study_config):
    _, is_new = create_study(tmp_path, study_config, PROMPTS)
    _, is_new_again = create_study(tmp_path, study_config, PROMPTS)

    assert (is_new, is_new_again) == (True, False)
    assert study_names(tmp_path) == ("tiny-study",)
    assert stored_config(open_study(tmp_path, "tiny-study")) == study_config


def test_a_database_is_there_as_a_whole_or_not_at_all(tmp_path, study_config):
    """Readers look while several runners create it: they find no store yet, or every table."""
    is_created = threading.Event()
    found: list[str] = []

    def read() -> None:
        while not is_created.is_set():
            try:
                found.append(",".join(study_names(tmp_path)))
            except StoreError as error:
                found.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with ThreadPoolExecutor(3) as runners:
            studies = list(runners.map(lambda _: open_storage(tmp_path, create=True), range(3)))
    finally:
        is_created.set()
        reader.join()

    assert len(studies) == 3
    assert set(found) == {""}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".new-")] == []
    assert create_study(tmp_path, study_config, PROMPTS)[1]


def test_opening_to_read_creates_nothing(tmp_path):
    with pytest.raises(StoreError, match="holds no studies"):
        open_study(tmp_path / "none", "x")

    assert not (tmp_path / "none").exists()


def test_a_database_that_sqlite_cannot_open_is_not_called_empty(tmp_path):
    """A folder in the place of SQLite's log stands for a read-only mount, which tests cannot make."""
    _make_database(tmp_path / "optuna.db")
    (tmp_path / "optuna.db-wal").mkdir()

    for look in (lambda: open_study(tmp_path, "tiny-study"), lambda: study_names(tmp_path)):
        with pytest.raises(StoreError, match=r"must be writable to be read.* 'unable to open database file'; ask for"):
            look()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, who alone can become others")
def test_a_database_of_somebody_else_is_not_called_damaged():
    with tempfile.TemporaryDirectory() as name:  # others may not look into pytest's own folders
        store = Path(name) / "store"
        _make_database(store / "optuna.db")
        for path, mode in ((Path(name), 0o755), (store, 0o755), (store / "optuna.db", 0o644)):
            path.chmod(mode)
        os.seteuid(65534)
        try:
            with pytest.raises(StoreError, match=r"must be writable to be read.* SQLite says 'attempt to write a read"):
                study_names(store)
        finally:
            os.seteuid(0)


def test_an_unknown_study_is_refused_with_the_known_ones(tmp_path, study):
    with pytest.raises(StoreError, match="it holds tiny-study; did you mean 'tiny-study'"):
        open_study(tmp_path, "tiny-stdy")


def test_a_locked_database_is_one_sentence_about_the_store(tmp_path, study, monkeypatch):
    monkeypatch.setattr("search.databases.BUSY_TIMEOUT_S", 0.1)
    monkeypatch.setattr("search.databases.Patience", partial(Patience, patience_s=0.5))
    holder = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")

    with pytest.raises(StoreError, match="database is locked"):
        open_study(tmp_path, "tiny-study")
    holder.close()


def test_a_folder_that_cannot_be_written_is_one_sentence_about_the_store(tmp_path, study_config):
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match="must be a writable folder"):
        create_study(tmp_path / "file" / "store", study_config, PROMPTS)


def test_two_workers_never_pop_the_same_waiting_trial(tmp_path, study):
    """Each thread has a connection of its own, as a process would; SQLite locks connections, not processes."""
    for _ in range(20):
        study.enqueue_trial({})
    barrier, popped = threading.Barrier(2), []

    def work():
        own = open_study(tmp_path, "tiny-study")
        barrier.wait(30)
        for _ in range(10):
            own.optimize(lambda trial: popped.append(trial.number) or (1.0, 1.0), n_trials=1)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)

    assert sorted(popped) == list(range(20))


def test_states_are_told_apart_and_counted(study, make_result):
    _evaluate(study, make_result)
    _evaluate(study, make_result, constraint=0.5)
    study.optimize(lambda trial: None, n_trials=1)
    study.enqueue_trial({})

    def reuse(trial):
        trial.set_user_attr("reused_from", 0)
        return 0.9, 0.8

    study.enqueue_trial({})
    study.optimize(reuse, n_trials=1)

    states = [trial_state(trial) for trial in study.trials]
    assert states == ["complete", "infeasible", "failed", "reused", "waiting"]
    assert count_states(study) == {
        "complete": 1,
        "infeasible": 1,
        "stopped": 0,
        "failed": 1,
        "running": 0,
        "waiting": 1,
        "reused": 1,
    }


def test_the_front_holds_each_config_once_and_nothing_dominated_or_infeasible(study, make_result):
    for values in [(0.9, 0.8), (0.8, 0.7), (0.7, 0.9)]:
        _evaluate(study, make_result, values=values)
    _evaluate(study, make_result, constraint=1.0, values=(1.0, 0.1))

    def reuse(trial):
        trial.set_user_attr("reused_from", 0)
        trial.set_constraint("collapsed", -1.0)
        return 0.9, 0.8

    study.optimize(reuse, n_trials=1)

    assert [trial.number for trial in front(study)] == [0, 1]


def test_a_simulated_latency_competes_only_where_none_is_native(study, make_result):
    for values in [(0.8, 0.5), (0.7, 0.9)]:
        _evaluate(study, make_result, values=values, kind="simulated")
    only_simulated = [trial.number for trial in front(study)]
    for values in [(0.9, 0.8), (0.7, 0.7)]:
        _evaluate(study, make_result, values=values)

    assert only_simulated == [0]
    assert [trial.number for trial in front(study)] == [2, 3]


def test_a_trial_of_the_float_model_competes_with_simulated_latencies_and_shuts_none_out(study, make_result):
    """It quantizes nothing, so its latency is called native, whatever the kernels of this machine are."""
    for values in [(0.8, 0.5), (0.7, 0.4)]:
        _evaluate(study, make_result, values=values, kind="simulated")
    _evaluate(study, make_result, values=(1.0, 1.01), config=QuantConfig(linear=None))
    only_simulated = [trial.number for trial in front(study)]
    _evaluate(study, make_result, values=(0.9, 0.8))

    assert only_simulated == [0, 1, 2]
    assert [trial.number for trial in front(study)] == [2, 3]


@pytest.mark.parametrize("kind", ["native", "simulated"])
def test_the_kind_of_a_latency_is_known_of_trials_of_earlier_versions_too(study, make_result, kind):
    result = make_result()
    result = result.model_copy(update={"latency": result.latency.model_copy(update={"kind": kind})})
    ask(study).set_user_attr("result", result.model_dump(mode="json"))
    store_result(ask(study), result)

    assert [is_simulated(trial) for trial in study.trials] == [kind == "simulated"] * 2
    assert [trial_result(trial) for trial in study.trials] == [result] * 2


def test_a_result_comes_back_with_what_is_infinite_or_no_number(study, make_result):
    """A clip that is all NaN has such distances."""
    store_result(ask(study), make_result(latent_l2=((math.inf, -math.inf, math.nan),)))

    (found,) = trial_result(study.trials[0]).latent_l2
    assert found[:2] == (math.inf, -math.inf)
    assert math.isnan(found[2])


def test_the_record_of_an_equal_config_is_found_unless_it_failed(study, make_result):
    config, other = QuantConfig(linear=W8A8Dynamic()), QuantConfig(linear=W8A8Static())
    _evaluate(study, make_result, config)

    assert find_record(study.trials, digest(config)).number == 0
    assert find_record(study.trials, digest(other)) is None


def test_a_handwritten_point_is_a_trial_of_its_own_config(study, study_config):
    point = QuantConfig(linear=W8A8Dynamic(), deploy_dtype="float16")

    number = enqueue_point(study, point)

    trial = ask(study)
    assert trial.number == number
    assert choose_config(trial, study_config) == point


def test_presets_are_queued_once_in_a_study(study, study_config):
    assert enqueue_presets(study, study_config) == len(study_config.space.presets) > 0
    assert enqueue_presets(study, study_config) == 0
    assert count_states(study)["waiting"] == len(study_config.space.presets)


def test_a_claim_waits_for_an_equal_trial_in_flight_and_then_uses_its_record(tmp_path, study, make_result):
    config = QuantConfig(linear=W8A8Dynamic())
    holder, second = ask(study), ask(study)
    assert claim(holder, config, while_waiting=lambda: None) is None

    def finish_holder():
        holder.set_user_attr("result", make_result().model_dump(mode="json"))
        study.tell(holder, (0.9, 0.8))

    record = claim(second, config, while_waiting=finish_holder)

    assert record.number == holder.number
    assert trial_config(study.trials[second.number]) == config


def test_a_claim_lets_go_when_a_lower_trial_comes_while_it_waits_for_a_higher_one(study, make_result):
    config = QuantConfig(linear=W8A8Dynamic())
    lowest, own, highest = ask(study), ask(study), ask(study)
    highest.set_user_attr(HOLDS, digest(config))
    holds = []

    def while_waiting() -> None:
        holds.append(study.trials[own.number].user_attrs[HOLDS])
        if len(holds) == 1:
            lowest.set_user_attr(HOLDS, digest(config))
            highest.set_user_attr(HOLDS, None)
        else:
            lowest.set_user_attr("result", make_result("dynamic").model_dump(mode="json"))
            study.tell(lowest, (0.9, 0.8))

    assert claim(own, config, while_waiting=while_waiting).number == lowest.number
    assert holds == [digest(config), None]


def test_a_claim_whose_holder_fails_evaluates_the_config_itself(tmp_path, study):
    config = QuantConfig(linear=W8A8Dynamic())
    holder, second = ask(study), ask(study)
    claim(holder, config, while_waiting=lambda: None)

    record = claim(second, config, while_waiting=lambda: study.tell(holder, state=TrialState.FAIL))

    assert record is None


def _dead_worker():
    """A process id that existed a moment ago, with the start time of another process."""
    return this_worker(0).model_copy(update={"started": "1"}).model_dump()


def test_a_running_trial_of_a_dead_worker_is_failed_and_queued_again_without_its_traces(study):
    trial = ask(study)
    strategy = trial.suggest_categorical("strategy", ("static", "dynamic"))
    trial.set_user_attr("worker", _dead_worker())
    trial.set_user_attr("preset", "p")

    assert reclaim_lost_trials(study) == [trial.number]

    lost, queued = study.trials
    assert trial_state(lost) == "failed"
    assert "killed or lost; a trial with the same parameters was queued" in trial_reason(lost)
    assert lost_in_words(study.trials, [lost.number]) == f"trial {lost.number} was lost with a worker, queued again"
    assert queued.state == TrialState.WAITING
    assert queued.user_attrs.keys() == {"preset", "created_by"}
    assert ask(study).suggest_categorical("strategy", ("static", "dynamic")) == strategy


def test_a_running_trial_of_a_living_worker_or_of_another_host_is_left_alone(study):
    mine, other, _ = ask(study), ask(study), ask(study)
    mine.set_user_attr("worker", this_worker(0).model_dump())
    other.set_user_attr("worker", _dead_worker() | {"host": "elsewhere"})

    assert reclaim_lost_trials(study) == []


def test_a_trial_that_keeps_killing_its_worker_is_given_up(study):
    for _ in range(MAX_RETRIES + 1):
        ask(study).set_user_attr("worker", _dead_worker())
        reclaim_lost_trials(study)

    assert count_states(study)["waiting"] == 0
    assert count_states(study)["failed"] == MAX_RETRIES + 1
    assert trial_reason(study.trials[-1]) == "its worker was killed or lost; it was its last try"
    assert lost_in_words(study.trials, [1, 2]) == (
        "trial 1 was lost with a worker, queued again; trial 2 was lost with a worker, not tried again"
    )


def test_the_deaths_of_a_config_that_is_marked_are_taken_off_its_slot_by_whoever_sees_it(study, tmp_path, monkeypatch):
    runners = [this_process(), this_process().model_copy(update={"started": "1"})]
    dead = _dead_worker() | {"runner": runners[0].model_dump(), "slot": 1}
    ours, others = (blame_within(runner, lambda slot: tmp_path / str(slot)) for runner in runners)
    monkeypatch.setattr(
        "search.processes.is_alive", lambda process: False
    )  # or the others would leave it to our runner
    for blame in (others, ours, ours):
        trial = ask(study)
        trial.set_user_attr("config_digest", "a config")
        trial.set_user_attr("worker", dead)
        assert reclaim_lost_trials(study, None, blame) == [trial.number]

    assert poisoned_by(study.user_attrs, "a config") == (1, 2)  # others cannot tell what ended it
    assert [read_state(tmp_path / str(slot)).forgiven for slot in (0, 1)] == [0, 2]


def test_a_machine_that_ends_every_worker_is_forgiven_two_configs_and_no_more(study, tmp_path):
    """A retry waits first, so deaths come in pairs, and each second one marks a config."""
    blame, dead = blame_within(this_process(), lambda slot: tmp_path), _dead_worker()
    for deaths in range(1, 20):
        trial = ask(study)
        tries = len(study.trials[trial.number].system_attrs.get("retry_history", ()))
        trial.set_user_attr("config_digest", f"config {(deaths - 1) // 2}")
        trial.set_user_attr("worker", dead | {"runner": this_process().model_dump()})
        assert tries == (deaths - 1) % 2
        reclaim_lost_trials(study, None, blame)
        if deaths - read_state(tmp_path).forgiven >= MAX_DEATHS_IN_A_ROW:
            break

    assert deaths == 7


def test_a_worker_that_ended_itself_and_said_why_is_no_fault_of_its_config(study, tmp_path):
    write_state(tmp_path, SlotState(stopped="the study's database must answer, but it did not"))
    trial = ask(study)
    trial.set_user_attr("config_digest", "a config")
    trial.set_user_attr("worker", _dead_worker() | {"runner": this_process().model_dump()})

    assert reclaim_lost_trials(study, None, blame_within(this_process(), lambda slot: tmp_path)) == [trial.number]

    assert not [key for key in study.user_attrs if key.startswith("crash:")]


def test_the_dead_of_a_runner_that_lives_are_left_to_it_on_its_host(study):
    for runner in (this_process(), this_process().model_copy(update={"started": "1"})):
        ask(study).set_user_attr("worker", _dead_worker() | {"runner": runner.model_dump()})
    another = Blame(how=NO_BLAME.how, forgive=NO_BLAME.forgive, runner=ProcessId(pid=1, started="2"))

    assert reclaim_lost_trials(study, None, another) == [1]
    assert reclaim_lost_trials(study) == [0]


def test_a_changed_study_file_is_refused_with_every_difference(study, study_config):
    changed = study_config.model_copy(update={"target": "mindie-sd-3.1/910b"})
    prompts = StudyPrompts(calibration=("a",), search=("c",))

    with pytest.raises(StudyMismatch) as caught:
        require_same_study(study, changed, prompts)

    assert "target: stored 'hyquant', file 'mindie-sd-3.1/910b'" in str(caught.value)
    assert "prompts.search[0]: stored 'b', file 'c'" in str(caught.value)


def test_a_changed_budget_is_no_difference(study, study_config):
    changed = study_config.model_copy(update={"budget": study_config.budget.model_copy(update={"trials": 99})})

    require_same_study(study, changed, PROMPTS)


def test_differences_name_leaves_that_one_side_lacks():
    assert list(differences({"a": {"b": 1}}, {"a": {}})) == ["a.b: stored 1, file None"]


def test_trailing_counts_finished_trials_in_a_row(study, make_result):
    _evaluate(study, make_result)
    study.optimize(lambda trial: None, n_trials=2)
    ask(study)

    assert trailing(study.trials, "failed") == 2
    assert trailing(study.trials, "complete") == 0


@pytest.mark.parametrize("kind", [*SAMPLERS, "grid", "auto"])
def test_every_sampler_goes_on_with_infeasible_failed_and_handwritten_trials(tmp_path, study_config, make_result, kind):
    """PRUNED without values and trials without parameters must not confuse a sampler of two objectives."""
    study, _ = create_study(tmp_path, study_config, PROMPTS)
    sampler_config = SamplerConfig(kind=kind, num_startup_trials=3)
    config = study_config.model_copy(update={"sampler": sampler_config})
    study.sampler = build_sampler(config, slot=0, num_trials=0)
    enqueue_point(study, QuantConfig(linear=W8A8Dynamic()))

    def objective(trial):
        if trial.number == 0:
            trial.set_constraint("c", -1.0)
            return 0.5, 0.5
        config = choose_config(trial, study_config)
        trial.set_constraint("c", 1.0 if trial.number % 3 == 1 else -1.0)
        if trial.number % 3 == 1:
            raise optuna.TrialPruned
        return len(config.layers.exclude) / 10, trial.number / 10

    study.optimize(objective, n_trials=10)

    assert count_states(study)["complete"] == 7
    assert count_states(study)["infeasible"] == 3


def test_two_slots_and_a_resumed_slot_draw_from_different_generators(study_config):
    config = study_config.model_copy(update={"sampler": SamplerConfig(kind="random")})
    draws = []
    for slot, num_trials in [(0, 0), (1, 0), (0, 7), (0, 0)]:
        study = optuna.create_study(sampler=build_sampler(config, slot=slot, num_trials=num_trials))
        draws.append(study.ask().suggest_float("x", 0, 1))

    assert len(set(draws)) == 3
    assert draws[0] == draws[3]
