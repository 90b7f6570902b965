"""`hyq-search sensitivity` on the tiny model: answers, files, resuming, and the ladder that a study takes from it."""

import json
import math
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import FixedTrial

from hyquant.config import digest
from hyquant.sensitivity.files import Journal, load_map
from hyquant.sensitivity.ladder import ladder
from search.cli import exit_code_of
from search.errors import SearchError
from search.prompts import load_prompts
from search.proposal import choose_config, claim
from search.runner import run_study
from search.sensitivity import ProbeOptions, measure_sensitivity, with_measured_ladder
from search.sensitivity_plots import panels_of, save_sensitivity_html, save_sensitivity_png
from search.storage import create_study, study_names
from search.study_file import load_study
from spaces.space import LADDER
from spaces.suggest import suggest

STUDY = {
    "name": "stairs",
    "model": {"kind": "tiny", "source": "0", "device": "cpu"},
    "space": {
        "name": "stairs",
        "strategies": ["dynamic", "m4"],
        "exclusions": LADDER,
        "switches": {"modulation": ["*_mod.*", "*modulation*"]},
        "presets": [{"name": "all", "params": {"strategy": "dynamic", "float_rungs": 0}}],
    },
    "workload": {
        "calibration_prompts": "mini:calibration",
        "search_prompts": "mini:search",
        "num_calibration_prompts": 2,
        "num_search_prompts": 1,
        "settings": {"height": 16, "width": 16, "num_frames": 1, "num_steps": 3},
    },
    "deployment": {"height": 16, "width": 16, "num_frames": 1, "num_steps": 3},
    "judge": {"model": "hashing"},
    "latency": {"rounds": 3, "warmup": 1, "compile": False},
    "budget": {"trials": 1},
}
QUICK = ProbeOptions(num_ranges=1, num_prompts=1, width=2)
COMMAND = ("--ranges", "1", "--prompts", "1", "--band", "2")


@pytest.fixture
def study_file(tmp_path):
    """Write the study file, with changes, beside a store of its own."""

    def write(**changes) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**STUDY, "store": str(tmp_path / "mlruns"), **changes}))
        return path

    return write


@pytest.fixture
def loaded(study_file):
    config = load_study(study_file())
    return config, load_prompts(config.workload, Path("."))


def test_the_command_answers_writes_its_files_and_measures_once(study_file, capsys):
    path = study_file()
    code = exit_code_of(["sensitivity", str(path), *COMMAND, "--json"])
    answer = json.loads(capsys.readouterr().out)
    files = {kind: Path(file) for kind, file in answer["files"].items()}
    found = load_map(files["json"])
    again = exit_code_of(["sensitivity", str(path), *COMMAND, "--json"])
    second = json.loads(capsys.readouterr().out)
    told_code = exit_code_of(["sensitivity", str(path), *COMMAND])
    told = capsys.readouterr().out

    assert (code, again, told_code) == (0, 0, 0)
    assert found is not None
    assert answer["subject"] == digest(found.subject) == files["json"].stem
    assert second == answer  # its seconds too, so nothing was measured again
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "Plotly" in files["html"].read_text()[:2_000_000]
    assert [file.suffix for file in files["json"].parent.glob("*.jsonl")] == []
    assert len(answer["bands"]) == len(answer["rows"]) == 10 + 3
    values = [band["sensitivity"] for band in answer["bands"]]
    assert values == sorted(values, reverse=True)
    assert all(value > 0 for value in values)
    assert answer["forwards"] == {"whole": 14.0, "kept": pytest.approx(1 + 0.5 + 10 + 1.5 + 1.0), "keeps_blocks": True}
    assert answer["ladder"][0] == []
    assert answer["bands"][0]["block"] in told
    assert "the work of 14 instead of 14 forwards" in told
    assert "ladder of 7 rungs" in told


