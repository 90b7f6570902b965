"""Real servers that restart, recover, are killed or fall silent under a study that is being written to."""

import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import optuna
import pytest
from optuna.trial import TrialState

from search.databases import open_storage
from search.errors import StoreError
from search.lease import GRACE_S
from tests.toys.ports import free_port
from tests.toys.servers import mariadb, postgres

pytestmark = [pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(300)]

needs_postgres = pytest.mark.skipif(shutil.which("initdb") is None, reason="initdb (PostgreSQL) is not installed")
needs_mariadb = pytest.mark.skipif(shutil.which("mariadb-install-db") is None, reason="MariaDB is not installed")
needs_namespaces = pytest.mark.skipif(
    os.getuid() != 0 or not (shutil.which("unshare") and shutil.which("iptables")),
    reason="only root may make a network namespace, with unshare and iptables",
)


@contextmanager
def proxy_command(url, store):
    """Run `hyq-search storage-proxy` in front of a database; yield the proxy's address."""
    port = free_port()
    command = [sys.executable, "-c", "from search.cli import main; main()", "storage-proxy", "--port", str(port)]
    environment = os.environ | {"HYQ_STORAGE": url, "OMP_NUM_THREADS": "1"}
    with (store / "proxy.txt").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(
    params=[
        pytest.param("postgres", marks=needs_postgres),
        pytest.param("mariadb", marks=needs_mariadb),
        pytest.param("proxy", marks=needs_postgres),
    ]
)
def place(request, tmp_path):
    """A server that can be broken, and the address through which a study on it is reached."""
    with ExitStack() as stack:
        server = stack.enter_context(mariadb() if request.param == "mariadb" else postgres())
        open_storage(tmp_path, url=server.url, create=True)
        address = server.url
        if request.param == "proxy":
            address = stack.enter_context(proxy_command(server.url, tmp_path))
        yield server, address


def opened(url, store, *, create=False):
    return optuna.create_study(
        storage=open_storage(store, url=url, is_known=True, create=create),
        study_name="x",
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(),
    )


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_trials_that_are_written_while_a_server_breaks_are_there_once(place, tmp_path, how):
    server, url = place
    studies = [opened(url, tmp_path) for _ in range(3)]
    is_over = threading.Event()

    def work(study):
        told = {}
        while not is_over.is_set():
            trial = study.ask()
            x = trial.suggest_float("x", 0, 1)
            study.tell(trial, x)
            told[trial.number] = x
        return told

    with ThreadPoolExecutor(len(studies)) as pool:
        futures = [pool.submit(work, study) for study in studies]
        while len(opened(url, tmp_path).trials) < len(studies):
            time.sleep(0.2)
        getattr(server, how)()
        time.sleep(2.0)
        server.start()
        observer = opened(url, tmp_path)
        back = len(observer.trials)
        while len(observer.trials) <= back + len(studies):
            time.sleep(0.2)
        is_over.set()
        told = [future.result() for future in futures]

    expected = {number: x for one in told for number, x in one.items()}
    found = opened(url, tmp_path).trials
    assert len(expected) == sum(map(len, told)) > back > 0
    assert {trial.number: trial.value for trial in found} == expected
    assert {trial.state for trial in found} == {TrialState.COMPLETE}


@needs_postgres
def test_a_server_that_is_recovering_is_waited_for(tmp_path):
    """A restore command that takes its time keeps PostgreSQL where it answers, and says that it is not ready."""
    import psycopg

    with postgres() as server:
        opened(server.url, tmp_path, create=True).set_user_attr("a", 1)
        server.stop()
        data = server.command[server.command.index("-D") + 1]
        subprocess.run(["touch", f"{data}/recovery.signal"], user=server.user, check=True)
        server.command += ["-c", "restore_command=sleep 3; false"]
        server.start()
        with pytest.raises(psycopg.OperationalError, match=r"starting up|not yet accepting"):
            psycopg.connect(server.url)

        storage = open_storage(tmp_path, url=server.url)

        assert optuna.load_study(study_name="x", storage=storage).user_attrs["a"] == 1


@needs_postgres
def test_a_wrong_name_or_user_is_refused_at_once(tmp_path, caplog):
    """Whatever is tried again says before it waits that it waits."""
    with postgres() as server:
        for url in (server.url.replace("postgres:secret", "nobody:secret"), f"{server.url}-not-there"):
            with pytest.raises(StoreError, match="does not exist") as caught:
                open_storage(tmp_path, url=url)
            assert "secret" not in str(caught.value)

    assert "waiting for the study's database" not in caplog.text


DROP = """
    import subprocess, sys, time
    from pathlib import Path
    from search import databases
    from search.patience import Patience, database_errors, is_away
    from tests.toys import servers

    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with getattr(servers, sys.argv[1])() as server:
        store = Path(sys.argv[2])
        database = databases.open_database(store, create=True, url=server.url, patience=Patience())
        study = database.create_new_study([1], "x")
        rule = ["-p", "tcp", "--dport", str(server.port), "-j", "DROP"]
        subprocess.run(["iptables", "-A", "OUTPUT", *rule], check=True)
        started = time.monotonic()
        try:
            database.set_study_user_attr(study, "a", 1)
        except database_errors() as error:
            assert is_away(error), error
        else:
            raise AssertionError("nothing was dropped")
        print("waited", time.monotonic() - started)
        subprocess.run(["iptables", "-D", "OUTPUT", *rule], check=True)
        database.set_study_user_attr(study, "a", 2)
        print("found", database.get_study_user_attrs(study))
"""


@needs_namespaces
@pytest.mark.parametrize(
    "kind", [pytest.param("postgres", marks=needs_postgres), pytest.param("mariadb", marks=needs_mariadb)]
)
def test_a_network_that_drops_everything_is_noticed_before_a_lease_is_lost(kind, tmp_path):
    command = ["unshare", "--net", sys.executable, "-c", textwrap.dedent(DROP), kind, str(tmp_path)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert 2 < float(words[1]) < GRACE_S
    assert "{'a': 2}" in done.stdout
