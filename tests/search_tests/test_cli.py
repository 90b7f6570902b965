import json
import os
import shlex
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import typer.main
import yaml

from metrics.registry import METRICS
from search.cli import app, exit_code_of
from search.commands.studies import next_commands
from search.console import one_line
from search.patience import Patience

GROUP = typer.main.get_command(app)


@pytest.fixture
def call(capsys):
    """Run one command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = exit_code_of([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def study_file(tmp_path, small_study, stored_store) -> Path:
    content = small_study.model_dump(mode="json") | {"space": "mini", "store": str(stored_store)}
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def is_one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text


def test_help_answers_within_a_second_and_imports_nothing_heavy():
    code = (
        "import sys, search.cli; "
        "heavy = {'torch', 'mlflow', 'optuna', 'diffusers', 'matplotlib', 'plotly', 'av'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(search.cli.exit_code_of(['--help']))"
    )
    start = time.process_time()
    children = os.times().children_user
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    spent = os.times().children_user - children + time.process_time() - start

    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout
    assert spent < 1.0


def test_status_has_the_documented_shape(call, stored_store):
    code, out, _ = call("status", "demo", "--store", stored_store, "--json")
    answer = json.loads(out)

    assert code == 0
    assert answer["study"] == "demo"
    assert set(answer["trials"]) == {"complete", "infeasible", "stopped", "failed", "running", "waiting", "reused"}
    assert answer["evaluated"] == answer["trials"]["complete"] + answer["trials"]["infeasible"] == 13
    assert answer["front_size"] > 0


def test_front_has_the_documented_shape(call, stored_store):
    _, out, _ = call("front", "demo", "--store", stored_store, "--json")
    answer = json.loads(out)

    assert all({"number", "picks", "values", "config"} <= set(point) for point in answer)
    assert {name for point in answer for name in point["picks"]} == {"safe", "balanced", "fast"}
    assert set(answer[0]["values"]) == {"clip_reference", "latency_ratio"}


def test_a_study_is_found_by_its_file_and_by_its_name(call, stored_store, study_file):
    by_name = call("status", "demo", "--store", stored_store, "--json")
    by_path = call("status", study_file, "--json")

    assert by_path == by_name


@pytest.mark.parametrize("command", [("status",), ("front",), ("show", "0")], ids=lambda command: command[0])
def test_answers_for_people_are_plain_lines_without_a_terminal(call, stored_store, command):
    name, *rest = command
    code, out, _ = call(name, "demo", *rest, "--store", stored_store)

    assert code == 0
    assert out.strip()
    assert "\x1b" not in out
    assert "│" not in out


def test_metrics_shows_each_metric_in_a_line_with_its_direction_and_its_blind_spot(call):
    code, out, _ = call("metrics")
    lines = {line.split()[0]: line for line in out.splitlines()}

    assert code == 0
    assert {"metric", *METRICS} <= set(lines)
    for name, spec in METRICS.items():
        assert lines[name].split()[1] == {"maximize": "higher", "minimize": "lower"}[spec.direction]
        assert lines[name].endswith(spec.blind_to)


def test_show_names_config_scores_and_reason(call, stored_store):
    _, failed, _ = call("show", "demo", "13", "--store", stored_store)
    _, complete, _ = call("show", "demo", "0", "--store", stored_store)

    assert "out of memory" in failed
    assert "linear.timestep_sep: 2" in complete
    assert "clip_reference: 0.99" in complete


def test_reading_changes_no_file_of_the_store(call, stored_store):
    with closing(sqlite3.connect(stored_store / "optuna.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # or a connection does it later
    before = {path: path.read_bytes() for path in stored_store.iterdir() if path.suffix == ".db"}
    for command in ("status", "front"):
        call(command, "demo", "--store", stored_store)

    assert {path: path.read_bytes() for path in stored_store.iterdir() if path.suffix == ".db"} == before


def test_reading_creates_no_database(call, tmp_path):
    for command in (("status", "demo"), ("front", "demo"), ("show", "demo", "0"), ("ui", "demo"), ("doctor", "demo")):
        code, _, err = call(*command, "--store", tmp_path / "nowhere")

        assert code in (1, 3)
        assert command[0] == "doctor" or is_one_line(err)
    assert not (tmp_path / "nowhere").exists()


def broken_file(study_file: Path, **changes: object) -> Path:
    content = yaml.safe_load(study_file.read_text())
    content.update(changes)
    study_file.write_text(yaml.safe_dump(content))
    return study_file


def test_what_to_type_after_a_run_finds_the_study_as_the_run_did_and_holds_no_password():
    address = "postgresql://hyq:secret@db/hyq"
    told = next_commands("my studies/x.yaml", Path("/a b/store"), address, has_pages=True)
    front, ui, export = map(shlex.split, told.split("; "))
    place = ["my studies/x.yaml", "--store", "/a b/store"]

    assert front == ["hyq-search", "front", *place, "--storage", "postgresql://hyq:***@db/hyq"]
    assert ui == ["hyq-search", "ui", *place]
    assert export[:3] == ["hyq-search", "export", "my studies/x.yaml"]
    assert export[3:7] == front[3:]
    for command in (front, ui, export):
        options = {option for one in GROUP.commands[command[1]].params for option in one.opts}
        assert {word for word in command if word.startswith("--")} <= options


def test_what_to_type_after_a_plain_run_is_short():
    short = "hyq-search front demo; hyq-search ui demo; hyq-search export demo --pick balanced --out DIR"

    assert next_commands("demo", None, None, has_pages=True) == short
    assert "hyq-search ui" not in next_commands("demo", None, None, has_pages=False)


def test_an_unknown_study_lists_the_known_ones(call, stored_store):
    code, _, err = call("status", "demi", "--store", stored_store)

    assert code == 1
    assert is_one_line(err)
    assert "demo" in err


def test_a_missing_study_file_is_one_sentence(call):
    code, _, err = call("run", "nowhere/study.yaml")

    assert (code, is_one_line(err)) == (1, True)
    assert "nowhere/study.yaml" in err


def test_every_mistake_of_a_study_file_is_told_in_one_line(call, study_file):
    code, _, err = call("run", broken_file(study_file, bugdet={"trials": 3}, deployment="large"))

    assert (code, is_one_line(err)) == (1, True)
    assert "bugdet" in err
    assert "did you mean 'budget'" in err
    assert "deployment" in err


def test_a_study_file_that_is_no_yaml_is_one_sentence(call, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: [")
    code, _, err = call("status", path)

    assert (code, is_one_line(err)) == (1, True)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("linear: {kind: w8a8_statik}", "w8a8_statik"),
        ("lineer: null", "lineer"),
        ("just text", "must be a mapping of fields, but got str"),
        (None, "exist"),
    ],
    ids=["unknown kind", "unknown field", "no mapping", "missing"],
)
def test_a_bad_config_file_is_one_sentence(call, study_file, tmp_path, text, word):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    code, _, err = call("trial", study_file, path)

    assert (code, is_one_line(err)) == (1, True)
    assert word in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("show", "demo", "99"), "has trials 0 to 16, but got 99"),
        (("export", "demo", "--pick", "best", "--out", "x"), "a pick must be safe, balanced, fast or a trial's number"),
        (("export", "demo", "--pick", "99", "--out", "x"), "has no trial 99"),
        (("export", "demo", "--pick", "15", "--out", "x"), "trial 15 must have a config"),
    ],
    ids=["unknown trial", "unknown pick", "unknown number", "running trial"],
)
def test_asking_for_what_is_not_there_is_one_sentence(call, stored_store, arguments, sentence):
    code, _, err = call(*arguments, "--store", stored_store)

    assert (code, is_one_line(err)) == (1, True)
    assert sentence in err


@pytest.mark.parametrize("command", ["verify", "render"])
def test_a_folder_that_is_no_export_is_one_sentence(call, tmp_path, command):
    options = ("--prompt", "a red circle") if command == "render" else ()
    code, _, err = call(command, tmp_path, *options)

    assert (code, is_one_line(err)) == (1, True)
    assert "hyq_manifest.json" in err


@pytest.mark.parametrize(
    "arguments",
    [("fly",), ("status",), ("status", "demo", "--loud"), ("show", "demo", "five"), ("export", "demo")],
    ids=["command", "argument", "option", "type", "missing option"],
)
def test_wrong_usage_is_exit_code_2(call, arguments):
    code, _, err = call(*arguments)

    assert code == 2
    assert "Traceback" not in err


def test_an_interrupted_command_is_exit_code_130(call, monkeypatch, stored_store):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("search.locate.locate_study", interrupted)

    assert call("status", "demo", "--store", stored_store)[0] == 130


def test_a_bug_is_not_hidden(call, monkeypatch, stored_store):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("search.locate.locate_study", broken)

    with pytest.raises(ZeroDivisionError):
        call("status", "demo", "--store", stored_store)


def test_a_damaged_database_is_one_sentence(call, stored_store):
    (stored_store / "optuna.db").write_text("not a database at all, but a long text " * 100)
    for suffix in ("-wal", "-shm"):
        Path(f"{stored_store / 'optuna.db'}{suffix}").unlink(missing_ok=True)
    code, _, err = call("status", "demo", "--store", stored_store)

    assert (code, is_one_line(err)) == (1, True)


def test_a_locked_store_is_one_sentence(call, stored_store, monkeypatch):
    monkeypatch.setattr("search.databases.BUSY_TIMEOUT_S", 0.1)
    monkeypatch.setattr("search.databases.Patience", partial(Patience, patience_s=0.5))
    holder = sqlite3.connect(stored_store / "optuna.db")
    holder.execute("BEGIN IMMEDIATE")
    code, _, err = call("status", "demo", "--store", stored_store)
    holder.close()

    assert (code, is_one_line(err)) == (1, True)
    assert "locked" in err


def test_a_list_of_problems_becomes_one_line():
    assert one_line("file x breaks 2 rules:\n  - a: b\n  - c: d") == "file x breaks 2 rules: a: b; c: d"
