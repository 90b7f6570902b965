"""Where the time goes, what recipes can gain, and latencies of devices that are not there."""

import dataclasses
import json

import pytest
import yaml

from hyquant.config import LayerSelection, QuantConfig, W8A8Dynamic
from hyquant.cost import DeviceProfile
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from hyquant.profile import DenoiserProfile, PartTime
from search.answers import status_json, table_row, trial_lines
from search.cli import exit_code_of
from search.locks import HostLock
from search.logged import result_metrics
from search.objective import run_trial
from search.overview import read_overview
from search.prepare import prepare_workbench
from search.profiling import ceiling_sentence, ceilings, stored_profile
from search.prompts import StudyPrompts
from search.stages import Stages
from search.study_file import load_study
from spaces.space import load_space

DEVICE = {"name": "paper card", "peak_tflops": {"bfloat16": 100, "int8": 200}}
PROMPTS = StudyPrompts(calibration=("one red cube",), search=("a green cone", "a grey ring"))
STUDY = """
name: small
store: {store}
model: {{kind: hunyuan_video, source: mini, device: cpu}}
space: mini
workload:
  calibration_prompts: mini:calibration
  search_prompts: mini:search
  settings: {{height: 32, width: 32, num_frames: 5, num_steps: 2}}
deployment: {{height: 32, width: 32, num_frames: 5, num_steps: 2}}
judge: {{model: hashing}}
latency: {latency}
"""


@pytest.fixture
def study_file(tmp_path):
    def write(latency="{rounds: 3, warmup: 1, compile: false}"):
        path = tmp_path / "study.yaml"
        path.write_text(STUDY.format(store=tmp_path / "mlruns", latency=latency))
        return path

    return write


@pytest.fixture
def bench(small_study, tmp_path):
    return prepare_workbench(
        small_study,
        PROMPTS,
        group=Group(),
        device=resolve_device("cpu"),
        cache=tmp_path / "cache",
        lock=HostLock(tmp_path / "locks"),
    )


def on_paper(bench, **changes):
    latency = bench.config.latency.model_copy(update={"device_profile": DeviceProfile(**DEVICE | changes)})
    return dataclasses.replace(bench, config=bench.config.model_copy(update={"latency": latency}))


def test_the_table_on_paper_has_the_seconds_of_the_published_model(tmp_path, capsys):
    file = tmp_path / "card.yaml"
    file.write_text(yaml.safe_dump({"name": "910B", "peak_tflops": {"bfloat16": 313, "int8": 626}}))
    code = exit_code_of(["profile", "--device-profile", str(file), "--clip", "544x960x33", "--json"])
    answer = json.loads(capsys.readouterr().out)

    assert code == 0
    assert answer["video_tokens"] == 18360
    assert sum(part["share"] for part in answer["parts"]) == pytest.approx(1)
    assert sum(part["float_s"] for part in answer["parts"]) == pytest.approx(answer["step_s"]["float"])
    assert [round(seconds, 2) for seconds in answer["step_s"].values()] == [1.63, 1.27, 1.22, 0.81]


def test_the_shipped_device_profile_gives_a_readable_table(capsys):
    code = exit_code_of(["profile", "--device-profile", "studies/devices/ascend_910b.yaml"])
    told = capsys.readouterr().out

    assert code == 0
    assert "predicted for Ascend 910B" in told
    assert "64.26 s a step, 3213 s a clip" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of them"),
        (["--device-profile", "nowhere.yaml"], "nowhere.yaml"),
        (["--device-profile", "studies/devices/ascend_910b.yaml", "--clip", "720x1280"], "--clip must be"),
        (["--device-profile", "studies/devices/ascend_910b.yaml", "--clip", "721x1280x129"], "--clip must be"),
        (["--device-profile", "studies/devices/ascend_910b.yaml", "--clip", "720x1280x130"], "1 + a multiple of 4"),
        (["--device-profile", "studies/mini.yaml"], "see studies/devices"),
        (["studies/mini.yaml", "--device-profile", "x.yaml"], "give one of them"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys):
    code = exit_code_of(["profile", *arguments])
    error = capsys.readouterr().err

    assert code == 1
    assert said in error
    assert error.count("\n") == 1


def test_a_study_is_measured_part_by_part(study_file, capsys):
    path = study_file()
    code = exit_code_of(["profile", str(path), "--json"])
    answer = json.loads(capsys.readouterr().out)
    kinds = {part["kind"] for part in answer["parts"]}

    assert code == 0
    assert {"img qkv", "img fc1", "linear1", "linear2", "text side", "attention"} <= kinds
    assert set(answer["ceilings"]) == set(load_space("mini").exclusions)
    assert all(value >= 1 for value in answer["ceilings"].values())
    assert answer["decode_s"] > 0

    code = exit_code_of(["profile", str(path)])
    told = capsys.readouterr().out

    assert code == 0
    assert "norms, modulation, rest" in told
    assert "  none: " in told