def test_an_interrupted_measurement_goes_on_and_ends_as_one_that_was_not(loaded, tmp_path):
    config, prompts = loaded
    whole, _ = measure_sensitivity(config.model_copy(update={"store": str(tmp_path / "other")}), prompts, QUICK)
    counts = []

    def stop_at_five(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(config, prompts, QUICK, on_probe=stop_at_five)
    (journal,) = (tmp_path / "mlruns" / "sensitivity").glob("*.jsonl")
    kept = Journal(journal).measured
    found, path = measure_sensitivity(config, prompts, QUICK, on_probe=lambda done, total: counts.append((done, total)))

    assert len(kept) == 5
    assert counts == [(done, 13) for done in range(5, 14)]
    assert found.rows == whole.rows
    assert found.subject == whole.subject
    assert load_map(path) == found
    assert not journal.exists()


def test_probes_follow_their_options(loaded):
    config, prompts = loaded
    wide, _ = measure_sensitivity(config, prompts, QUICK)
    other, _ = measure_sensitivity(config, prompts, ProbeOptions(scheme="static", num_ranges=3, num_prompts=1, width=2))

    assert [part.probed for part in wide.subject.ranges] == [(1,)]
    assert [part.probed for part in other.subject.ranges] == [(0,), (1,), (2,)]
    assert other.subject.scheme.kind == "w8a8_static"
    assert len(other.rows) == 3 * len(wide.rows)
    assert {row.relative_l2 for row in other.rows}.isdisjoint(row.relative_l2 for row in wide.rows)


def test_a_scheme_with_ranges_is_measured_anew_if_any_prompt_that_sets_them_changes(loaded):
    """The map probes on the first prompt; ranges come from both."""
    config, prompts = loaded
    others = prompts.model_copy(update={"calibration": (prompts.calibration[0], "a prompt of its own")})
    static = ProbeOptions(scheme="static", num_ranges=1, num_prompts=1, width=2)
    (dynamic, dynamic_path), (ranged, ranged_path) = (
        measure_sensitivity(config, prompts, one) for one in (QUICK, static)
    )
    (same, same_path), (other, other_path) = (measure_sensitivity(config, others, one) for one in (QUICK, static))

    assert (same, same_path) == (dynamic, dynamic_path)
    assert other_path != ranged_path
    assert other.rows != ranged.rows


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompts", "3"), "probes take 1 to 2 calibration prompts of the study, but got 3"),
        (("--ranges", "4"), "steps are cut into 1 to 3 ranges"),
        (("--scheme", "w4a16"), "must be a multiple of 128"),
    ],
)
def test_what_cannot_be_probed_is_one_line(study_file, capsys, arguments, said):
    code = exit_code_of(["sensitivity", str(study_file()), *arguments])
    error = capsys.readouterr().err

    assert code == 1
    assert said in error
    assert error.count("\n") == 1


def test_a_study_without_its_map_is_refused_in_one_line_and_not_created(study_file, tmp_path, capsys):
    code = exit_code_of(["run", str(study_file())])
    error = capsys.readouterr().err

    assert code == 1
    assert error.strip().endswith("run hyq-search sensitivity first")
    assert error.count("\n") == 1
    assert study_names(tmp_path / "mlruns") == ()


def test_a_study_takes_the_ladder_of_its_map(loaded):
    config, prompts = loaded
    found, _ = measure_sensitivity(config, prompts, QUICK)

    ready = with_measured_ladder(config, prompts)

    assert ready.space.ladder == ladder(found)
    assert ready.model_copy(update={"space": config.space}) == config
    params = {"strategy": "dynamic", "float_rungs": 1, "switch_modulation": False}
    point = suggest(FixedTrial(params), ready.valid_space, num_steps=3)
    (worst,) = [row for row in found.rows if row.relative_l2 == max(other.relative_l2 for other in found.rows)]
    (band,) = [band for band in found.subject.bands if (band.block, band.kind) == (worst.block, worst.kind)]
    assert point.layers.exclude == (band.layers[0].replace(".0.", ".*."),)


