import csv
import io
import json

import pytest
from optuna.trial import TrialState
from PIL import Image

from search.answers import devices_note, front_json, status_json, table_row, trial_json
from search.cli import exit_code_of
from search.importances import importances
from search.overview import read_overview
from search.plot_data import front_plot
from search.report import as_markdown, write_study_report


@pytest.fixture
def overview(filled_study):
    return read_overview(filled_study)


def test_a_report_is_files_for_people_and_programs(filled_study, small_study, tmp_path):
    write_study_report(tmp_path / "report", small_study, filled_study)
    files = {path.name for path in (tmp_path / "report").iterdir()}

    assert files == {
        "front.png", "front.html", "importances.json", "importances.png",
        "trials.csv", "trials.md", "trials.json", "study.yaml",
    }  # fmt: skip
    with Image.open(tmp_path / "report" / "front.png") as picture:
        assert picture.size == (1170, 780)
    page = (tmp_path / "report" / "front.html").read_text()
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page
    table = list(csv.DictReader(io.StringIO((tmp_path / "report" / "trials.csv").read_text())))
    assert [row["trial"] for row in table] == [str(number) for number in range(17)]
    assert len(json.loads((tmp_path / "report" / "trials.json").read_text())) == 17


def test_a_front_of_two_devices_says_so_in_status_front_and_report(
    filled_study, small_study, request, capsys, tmp_path
):
    overview = read_overview(filled_study)
    first, *others = (row.number for row in overview.front)
    assert others
    assert devices_note(overview) is None
    latency = filled_study.get_trials(deepcopy=False)[first].user_attrs["result"]["latency"]
    latency["hardware"] = "another processor"
    store = request.getfixturevalue("stored_store")

    write_study_report(tmp_path / "report", small_study, filled_study)
    told = [(tmp_path / "report" / "trials.md").read_text()]
    for command in ("status", "front"):
        assert exit_code_of([command, "demo", "--store", str(store)]) == 0
        told.append(capsys.readouterr().out)

    elsewhere, here = f"cpu (another processor): trials {first}; ", f"cpu: trials {', '.join(map(str, others))}"
    assert all(elsewhere + here in " ".join(text.split()) for text in told)
    assert status_json(read_overview(filled_study))["front_timed_on"] == {
        "cpu (another processor)": [first],
        "cpu": others,
    }


def test_a_study_without_a_trial_has_a_report_too(filled_study, small_study, tmp_path):
    import optuna

    empty = optuna.create_study(directions=["maximize", "minimize"])
    empty.set_user_attr("study_config", small_study.model_dump(mode="json"))
    write_study_report(tmp_path, small_study, empty)

    assert (tmp_path / "trials.csv").read_text() == "\n"
    assert not (tmp_path / "importances.json").exists()


def test_status_counts_every_trial_once_and_reused_ones_apart(overview):
    status = status_json(overview)

    assert status["trials"] == {
        "complete": 12, "infeasible": 1, "stopped": 0, "failed": 1, "running": 1, "waiting": 1, "reused": 1,
    }  # fmt: skip
    assert status["evaluated"] == 13
    assert status["front_size"] == len(front_json(overview))
    assert set(status["picks"]) == {"safe", "balanced", "fast"}


def test_the_front_is_what_optuna_calls_the_best_trials(overview, filled_study):
    best = {trial.number for trial in filled_study.best_trials if "reused_from" not in trial.user_attrs}

    assert {point["number"] for point in front_json(overview)} == best


def test_the_fast_pick_has_the_lowest_latency_and_the_safe_pick_the_best_quality(overview, filled_study):
    complete = filled_study.get_trials(states=(TrialState.COMPLETE,))
    picks = status_json(overview)["picks"]

    assert filled_study.trials[picks["fast"]].values[1] == min(trial.values[1] for trial in complete)
    assert filled_study.trials[picks["safe"]].values[0] == max(trial.values[0] for trial in complete)


def test_a_failed_trial_is_shown_with_its_reason(overview):
    shown = trial_json(overview.rows[13])

    assert (shown["state"], shown["values"]) == ("failed", None)
    assert "out of memory" in shown["reason"]
    json.dumps(shown, allow_nan=False)


def test_an_infeasible_trial_keeps_the_numbers_it_measured(overview):
    assert trial_json(overview.rows[12])["values"]["clip_reference"] == pytest.approx(0.3)


def test_a_bar_in_a_reason_does_not_break_the_markdown_table(overview):
    text = as_markdown([table_row(overview.rows[0], overview.config.space) | {"reason": "a|b"}])

    assert "a\\|b" in text
    assert len({line.replace("\\|", "").count("|") for line in text.splitlines()}) == 1


def test_importances_add_up_to_one_per_objective(filled_study, small_study):
    shares = importances(filled_study, small_study.objectives)

    assert list(shares) == ["clip_reference", "latency_ratio"]
    assert all(sum(share.values()) == pytest.approx(1.0) for share in shares.values())


def test_every_plotted_point_lies_inside_the_axes(overview):
    plot = front_plot(overview)

    assert plot.control == (1.0, None)
    assert len(plot.points) == 13
    for point in plot.points:
        assert plot.x.range[0] <= point.x <= plot.x.range[1]
        assert plot.y.range[1] <= point.y <= plot.y.range[0]
    assert [point.row.number for point in plot.points if point.is_clamped] == [12]


def test_axes_say_unit_and_direction(overview):
    plot = front_plot(overview)

    assert plot.x.label == "latency ratio [candidate / float], lower is better"
    assert plot.y.label == "1 - clip reference, log scale, up is better"


def test_a_similarity_is_drawn_as_its_gap_to_1_and_never_at_0(overview):
    plot = front_plot(overview)

    assert plot.y.is_gap
    assert plot.y.is_better_at_end
    for point in plot.points:
        if not point.is_clamped:
            assert point.y == pytest.approx(max(1.0 - point.row.values["clip_reference"], 1e-7))