def test_ceilings_follow_the_exclusion_sets():
    space = load_space("mini")
    parts = [
        PartTime(kind=kind, layers=(name,), size="", operations=0, float_s=2.0, speedup=2.0, kernel="vnni")
        for kind, name in (("img fc1", "double_blocks.0.img_mlp.fc1"), ("img fc2", "double_blocks.0.img_mlp.fc2"))
    ]
    found = DenoiserProfile(shape="here", device="cpu", compiled=True, step_s=8.0, parts=tuple(parts))
    space = space.model_copy(update={"exclusions": {"none": (), "fc2": ("*fc2*",)}})

    assert ceilings(found, space) == {"none": 8 / 6, "fc2": 8 / 7}
    assert "1.33 (none), 1.14 (fc2); here" in ceiling_sentence(found, space)


def test_a_profile_is_measured_once_and_kept(bench):
    first = stored_profile(bench)

    assert first is not None
    assert stored_profile(bench) == first


def test_a_profile_of_another_processor_is_not_taken(bench, monkeypatch):
    """Hosts share the folder where it is kept."""
    here = stored_profile(bench)
    theirs = here.model_copy(update={"step_s": 2 * here.step_s})
    monkeypatch.setattr("search.profiling.measured_profile", lambda timed: theirs)
    assert stored_profile(bench) == here

    monkeypatch.setattr("hyquant.latency.device_name", lambda device: "cpu of another host")

    assert stored_profile(bench) == theirs


def test_each_trial_says_the_ceiling_of_its_plan(bench):
    names = tuple(group.name for group in bench.model.groups())
    part = PartTime(kind="img fc1", layers=names, size="", operations=0, float_s=1.0, speedup=2.0, kernel="vnni")
    bench.profile = DenoiserProfile(shape="", device="cpu", compiled=False, step_s=2.0, parts=(part,))
    config = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(include=("*",)))

    result = run_trial(bench, config, Stages(Group())).result

    assert result.latency.ceiling == pytest.approx(2 / 1.5)
    assert ("speedup_ceiling", result.latency.ceiling) in [(m.name, m.value) for m in result_metrics(result)]


def test_a_study_with_a_device_profile_predicts_and_times_nothing(bench):
    paper = on_paper(bench)
    result = run_trial(paper, QuantConfig(linear=W8A8Dynamic()), Stages(Group())).result
    control = run_trial(paper, QuantConfig(linear=None), Stages(Group())).result

    assert result.latency.kind == "predicted"
    assert result.latency.rounds == 0
    assert result.latency.conditions == "predicted, paper card on paper"
    assert 0.5 < result.latency.ratio < 1
    assert control.latency.ratio == 1
    assert stored_profile(paper) is None


def test_a_device_without_int8_gains_nothing(bench):
    paper = on_paper(bench, peak_tflops={"bfloat16": 100})
    result = run_trial(paper, QuantConfig(linear=W8A8Dynamic()), Stages(Group())).result

    assert result.latency.ratio == 1


def test_a_study_file_may_name_a_device_profile_beside_it(study_file, tmp_path):
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(DEVICE))

    assert load_study(study_file("{device_profile: card.yaml}")).latency.device_profile.name == "paper card"


def test_what_gains_too_much_is_flagged_everywhere(filled_study, make_result):
    overview = read_overview(filled_study)
    row = overview.rows[0]
    latency = row.result.latency.model_copy(update={"ceiling": 1.2, "ratio": 0.3})
    odd = dataclasses.replace(row, result=row.result.model_copy(update={"latency": latency}))
    flagged = dataclasses.replace(overview, rows=(odd, *overview.rows[1:]))

    assert status_json(overview)["measurement_errors"] == []
    assert status_json(flagged)["measurement_errors"] == [row.number]
    assert any("measurement error: the gain of 3.33 is above the ceiling of 1.20" in line for line in trial_lines(odd))


def test_a_predicted_latency_is_called_so(filled_study):
    overview = read_overview(filled_study)
    row = overview.rows[0]
    latency = row.result.latency.model_copy(update={"kind": "predicted", "device": "910B on paper"})
    paper = dataclasses.replace(row, result=row.result.model_copy(update={"latency": latency}))

    assert table_row(paper, overview.config.space)["latency"] == "predicted"
    assert any("predicted for 910B on paper" in line for line in trial_lines(paper))
