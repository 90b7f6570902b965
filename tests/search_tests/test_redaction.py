"""Passwords in the addresses of databases and servers are never shown."""

import os
import subprocess
import sys
import time

import optuna
import pytest

from hyquant.errors import ConfigError
from search.addresses import require_plain_address
from search.errors import StoreError
from search.order import ORDER_VARIABLE, WorkOrder
from search.recorder import Recorder
from search.redaction import blotted, names_a_secret, redacted
from search.report import write_study_report
from search.run_log import study_log
from search.study import Slot
from search.study_file import load_study


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://hyq:secret@db/hyq", "postgresql://hyq:***@db/hyq"),
        (
            "postgresql+psycopg://hyq:s3:cr3t@db:5432/hyq gave 'no'",
            "postgresql+psycopg://hyq:***@db:5432/hyq gave 'no'",
        ),
        ("mysql://u:p@ss@h/d and http://a:b@c:5000", "mysql://u:***@h/d and http://a:***@c:5000"),
        (
            "postgresql://db/hyq?user=hyq&password=secret&sslmode=require",
            "postgresql://db/hyq?user=hyq&password=***&sslmode=require",
        ),
        ("postgresql://hyq:se/cr@t@db/hyq", "postgresql://hyq:***@db/hyq"),
        (
            "mysql://db/h?ssl_key_password=s3&api_key=s4&charset=utf8",
            "mysql://db/h?ssl_key_password=***&api_key=***&charset=utf8",
        ),
        ("hyq:secret@db/hyq", "hyq:***@db/hyq"),
        ("postgresql:/hyq:secret@db/hyq", "postgresql:/hyq:***@db/hyq"),
        ("at 'postgresql://hyq:sec ... '", "at 'postgresql://hyq:*** ... '"),
        ("{'url': 'http://u:s@h/d'}", "{'url': 'http://u:***@h/d'}"),
        ("http://[::1]:5000/x", "http://[::1]:5000/x"),
        ("see https://sqlalche.me/e/20/e3q8, at 12:30:45", "see https://sqlalche.me/e/20/e3q8, at 12:30:45"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////work/optuna.db", "sqlite:////work/optuna.db"),
    ],
)
def test_only_passwords_are_hidden(text, shown):
    assert redacted(text) == shown
    assert len(blotted(text)) == len(text)
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        ("MLFLOW_TRACKING_PASSWORD", True),
        ("PGPASSWORD", True),
        ("MYSQL_PWD", True),
        ("HF_TOKEN", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("NCCL_PASS", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("CUDA_MODULE_LOADING", False),
        ("NCCL_BYPASS", False),
    ],
)
def test_a_secret_is_known_by_the_name_of_its_variable(name, is_secret):
    assert names_a_secret(name) is is_secret


def test_a_long_word_is_read_in_a_moment():
    started = time.process_time()
    for text in ("x" * 100_000, "a:" * 50_000, "a." * 50_000, "http://" * 10_000, "?a@" * 30_000):
        redacted(text)

    assert time.process_time() - started < 5.0


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://hyq:s3@cr3t@db/hyq",
        "postgresql://hyq:s3/cr3t@db/hyq",
        "http://hyq:12/s3cr3t@db",
        "http://hyq:12?s3cr3t@db",
        "http://hyq:s3#cr3t@db",
        "postgresql://hyq:s3[cr3t@db/hyq",
        "postgresql://hyq:s3 cr3t@db/hyq",
        "grpc://hyq:s3cr3t",
    ],
)
def test_an_address_that_readers_take_apart_differently_is_refused_without_its_password(address):
    with pytest.raises(StoreError, match="written as %40") as refused:
        require_plain_address(address)

    assert "cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://hyq:s3%40cr%2F3t@db:5432/hyq?sslmode=require",
        "sqlite:////work/a@b/optuna.db",
        "http://[::1]:5000",
        "databricks",
    ],
)
def test_an_address_that_has_one_meaning_is_taken(address):
    require_plain_address(address)


SHOWS = """
import logging, sys, warnings
from search.concealment import conceal_passwords
conceal_passwords()
URL = "postgresql://hyq:s3cr3t@db/hyq"
print(open("/proc/self/cmdline").read())
print("a remark", URL, file=sys.stderr)
logging.basicConfig(stream=sys.stderr)
logging.warning("a log of %s", URL)
warnings.warn(f"a warning of {URL}")
raise RuntimeError(f"a bug at {URL}")
"""


def test_a_process_shows_no_password_by_itself():
    """Neither its command line nor a log, a warning or the traceback of a bug."""
    command = [sys.executable, "-c", SHOWS, "--storage=postgresql://hyq:s3cr3t@db/hyq", "http://u:s3cr3t@h", "last"]

    done = subprocess.run(command, capture_output=True, text=True)

    arguments = done.stdout.strip().split("\0")
    assert arguments[3:6] == ["--storage=postgresql://hyq:******@db/hyq", "http://u:******@h", "last"]
    assert [done.stderr.count(word) for word in ("a remark", "a log", "a warning", "a bug")] == [1, 1, 1, 1]
    assert "s3cr3t" not in done.stdout + done.stderr


def test_a_worker_that_cannot_read_its_order_does_not_show_it():
    order = '{"url": "postgresql://hyq:s3cr3t@db/hyq", "store": 1}'
    command = [sys.executable, "-m", "search.worker"]

    done = subprocess.run(command, env=os.environ | {ORDER_VARIABLE: order}, capture_output=True, text=True)

    assert "ValidationError" in done.stderr
    assert "s3cr3t" not in done.stderr


def test_a_bug_in_a_trial_is_recorded_without_passwords(tmp_path):
    study = optuna.create_study()
    order = WorkOrder(store=tmp_path, url=None, study="demo", slot=0, first_trial=0, deadline=None, until_trial=None)
    trial = study.ask()

    with pytest.raises(RuntimeError), Recorder(study, order, restart_count=0).failures_recorded(trial, lambda: "score"):
        raise RuntimeError("at http://hyq:s3cr3t@mlflow:5000")

    kept = str(study.trials[0].user_attrs)
    assert kept.count("RuntimeError: at http://hyq:***@mlflow:5000") == 2
    assert study.trials[0].state == optuna.trial.TrialState.FAIL
    assert "s3cr3t" not in kept


def test_a_study_is_told_to_mlflow_without_its_places(small_study, tmp_path):
    config = small_study.model_copy(update={"storage": "postgresql://u:s3cr3t@h/d", "tracking": "http://u:s3cr3t@h"})
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.set_user_attr("study_config", config.stored_form())

    log = study_log(config).model_dump_json()
    write_study_report(tmp_path, config, study)

    assert "s3cr3t" not in log + (tmp_path / "study.yaml").read_text()
    assert small_study.name in log


def test_a_slot_that_would_store_a_secret_is_refused():
    for environment in ({"MLFLOW_TRACKING_PASSWORD": "s3cr3t"}, {"TORCH_MIRROR": "http://u:s3cr3t@h"}):
        with pytest.raises(ValueError, match="must hold no password"):
            Slot(environment=environment)


@pytest.mark.parametrize(
    "text",
    [
        "name: [x]\nstorage: {url: 'postgresql://hyq:s3cr3t@db/hyq'}\n",
        'storage: "postgresql://hyq:s3cr3tthatislongerthanwhatyamlshowsofaline@db/hyq\n',
        "storage: [postgresql://hyq:s3cr3t@db/hyq\n",
    ],
)
def test_a_broken_study_file_is_refused_without_its_passwords(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError) as refused:
        load_study(path)

    assert "s3cr3t" not in str(refused.value)
