import json
import shutil

from search.cli import exit_code_of
from search.doctor import Check, examine
from search.mlflow_client import prepare_store
from search.repair import repair
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


def test_a_missing_package_is_a_problem_with_a_way_that_needs_no_network(monkeypatch):
    monkeypatch.setattr("search.doctor.requires", lambda _: ["surely-not-installed>=2", 'torch_npu>=9; extra == "npu"'])
    checks = by_name(examine())

    assert checks["surely-not-installed"].verdict == "problem"
    assert "--no-index --find-links wheelhouse" in checks["surely-not-installed"].way_out
    assert checks["torch_npu"].verdict == "missing"


def test_a_machine_without_a_compiler_is_told_how_to_go_on(monkeypatch):
    monkeypatch.setattr("search.doctor.shutil.which", lambda _: None)

    assert "compile: false" in by_name(examine())["compiler"].way_out


def test_a_full_disk_is_a_problem(monkeypatch):
    monkeypatch.setattr("search.doctor.MIN_FREE_GIB", 1e9)

    assert by_name(examine())["disk"].verdict == "problem"


def test_databases_that_disagree_are_a_problem_until_they_are_repaired(
    stored_store, mlflow_template, small_study, capsys
):
    for part in mlflow_template.glob("mlflow.db*"):
        shutil.copy(part, stored_store / part.name)
    Tracker(stored_store, "demo").open_study(small_study)
    before = exit_code_of(["doctor", "demo", "--store", str(stored_store), "--json"])
    answer = json.loads(capsys.readouterr().out)
    repair(stored_store, open_study(stored_store, "demo"))
    after = exit_code_of(["doctor", "demo", "--store", str(stored_store), "--json"])

    assert (before, after) == (3, 0)
    assert not answer["ok"]
    assert "trial 0 has no MLflow run" in str(answer["checks"])
    assert json.loads(capsys.readouterr().out)["ok"]


def test_looking_at_a_store_twice_is_harmless(mlflow_store):
    prepare_store(mlflow_store)
    prepare_store(mlflow_store)
