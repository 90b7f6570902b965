import json
import shutil
from pathlib import Path

import yaml

from search.cli import exit_code_of
from search.doctor import Check, examine
from search.mlflow_client import prepare_store
from search.storage import open_study
from search.tracking import Tracker


def by_name(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_installation_can_run_the_shipped_study():
    checks = by_name(examine())

    assert {name for name, check in checks.items() if check.verdict == "problem"} == set()
    assert {"package names", "torch", "mlflow", "device cpu", "compiler", "mini model", "video", "disk"} <= set(checks)


def test_what_is_missing_comes_with_a_way_out():
    assert all(check.way_out for check in examine() if check.verdict != "ok" and not check.name.startswith("device"))


OPTIONAL = {"torch_npu": "npu", "psycopg": "servers", "atheris": "fuzz", "torchao": "bench", "ruff": "dev"}


def test_a_missing_package_is_a_problem_with_a_way_that_needs_no_network(monkeypatch):
    lines = ["surely-not-installed>=2", *(f'{name}>=999; extra == "{extra}"' for name, extra in OPTIONAL.items())]
    monkeypatch.setattr("search.doctor.requires", lambda _: lines)
    checks = by_name(examine())

    assert checks["surely-not-installed"].verdict == "problem"
    assert "--no-index --find-links wheelhouse" in checks["surely-not-installed"].way_out
    assert checks["torch_npu"].verdict == checks["psycopg"].verdict == "missing"
    assert "databases of many hosts only" in checks["psycopg"].found or "999 is needed" in checks["psycopg"].found
    assert not checks.keys() & {"atheris", "torchao", "ruff"}


def test_a_machine_without_a_compiler_is_told_how_to_go_on(monkeypatch):
    monkeypatch.setattr("search.doctor.shutil.which", lambda _: None)

    assert "compile: false" in by_name(examine())["compiler"].way_out


def test_a_full_disk_is_a_problem(monkeypatch):
    monkeypatch.setattr("search.doctor.MIN_FREE_GIB", 1e9)

    assert by_name(examine())["disk"].verdict == "problem"


def test_a_study_whose_parts_disagree_is_a_problem_until_it_is_repaired(
    stored_store, mlflow_template, small_study, capsys, monkeypatch
):
    monkeypatch.setattr("search.lease.GRACE_S", 0.1)
    for part in mlflow_template.glob("mlflow.db*"):
        shutil.copy(part, stored_store / part.name)
    Tracker.of(stored_store, open_study(stored_store, "demo")).open_study(small_study)
    doctor = ["doctor", "demo", "--store", str(stored_store), "--json"]
    codes, answers = [], []
    for options in ([], [], ["--repair"], []):
        codes.append(exit_code_of([*doctor, *options]))
        answers.append(json.loads(capsys.readouterr().out))

    assert codes == [3, 3, 0, 0]
    assert answers[0]["checks"] == answers[1]["checks"]  # looking has changed nothing
    assert "trial 0 has no MLflow run" in str(answers[0]["checks"])
    assert {(check["name"], check["verdict"]) for check in answers[2]["checks"]} >= {
        ("MLflow and Optuna", "mended"),
        ("trials", "mended"),
    }
    assert "mended" not in str(answers[3])


def test_the_disk_that_is_looked_at_is_that_of_the_studys_store(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    study = tmp_path / "study.yaml"
    shipped = yaml.safe_load((Path(__file__).parents[2] / "studies" / "mini.yaml").read_text())
    study.write_text(yaml.safe_dump({**shipped, "store": str(tmp_path / "elsewhere")}))

    assert by_name(examine(str(study)))["disk"].found.endswith(f"GiB free at {tmp_path / 'elsewhere'}")


def test_what_repair_does_not_change_it_does_not_offer(stored_store, mlflow_template, small_study, capsys, monkeypatch):
    monkeypatch.setattr("search.lease.GRACE_S", 0.1)
    for part in mlflow_template.glob("mlflow.db*"):
        shutil.copy(part, stored_store / part.name)
    Tracker(stored_store, "demo").open_study(small_study)  # another study: it has no id
    code = exit_code_of(["doctor", "demo", "--store", str(stored_store), "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    (found,) = (check for check in checks if check["name"] == "MLflow and Optuna")

    assert code == 3
    assert "another study of this name" in found["found"]
    assert found["way_out"] == "until then nothing is changed there"


def test_repair_needs_a_study():
    assert exit_code_of(["doctor", "--repair"]) == 1


def test_looking_at_a_store_twice_is_harmless(mlflow_store):
    prepare_store(mlflow_store)
    prepare_store(mlflow_store)
