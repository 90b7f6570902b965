"""A stored trial run again: an honest one agrees; other weights and a falsified score do not."""

import json
import math

import pytest
from optuna.trial import TrialState, create_trial

from hyquant.config import LayerSelection, QuantConfig, W8A8Dynamic
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from search.cli import exit_code_of
from search.locks import HostLock
from search.noise_floor import MetricFloor, NoiseFloor
from search.objective import run_trial
from search.prepare import prepare_workbench
from search.prompts import StudyPrompts
from search.rerun import agreements
from search.result import MetricResult
from search.stages import Stages
from search.storage import create_study

PROMPTS = StudyPrompts(calibration=("one red cube", "two blue balls"), search=("a green cone", "a grey ring"))
POINT = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(exclude=("*fc2*",)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory, study_config):
    """What a worker stores of one trial."""
    folder = tmp_path_factory.mktemp("worker")
    bench = prepare_workbench(
        study_config,
        PROMPTS,
        group=Group(),
        device=resolve_device("cpu"),
        cache=folder / "cache",
        lock=HostLock(folder / "locks"),
    )
    return run_trial(bench, POINT, Stages(Group())).result, dict(bench.float_results), bench.floor


@pytest.fixture
def stored(tmp_path, monkeypatch, study_config, measured):
    """Store the trial, changed as a test wants it, and return the store."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def store(result=None, **model):
        folder = tmp_path / "store"
        folder.mkdir()
        changed = study_config.model_copy(update={"model": study_config.model.model_copy(update=model)})
        study, _ = create_study(folder, changed, PROMPTS)
        own, floats, floor = measured
        study.set_user_attr("float_scores", {name: one.model_dump(mode="json") for name, one in floats.items()})
        study.set_user_attr("noise_floor", floor.model_dump(mode="json"))
        result = own if result is None else result
        attributes = {"result": result.model_dump(mode="json"), "config": POINT.model_dump(mode="json")}
        state = TrialState.PRUNED if result.values is None else TrialState.COMPLETE
        study.add_trial(create_trial(state=state, values=result.values, user_attrs=attributes))
        return folder

    return store


def again(store, capsys, *options):
    code = exit_code_of(["trial", "--from", "tiny-study", "0", "--store", str(store), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def files_of(store):
    return {path.relative_to(store): path.read_bytes() for path in store.rglob("*.db")}


def test_an_honest_trial_agrees_and_its_store_is_left_as_it_was(stored, capsys):
    store = stored()
    before = files_of(store)
    code, answer = again(store, capsys)

    assert (code, answer["agrees"], answer["changed"]) == (0, True, [])
    assert {one["metric"] for one in answer["metrics"]} >= {"clip_prompt", "clip_reference", "psnr_db", "ssim"}
    assert files_of(store) == before
    assert not list(store.rglob("cache/*"))


def test_the_noise_floor_is_the_stored_one_and_is_not_measured_again(stored, capsys, monkeypatch):
    store = stored()
    monkeypatch.setattr("search.floor_measuring.render_changed", lambda *_, **__: pytest.fail("it was measured"))

    assert again(store, capsys)[0] == 0


def test_other_weights_do_not_agree(stored, capsys):
    code, answer = again(stored(source="1"), capsys)

    assert (code, answer["agrees"]) == (3, False)
    assert any(sentence.startswith("model digest") for sentence in answer["changed"])


def test_one_falsified_score_does_not_agree(stored, measured, capsys):
    own = measured[0]
    ssim = own.metrics["ssim"]
    better = ssim.model_copy(update={"values": tuple((value + 1) / 2 for value in ssim.values)})
    code, answer = again(stored(own.model_copy(update={"metrics": {**own.metrics, "ssim": better}})), capsys)

    assert code == 3
    assert [one["metric"] for one in answer["metrics"] if not one["agrees"]] == ["ssim"]


def test_a_trial_that_is_not_there_is_one_sentence(stored, capsys):
    store = stored()
    assert exit_code_of(["trial", "--from", "tiny-study", "7", "--store", str(store)]) == 1
    assert "has none of number 7" in capsys.readouterr().err
    assert exit_code_of(["trial", "--from", "tiny-study", "best", "--store", str(store)]) == 1
    assert exit_code_of(["trial", "tiny-study", "--store", str(store)]) == 1


def of(*values):
    return MetricResult(values=values, mean=sum(values) / len(values), std=0.0)


def test_distances_are_held_against_twice_the_floor():
    """A floor of 0.01 for ssim; clip_prompt has what float itself moved, 0.02; a lost score agrees with nothing."""
    floor = NoiseFloor(
        changes=("x",),
        identical=(),
        metrics={"ssim": MetricFloor(change="x", values=(0.99, 0.99), perfect=(1.0, 1.0))},
    )
    then = {"ssim": of(0.9, 0.8), "clip_prompt": of(0.3, 0.3), "motion": of(1.0, 1.0)}
    floats = ({"clip_prompt": of(0.3, 0.3)}, {"clip_prompt": of(0.32, 0.28)})
    now = {"ssim": of(0.915, 0.78), "clip_prompt": of(0.35, 0.25)}

    ssim, clip, motion = agreements(then, now, floor, floats, ("ssim", "clip_prompt", "motion", "unknown"))

    assert (ssim.distance, ssim.allowance) == (pytest.approx(0.0175), pytest.approx(0.02, rel=1e-3))
    assert ssim.agrees
    assert (clip.distance, clip.allowance) == (pytest.approx(0.05), pytest.approx(0.04, rel=1e-3))
    assert not clip.agrees
    assert math.isnan(motion.distance)
    assert not motion.agrees


def test_decibels_are_compared_as_the_error_they_stand_for():
    """40 dB are an RMSE of 0.01 and 60 dB one of 0.001; the floor lies at 60 dB."""
    floor = NoiseFloor(
        changes=("x",), identical=(), metrics={"psnr_db": MetricFloor(change="x", values=(60.0,), perfect=(100.0,))}
    )
    (one,) = agreements({"psnr_db": of(40.0)}, {"psnr_db": of(60.0)}, floor, ({}, {}), ("psnr_db",))

    assert one.distance == pytest.approx(0.009)
    assert one.allowance == pytest.approx(2 * (0.001 - 0.00001), rel=1e-3)
