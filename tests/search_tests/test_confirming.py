"""Rungs, the front measured again and presets of earlier studies, in whole trials of the tiny model."""

import dataclasses
from contextlib import contextmanager

import pytest

from hyquant.config import QuantConfig, W8A8Dynamic, W8A8Static
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from search.answers import table_row, trial_json, trial_lines
from search.confirmation import Confirmation, confirmations, store_confirmation
from search.confirming import PendingMembers, bench_for_again, pending
from search.earlier import FINGERPRINT, earlier_note
from search.leader import Leader
from search.locks import HostLock
from search.logged import result_metrics
from search.objective import run_trial
from search.order import WorkOrder
from search.overview import read_overview
from search.prepare import prepare_workbench
from search.prompts import StudyPrompts
from search.repair import agreement
from search.run_log import AGAIN_TAG
from search.rungs import Scored
from search.scoring import measured_figures
from search.stages import Stages
from search.storage import create_study, open_study
from search.study import Budget, ConfirmConfig, Constraint, Objective, PresetsConfig, RungsConfig
from search.tracking import Tracker
from search.trials import count_states, front, trial_reason, trial_result, trial_state
from tests.toys.statements import statements, texts

PROMPTS = StudyPrompts(
    calibration=("one red cube",),
    search=("a green cone", "a grey ring", "a blue ball", "a red star", "two white cubes", "a black cone"),
)
OBJECTIVES = (
    Objective(metric="psnr_db", direction="maximize"),
    Objective(metric="weight_bytes", direction="minimize"),
)
DYNAMIC, STATIC, FLOAT = QuantConfig(linear=W8A8Dynamic()), QuantConfig(linear=W8A8Static()), QuantConfig(linear=None)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, study_config):
    """One rank's warm state with six prompts, the first four of them a rung."""
    folder = tmp_path_factory.mktemp("bench")
    config = study_config.model_copy(
        update={"objectives": OBJECTIVES, "constraints": (), "rungs": RungsConfig(prompts=(4,))}
    )
    return prepare_workbench(
        config,
        PROMPTS,
        group=Group(),
        device=resolve_device("cpu"),
        cache=folder / "cache",
        lock=HostLock(folder / "locks"),
    )


def with_config(bench, **changes):
    return dataclasses.replace(bench, config=bench.config.model_copy(update=changes))


def member_like(result, *, better_by):
    """A member of the front that has just a trial's figures, and whose videos are better by so many dB."""
    metric = result.metrics["psnr_db"]
    spread = [better_by + 0.01 * index for index in range(len(metric.values))]
    values = tuple(value + more for value, more in zip(metric.values, spread, strict=True))
    better = metric.model_copy(update={"values": values, "mean": sum(values) / len(values)})
    figures = measured_figures(result.latency, result.weight_bytes, 0)
    return Scored(3, {"psnr_db": better}, figures, result.latency.kind, result.latency.timed_on)


def test_prompts_in_rungs_give_the_scores_of_prompts_at_once(bench):
    """Rungs cut batches elsewhere; float32 sums in another order may flip codes that lie on a rounding edge."""
    at_once = run_trial(with_config(bench, rungs=None), DYNAMIC, Stages(Group())).result
    in_rungs = run_trial(bench, DYNAMIC, Stages(Group())).result

    assert in_rungs.outcome == at_once.outcome == "complete"
    assert in_rungs.num_prompts is None
    for name, metric in at_once.metrics.items():
        assert in_rungs.metrics[name].values == pytest.approx(metric.values, rel=1e-4, abs=1e-4), name


def test_a_trial_that_a_member_of_the_front_beats_stops_at_its_rung(bench):
    whole = run_trial(with_config(bench, rungs=None), DYNAMIC, Stages(Group())).result

    stopped = run_trial(bench, DYNAMIC, Stages(Group()), front=lambda: [member_like(whole, better_by=9.0)]).result
    watched, watched_while_asked = [], []

    @contextmanager
    def watching(stage):
        watched.append(stage)
        yield
        watched.remove(stage)

    def ask():
        watched_while_asked.extend(watched)  # the database may be away for minutes, which is nobody's hang
        return [member_like(whole, better_by=-9.0)]

    spared = run_trial(bench, DYNAMIC, Stages(Group(), watching=watching), front=ask).result

    assert (stopped.outcome, stopped.num_prompts, stopped.stopped_by) == ("stopped", 4, 3)
    assert stopped.values is None
    assert stopped.constraints == {}
    assert stopped.metrics["psnr_db"].values == pytest.approx(whole.metrics["psnr_db"].values[:4], rel=1e-4)
    assert "beaten by trial 3" in stopped.reason
    assert "by a paired test" in stopped.reason
    assert "4 of 6 prompts were rendered" in stopped.reason
    assert stopped.latency is not None
    assert ("prompts_rendered", 4.0, 0) in [tuple(metric) for metric in result_metrics(stopped)]
    assert spared.outcome == "complete"
    assert watched_while_asked == []


