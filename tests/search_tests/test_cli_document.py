"""The commands that docs/cli.md shows are run, and what they answer has the documented fields."""

import json
import re
from pathlib import Path

import pytest
import yaml

from hyquant.config import QuantConfig
from search.certificate import Certificate
from search.cli import exit_code_of
from search.margin_verdicts import MetricVerdict
from spaces.space import SearchSpace

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def section(name):
    sections = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return next(text for text in sections if text.splitlines()[0] == name)


def example(name):
    """Return the JSON that a section shows, its remarks taken out."""
    (block,) = re.findall(r"```json\n(.*?)```", section(name), flags=re.DOTALL)
    return json.loads(block)


def promised_fields(name):
    """Return the fields of an answer that a section writes in line, such as {"a", "b": ...}."""
    text = re.search(r"`--json` prints `\{(.*?)\}[`.]", section(name).replace("\n", " "))[1]
    depth, fields = 0, []
    for token in re.findall(r'[{}\[\]]|"\w+"', text):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token, 0)
        if depth == 0 and token.startswith('"'):
            fields.append(token.strip('"'))
    return set(fields)


@pytest.fixture
def answer(capsys):
    """Run a command and return exit code and JSON answer."""

    def run(*arguments):
        code = exit_code_of([*map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_status_and_front_answer_with_the_fields_of_the_examples(answer, stored_store):
    _, status = answer("status", "demo", "--store", stored_store)
    _, front = answer("front", "demo", "--store", stored_store)

    assert status.keys() == example("status").keys()
    assert status["trials"].keys() == example("status")["trials"].keys()
    assert front[0].keys() == example("front")[0].keys()


def test_metrics_answers_with_the_fields_of_the_example(answer):
    code, table = answer("metrics")
    (shown,) = example("metrics")

    assert code == 0
    assert next(row for row in table if row["name"] == "ssim") == shown


def test_what_is_exported_is_verified_and_rendered_as_the_document_says(answer, stored_store, tmp_path):
    out = tmp_path / "weights"
    code, exported = answer("export", "demo", "--pick", "safe", "--out", out, "--store", stored_store)
    verified_code, verified = answer("verify", out)
    other_code, other = answer("verify", out, "--target", "mindie-sd-3.1/910b")
    rendered_code, rendered = answer("render", out, "--prompt", "a red circle", "--size", "32x32", "--frames", "5")

    assert (code, verified_code, other_code, rendered_code) == (0, 0, 0, 0)
    assert exported.keys() == promised_fields("export")
    assert verified.keys() == example("verify").keys()
    assert verified["forward"][0].keys() == example("verify")["forward"][0].keys()
    assert verified["layer_checks"][0].keys() == example("verify")["layer_checks"][0].keys()
    assert other["target"] == "mindie-sd-3.1/910b"
    assert other["replaced"] == verified["layers"]
    assert rendered.keys() == promised_fields("render")


def test_what_the_target_ignores_is_exit_code_3_unless_allowed(answer, stored_store, tmp_path, capsys):
    out = tmp_path / "weights"
    answer("export", "demo", "--pick", "safe", "--out", out, "--layout", "diffusers", "--store", stored_store)
    refused, found = answer("verify", out, "--target", "mindie-sd-3.1/910b")
    allowed, _ = answer("verify", out, "--target", "mindie-sd-3.1/910b", "--allow-ignored")

    assert found["ok"]
    assert found["replaced"] == 0
    assert found["ignored"][0].keys() == example("verify")["ignored"][0].keys()
    assert (refused, allowed) == (3, 0)
    assert exit_code_of(["verify", str(out), "--target", "mindie-sd-3.1/910b"]) == 3
    captured = capsys.readouterr()
    assert "stays in float: the model has no module of that name" in captured.err
    assert "replaces 0 Linears" in captured.out


def test_an_export_of_msmodelslims_form_is_judged_without_a_manifest(answer, stored_store, tmp_path):
    out = tmp_path / "weights"
    answer("export", "demo", "--pick", "safe", "--out", out, "--store", stored_store)
    (out / "hyq_manifest.json").unlink()
    code, found = answer("verify", out)

    assert code == 0
    assert found["layer_counts"]["W8A8_TIMESTEP"] == found["layers"] > 0
    assert "give --model" in found["compared"]


def test_the_engine_that_is_not_installed_is_exit_code_1(stored_store, tmp_path, capsys, answer):
    out = tmp_path / "weights"
    answer("export", "demo", "--pick", "safe", "--out", out, "--store", stored_store)

    assert exit_code_of(["verify", str(out), "--engine"]) == 1
    assert "mindiesd" in capsys.readouterr().err


def test_sensitivity_answers_with_the_promised_fields_and_its_space_is_one(answer, stored_store):
    code, found = answer(
        "sensitivity", "demo", "--prompts", "1", "--ranges", "1", "--band", "2", "--store", stored_store
    )
    (block,) = re.findall(r"```yaml\n(.*?)```", section("sensitivity"), flags=re.DOTALL)

    assert code == 0
    assert found.keys() == promised_fields("sensitivity")
    assert SearchSpace.model_validate(yaml.safe_load(block)["space"]).exclusions == "ladder"


def test_explain_and_plan_answer_with_the_promised_fields(answer, stored_store):
    _, explained = answer("explain", "demo", "3", "--store", stored_store)
    _, planned = answer("plan", "demo", "--store", stored_store)

    assert explained.keys() == promised_fields("explain")
    assert planned.keys() == promised_fields("plan")


def test_doctor_answers_with_the_promised_fields(answer):
    _, found = answer("doctor")

    assert found.keys() == {"ok", "checks"}
    assert found["checks"][0].keys() == {"name", "verdict", "found", "way_out"}
    assert promised_fields("doctor") == found.keys()


def test_the_certificate_of_the_document_has_the_fields_of_one():
    shown = example("certify")

    assert shown.keys() == Certificate.model_fields.keys()
    assert shown["metrics"][0].keys() == MetricVerdict.model_fields.keys()
    assert Certificate.model_validate(shown).new_prompts == 56


def test_the_fields_that_may_change_are_those_that_are_no_part_of_a_studys_identity(small_study):
    (listed,) = re.findall(r"A study file may be changed in (.*?);", section("run"), flags=re.DOTALL)

    assert set(re.findall(r"`(\w+)`", listed)) == set(small_study.model_dump()) - set(small_study.identity())


def test_the_hand_written_quantization_is_one():
    (block,) = re.findall(r"```yaml\n(.*?)```", section("trial"), flags=re.DOTALL)

    assert QuantConfig.model_validate(yaml.safe_load(block)).linear.timestep_sep == 10