def test_a_point_that_leaves_the_same_layers_in_float_is_answered_from_the_record(loaded, tmp_path, make_result):
    """The first rung's layer is a modulation, so with that switch on, rungs 0 and 1 are one quantization."""
    config, prompts = loaded
    found, _ = measure_sensitivity(config, prompts, QUICK)
    config = with_measured_ladder(config, prompts)
    study = optuna.create_study(directions=["maximize", "minimize"])
    for rung in (0, 1, 2):
        study.enqueue_trial({"strategy": "dynamic", "float_rungs": rung, "switch_modulation": True})

    def claimed():
        trial = study.ask()
        point = choose_config(trial, config)
        return trial, claim(trial, point, while_waiting=lambda: None)

    first, record = claimed()
    first.set_user_attr("result", make_result().model_dump(mode="json"))
    study.tell(first, (0.9, 0.8))
    answers = [claimed()[1] for _ in range(2)]

    assert "mod" in ladder(found).rungs[0][0]
    assert record is None
    assert answers[0] is not None
    assert answers[0].number == first.number
    assert answers[1] is None


def test_a_map_of_other_prompts_or_a_damaged_one_is_refused(loaded):
    config, prompts = loaded
    _, path = measure_sensitivity(config, prompts, QUICK)
    others = prompts.model_copy(update={"calibration": prompts.calibration[:1]})

    with pytest.raises(SearchError, match=r"has changed since it was measured; run hyq-search sensitivity first"):
        with_measured_ladder(config, others)
    path.write_text("{")
    with pytest.raises(SearchError, match=r"is damaged; run hyq-search sensitivity first"):
        with_measured_ladder(config, prompts)


def test_a_stored_study_keeps_its_ladder_when_the_map_is_measured_anew(mlflow_store, study_file, make_result):
    path = study_file()
    config = load_study(path)
    prompts = load_prompts(config.workload, path.parent)
    measure_sensitivity(config, prompts, QUICK)
    first = with_measured_ladder(config, prompts)
    study, _ = create_study(mlflow_store, first, prompts)
    result = make_result()

    def one(trial):
        trial.set_user_attr("config", result.config.model_dump(mode="json"))
        trial.set_user_attr("config_digest", result.config_digest)
        trial.set_user_attr("result", result.model_dump(mode="json"))
        return result.values

    study.optimize(one, n_trials=1)
    measure_sensitivity(config, prompts, ProbeOptions(num_ranges=1, num_prompts=1))
    events = []
    summary = run_study(config, study_file=path, on_event=events.append)

    assert with_measured_ladder(config, prompts).space.ladder != first.space.ladder
    assert events[0].message == "resumed study stairs with 1 of 1 trials evaluated"
    assert summary.evaluated == 1
    assert study.user_attrs["study_config"]["space"]["ladder"] == first.space.ladder.model_dump(mode="json")


def test_panels_show_each_error_where_its_layer_is(loaded, tmp_path):
    config, prompts = loaded
    found, _ = measure_sensitivity(config, prompts, ProbeOptions(num_ranges=2, num_prompts=1, width=2))
    broken = found.rows[0].model_copy(update={"relative_l2": None})
    found = found.model_copy(update={"rows": (broken, *found.rows[1:])})
    errors = {(row.block, row.kind, row.first_step): row.relative_l2 for row in found.rows}

    doubles, singles = panels_of(found)

    assert [panel.blocks for panel in doubles] == [("double_blocks.0-1",)] * 2
    assert [panel.blocks for panel in singles] == [("single_blocks.0-1",)] * 2
    assert [len(panel.kinds) for panel in (*doubles, *singles)] == [10, 10, 3, 3]
    assert [panel.title for panel in doubles] == ["steps 0-1", "step 2"]
    assert math.isnan(doubles[0].values[0][0])
    for panel, first_step in zip(singles, (0, 2), strict=True):
        expected = [errors["single_blocks.0-1", kind, first_step] for kind in panel.kinds]
        assert [10**value for value in panel.values[0]] == pytest.approx(expected)
    save_sensitivity_png(tmp_path / "map.png", found, "title")
    save_sensitivity_html(tmp_path / "map.html", found, "title")
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert "single_blocks.0-1" in (tmp_path / "map.html").read_text()