def test_a_bound_that_cannot_be_met_any_more_ends_a_trial_before_its_latency_is_measured(bench):
    strict = with_config(bench, constraints=(Constraint(metric="psnr_db_worst", min=99.0),))

    result = run_trial(strict, DYNAMIC, Stages(Group())).result

    assert (result.outcome, result.num_prompts) == ("infeasible", 4)
    assert result.latency is None
    assert result.constraints["psnr_db_worst"] == pytest.approx(99.0 - min(result.metrics["psnr_db"].values))
    assert "psnr_db_worst must be at least 99, but is at best" in result.reason


def test_a_bound_on_latency_ends_a_trial_after_its_first_rung(bench):
    strict = with_config(bench, constraints=(Constraint(metric="latency_ratio", max=1e-6),))

    result = run_trial(strict, DYNAMIC, Stages(Group())).result

    assert (result.outcome, result.num_prompts) == ("infeasible", 4)
    assert result.constraints["latency_ratio"] == pytest.approx(result.latency.ratio - 1e-6)


@pytest.fixture
def make_leader(bench, mlflow_store):
    """A leader of a study in one store; keyword arguments change the study's config."""

    def make(**changes):
        config = bench.config.model_copy(update={"store": str(mlflow_store), **changes})
        study, _ = create_study(mlflow_store, config, PROMPTS)
        study.set_user_attr("study_config", config.model_dump(mode="json"))
        Tracker.of(mlflow_store, study).open_study(config)
        order = WorkOrder(
            store=mlflow_store, url=None, study=config.name, slot=0, first_trial=0, deadline=None, until_trial=None
        )
        own_bench = dataclasses.replace(bench, config=config)
        return Leader(own_bench, study, order, restart_count=0), study, order

    return make


def enqueue(study, *strategies):
    for strategy in strategies:
        act_method = {"act_method": "minmax"} if strategy == "static" else {}
        study.enqueue_trial({"strategy": strategy, "exclusion": "none", **act_method})


def test_a_stopped_trial_counts_is_pruned_and_is_told_in_words(make_leader, monkeypatch):
    leader, study, order = make_leader(budget=Budget(trials=2))
    enqueue(study, "dynamic", "static")

    def better_front(study):
        results = [(trial, trial_result(trial)) for trial in front(study)]
        return [
            dataclasses.replace(member_like(result, better_by=30.0), number=trial.number, latency_kind="native")
            for trial, result in results
        ]

    monkeypatch.setattr("search.evaluating.scored_front", better_front)
    leader.run()

    first, second = study.trials
    assert [trial_state(first), trial_state(second)] == ["complete", "stopped"]
    assert second.values is None
    assert "beaten by trial 0" in trial_reason(second)
    assert count_states(study)["stopped"] == 1
    assert agreement(order.store, study) == ()
    overview = read_overview(study)
    row = overview.row(1)
    assert row.values is None
    assert "beaten by trial 0" in table_row(row, overview.config.space)["reason"]
    assert "scores over the first 4 prompts:" in trial_lines(row)
    assert trial_json(row)["stopped_by"] == 0


def test_the_front_is_measured_again_with_fresh_seeds_once(make_leader, bench):
    leader, study, order = make_leader(budget=Budget(trials=2), confirm=ConfirmConfig(seeds=2))
    enqueue(study, "dynamic", "static")

    leader.run()

    members = {trial.number for trial in front(study)}
    found = confirmations(study)
    assert found.keys() >= members
    for number, confirmation in found.items():
        first, again = trial_result(study.trials[number]), confirmation.result
        assert again.config == first.config
        assert len(again.metrics["psnr_db"].values) == 12  # six prompts, two seeds
        assert set(again.metrics["psnr_db"].values).isdisjoint(first.metrics["psnr_db"].values)
    assert agreement(order.store, study) == ()

    stamp = {number: found[number].model_dump() for number in found}
    make_leader(budget=Budget(trials=2), confirm=ConfirmConfig(seeds=2))[0].run()
    assert {number: one.model_dump() for number, one in confirmations(study).items()} == stamp

    enqueue(study, "m4")
    make_leader(budget=Budget(trials=3), confirm=ConfirmConfig(seeds=2))[0].run()
    later = confirmations(study)
    assert {number: later[number].model_dump() for number in stamp} == stamp
    assert later.keys() >= {trial.number for trial in front(study)}


