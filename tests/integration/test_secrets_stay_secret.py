"""A study on servers with passwords, from its start to its export: no file, row, output or command line holds one."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from urllib.parse import quote

import pytest
import sqlalchemy
import yaml

from tests.toys.leaks import in_files, in_rows, in_text, watched_command_lines
from tests.toys.mlflow_server import mlflow_server
from tests.toys.ports import free_port
from tests.toys.servers import postgres
from tests.toys.tiny_study import TINY_STUDY

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("initdb") is None, reason="initdb (PostgreSQL) is not installed"),
]

NAME = f"secrets-{uuid.uuid4().hex[:8]}"  # no other test that runs now has it
MAIN = "from search.cli import main; main()"
QUERY = "a secret in the database's query string"
SECRETS = {
    "the database's password": "d6:Vq@ta/base",
    QUERY: "q-Ww27-uery",
    "the MLflow password": "ml-Zk81-flow",
    "MLFLOW_TRACKING_PASSWORD": "env-Jt93-pass",
    "a token that devices listen to": "tok-Xr55-lab",
    "a password of a mirror": "mir-Hb20-ror",
    "a wrong password": "wr-Nc64-ong",
}
ENVIRONMENT = {
    "MLFLOW_TRACKING_USERNAME": "hyq",
    "MLFLOW_TRACKING_PASSWORD": SECRETS["MLFLOW_TRACKING_PASSWORD"],
    "NCCL_LAB_TOKEN": SECRETS["a token that devices listen to"],
    "TORCH_MIRROR": f"https://hyq:{SECRETS['a password of a mirror']}@mirror.example/torch",
    "OMP_NUM_THREADS": "1",
}


class Site:
    """A study, its servers, and what its commands have printed, in files beside its store."""

    def __init__(self, folder: Path, storage: str, tracking: str):
        self.folder, self.storage, self.tracking = folder, storage, tracking
        self.num_started = 0
        (folder / "printed").mkdir()
        (folder / "home").mkdir()
        (folder / "study").mkdir()
        (folder / "study" / "calibration.txt").write_text("one red cube\ntwo red cubes\n")
        (folder / "study" / "search.txt").write_text("a cone\na ball\na green ball\n")
        plan = {**TINY_STUDY, "name": NAME, "budget": {"trials": 1}, "store": str(folder / "store")}
        (folder / "study" / "study.yaml").write_text(yaml.safe_dump(plan))

    def start(self, *arguments: str, storage: str | None = None) -> subprocess.Popen:
        """Start a command under a umask that forbids nothing."""
        command = [sys.executable, "-c", MAIN, *arguments]
        command += ["--storage", storage or self.storage]
        environment = os.environ | ENVIRONMENT | {"TMPDIR": str(self.folder / "home")}
        self.num_started += 1
        with (self.folder / "printed" / f"{self.num_started}-{arguments[0]}.txt").open("wb") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, umask=0)

    def command(self, *arguments: str, storage: str | None = None) -> int:
        return self.start(*arguments, storage=storage).wait(240)

    def printed(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.folder / "printed").iterdir()))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The study after all its commands; MLflow was away while it ran, so that its spool was used."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "mlflow").mkdir()
    server = mlflow_server(folder / "mlflow")
    with postgres(SECRETS["the database's password"]) as database:
        storage = f"{database.url}?sslpassword={SECRETS[QUERY]}"
        tracking = server.url.replace("//", f"//hyq:{SECRETS['the MLflow password']}@")
        site = Site(folder, storage.replace("postgresql:", "postgresql+psycopg:"), tracking)
        study = str(folder / "study" / "study.yaml")
        with watched_command_lines(SECRETS, given=MAIN, at_work=f"rdzv-id={NAME}-slot0") as site.seen:
            nobody = f"postgresql://hyq:{SECRETS['a wrong password']}@127.0.0.1:{free_port()}/hyq"
            mistaken = database.url.replace(
                quote(SECRETS["the database's password"], safe=""), SECRETS["a wrong password"]
            )
            failing = [site.start("status", study, storage=storage) for storage in (nobody, mistaken)]
            site.codes = [site.command("run", study, "--tracking-uri", tracking)]
            site.spooled = in_files(folder / "store", SECRETS)
            site.failures = [process.wait(240) for process in failing]
            others = [
                site.start("front", study),
                site.start("export", study, "--pick", "0", "--out", str(folder / "out")),
            ]
            server.start()
            site.codes.append(site.command("doctor", study, "--repair", "--tracking-uri", tracking))
            site.codes += [process.wait(240) for process in others]
        server.stop()
        site.rows = in_rows(site.storage, SECRETS), in_rows(f"sqlite:///{folder}/mlflow/server.db", SECRETS)
        yield site


def test_the_study_ran_and_the_failures_failed(site):
    assert site.codes == [0, 0, 0, 0], site.printed()
    assert site.failures == [1, 1], site.printed()
    assert "the MLflow server http://hyq:***@127.0.0.1" in site.printed()
    assert (site.folder / "out" / "hyq_manifest.json").is_file()
    assert list((site.folder / "mlflow" / "files").rglob("videos.mp4"))
    assert "password authentication failed" in site.printed()


def test_no_file_holds_a_secret(site):
    """The store while MLflow was away and afterwards, MLflow's database and artifacts, the export, what was printed."""
    assert site.spooled == []
    assert in_files(site.folder, SECRETS) == []


def test_no_row_of_either_database_holds_a_secret(site):
    assert site.rows == ([], [])


def test_no_command_line_holds_a_secret(site):
    """Processes that a user gave one to hide it before their slots start."""
    lines = [line for known in site.seen.command_lines.values() for line in known]

    assert any(NAME in line and "search.agent" in line for line in lines)
    assert any(MAIN in line and ":****" in line for line in lines)
    assert site.seen.leaks == set()
    assert site.seen.late_leaks == set()


def test_nothing_in_the_store_or_the_export_is_for_others_to_read(site):
    paths = [path for name in ("store", "out") for path in (site.folder / name).rglob("*")]

    assert len(paths) > 20
    assert [path for path in paths if path.stat().st_mode & 0o027] == []


def test_a_planted_secret_is_found(site, tmp_path):
    planted = {"planted": "pl-Gd38/ant"}
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "log.txt").write_text("at postgresql://u:pl-Gd38%2Fant@h/d")
    engine = sqlalchemy.create_engine(site.storage)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE planted (number INTEGER, note TEXT)")
        connection.exec_driver_sql("INSERT INTO planted VALUES (1, 'it is pl-Gd38/ant')")
    with watched_command_lines(planted, given="nothing", at_work="nobody") as seen:
        process = subprocess.Popen([sys.executable, "-c", "input()", "pl-Gd38/ant"], stdin=subprocess.PIPE)
        while not seen.leaks and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdin.close()

    assert in_text(b"x pl-Gd38/ant", planted) == {"planted"}
    assert in_files(tmp_path, planted) == ["deep/log.txt: planted"]
    assert in_rows(site.storage, planted) == ["planted: planted"]
    assert len(seen.leaks) == 1
    engine.dispose()