def test_a_process_that_only_measures_again_subtracts_the_floor_of_the_study(make_leader, bench):
    """It has measured none itself; the stored one is moved, so that no measurement gives it by chance."""
    leader, study, order = make_leader(budget=Budget(trials=1), confirm=None)
    enqueue(study, "dynamic")
    leader.run()
    floor = study.user_attrs["noise_floor"]
    floor["metrics"]["psnr_db"] |= {"values": [90.0, 91.0, 92.0, 93.0, 94.0, 95.0], "perfect": [100.0] * 6}
    study.set_user_attr("noise_floor", floor)

    config = leader._bench.config.model_copy(update={"confirm": ConfirmConfig(seeds=2)})
    Leader(dataclasses.replace(bench, config=config, floor=None), study, order, restart_count=0).run()

    metrics = confirmations(study)[0].result.metrics
    floors = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0] * 2
    values = metrics["psnr_db"].values
    expected = [100.0 - value - floor for value, floor in zip(values, floors, strict=True)]
    assert metrics["psnr_db_excess"].values == pytest.approx(expected)


def test_fresh_seeds_are_nobodys_and_every_prompt_has_as_many(bench):
    again = bench_for_again(with_config(bench, confirm=ConfirmConfig(seeds=3)))

    seeds = [seed for _, seed in again.pairs]
    assert len(set(seeds)) == len(seeds) == 18
    assert set(seeds).isdisjoint(seed for _, seed in (*bench.pairs, *bench.calibration))
    assert [prompt for prompt, _ in again.pairs] == list(PROMPTS.search) * 3


@pytest.fixture
def measured(make_leader, make_result):
    """A stored study of three complete trials on the front, by quality 0.9, 0.8, 0.7, and the other way by ratio."""
    objectives = (
        Objective(metric="clip_reference", direction="maximize"),
        Objective(metric="latency_ratio", direction="minimize"),
    )
    _, study, _ = make_leader(objectives=objectives, confirm=ConfirmConfig(members=3))
    for strategy, quality, ratio in [("static", 0.9, 0.8), ("dynamic", 0.8, 0.7), ("m4", 0.7, 0.6)]:
        add_trial(study, make_result(strategy, quality, ratio))
    return study


def add_trial(study, result):
    def one(trial):
        trial.set_user_attr("config", result.config.model_dump(mode="json"))
        trial.set_user_attr("result", result.model_dump(mode="json"))
        return result.values

    study.optimize(one, n_trials=1)


def again(make_result, *values, **changes):
    return Confirmation(result=make_result("dynamic", *values, **changes))


def test_picks_go_by_the_values_of_fresh_seeds_and_by_nothing_else_once_there_are_some(measured, make_result):
    assert read_overview(measured).picked("safe").number == 0

    store_confirmation(measured, 1, again(make_result, 0.75, 0.7))
    assert {name: read_overview(measured).picked(name).number for name in ("safe", "fast")} == {"safe": 1, "fast": 1}

    store_confirmation(measured, 0, again(make_result, 0.7, 0.8))
    store_confirmation(measured, 2, again(make_result, 0.65, 0.6))
    overview = read_overview(measured)
    assert [row.number for row in overview.front] == [1, 2]  # on fresh seeds trial 1 beats trial 0
    assert (overview.picked("safe").number, overview.picked("fast").number) == (1, 2)


def test_a_member_slower_than_the_float_loop_beside_it_is_not_offered(make_leader, make_result):
    """Each float loop takes 2 s; trial 0 is closest to float and slower than float."""
    objectives = (
        Objective(metric="clip_reference", direction="maximize"),
        Objective(metric="latency_s", direction="minimize"),
    )
    _, study, _ = make_leader(objectives=objectives, confirm=ConfirmConfig(members=3))
    add_trial(study, make_result("static", 0.9, 1.2, values=(0.9, 2.4)))
    add_trial(study, make_result("dynamic", 0.8, 0.7, values=(0.8, 1.4)))
    assert read_overview(study).picked("safe").number == 1

    for number in (0, 1):
        store_confirmation(study, number, Confirmation(result=trial_result(study.trials[number])))
    assert read_overview(study).picked("safe").number == 1


def test_a_member_that_breaks_a_bound_the_second_time_leaves_the_front_with_the_reason(measured, make_result):
    broken = again(make_result, 0.9, 0.8, values=None, outcome="infeasible", reason="collapsed must be at most 0")
    store_confirmation(measured, 0, broken)
    store_confirmation(measured, 1, Confirmation(result=None, failure="stage render on rank 0: out of memory"))

    overview = read_overview(measured)

    assert [row.number for row in overview.front] == [2]
    assert overview.row(0).reason == "measured again with fresh seeds: collapsed must be at most 0"
    assert "out of memory" in overview.row(1).reason
    assert table_row(overview.row(0), overview.config.space)["measured again"] == "not held"


def test_what_is_offered_is_measured_again_first_and_no_more_than_asked_for(measured, make_result):
    config = read_overview(measured).config
    one = config.model_copy(update={"confirm": ConfirmConfig(members=1)})

    assert set(pending(measured, config)) == {0, 1, 2}
    (chosen,) = pending(measured, one)
    assert pending(measured, config.model_copy(update={"confirm": None})) == []
    store_confirmation(measured, chosen, again(make_result, 0.75, 0.7))
    assert pending(measured, one) == []


def test_who_asks_again_what_is_pending_reads_finished_trials_only_when_something_has_changed(
    stored_store, small_study, make_result
):
    study = open_study(stored_store, "demo")
    config = small_study.model_copy(update={"confirm": ConfirmConfig(members=2)})
    members, trials = PendingMembers(study, config), study.get_trials(deepcopy=False)
    with statements(study) as of_attributes:
        study.user_attrs  # noqa: B018

    first = members.among(trials)
    with statements(study) as of_asking_again:
        again_asked = members.among(trials)
    assert first == again_asked == pending(study, config) != []
    assert texts(of_asking_again) == texts(of_attributes)

    store_confirmation(study, first[0], again(make_result, 0.9, 0.9))
    assert members.among(trials) == pending(study, config) == first[1:]


def test_both_ends_of_a_front_larger_than_its_members_are_measured_again(measured, make_result):
    """The ends and the knee by first values, then the middle of the widest gap; picks then come from these members."""
    for quality, ratio in [(0.69, 0.5), (0.6, 0.4), (0.5, 0.3), (0.4, 0.2), (0.3, 0.1)]:
        add_trial(measured, make_result("dynamic", quality, ratio))
    overview = read_overview(measured)
    config = overview.config.model_copy(update={"confirm": ConfirmConfig(members=4)})
    assert [row.number for row in overview.front] == list(range(8))
    offered = {name: overview.picked(name).number for name in ("safe", "balanced", "fast")}
    assert offered == {"safe": 0, "balanced": 3, "fast": 7}

    done = []
    while members := pending(measured, config):
        done.append(members[0])
        values = trial_result(measured.trials[members[0]]).values
        store_confirmation(measured, members[0], again(make_result, *values))

    assert done[:3] == [0, 3, 7]
    assert done[3:] == [5]
    assert {name: read_overview(measured).picked(name).number for name in offered} == offered

    add_trial(measured, make_result("dynamic", 0.2, 0.05))  # after the budget was raised: a new end, and so a new knee
    assert pending(measured, config) == [4, 8]
    store_confirmation(measured, 4, again(make_result, 0.5, 0.3))
    store_confirmation(measured, 8, again(make_result, 0.2, 0.05))
    assert pending(measured, config) == []
    assert read_overview(measured).picked("fast").number == 8


def test_the_record_in_mlflow_has_both_measurements(measured, make_result, mlflow_store):
    tracker = Tracker.of(mlflow_store, measured)
    tracker.finish_trial(0, "complete", trial_result(measured.trials[0]))
    confirmation = again(make_result, 0.75, 0.7)

    tracker.log_again(0, confirmation)
    tracker.log_again(0, confirmation)

    (run,) = tracker.trial_runs()
    assert run.metrics["clip_reference_mean"] == 0.9
    assert run.metrics["again.clip_reference_mean"] == 0.75
    assert tracker._client.get_run(run.run_id).data.tags[AGAIN_TAG] == "holds"


def test_the_best_of_an_earlier_study_on_the_same_model_is_queued_for_a_new_one(make_leader):
    earlier, old, _ = make_leader(name="earlier", budget=Budget(trials=2))
    enqueue(old, "dynamic", "static")
    earlier.run()
    other_model, foreign, _ = make_leader(name="foreign", budget=Budget(trials=1))
    enqueue(foreign, "m4")
    other_model.run()
    foreign.set_user_attr(FINGERPRINT, "another model")

    leader, study, _ = make_leader(name="new", budget=Budget(trials=1), presets=PresetsConfig(earlier=1))
    leader.run()
    off, without, _ = make_leader(name="off", budget=Budget(trials=1), presets=PresetsConfig(earlier=0))
    off.run()

    best = next(row.number for row in read_overview(old).front if row.picks)
    presets = [trial.user_attrs["preset"] for trial in study.trials if "preset" in trial.user_attrs]
    assert presets == [f"trial {best} of earlier"]
    assert f"trial {best} of earlier" in earlier_note(study.user_attrs)
    assert study.trials[0].params == old.trials[best].params
    assert earlier_note(without.user_attrs) is None
