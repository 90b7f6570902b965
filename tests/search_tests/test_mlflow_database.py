"""Looking at MLflow's database while this process has it open."""

import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from search.errors import StoreError
from search.mlflow_client import database_path, require_undamaged

ANOTHER_PROCESS = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("INSERT INTO kept VALUES (2)")
connection.commit()
connection.close()
"""


def test_looking_at_a_database_leaves_the_locks_of_this_process_alone(tmp_path):
    """Without them another process takes itself for the last one, and removes the log that is in use here."""
    path = database_path(tmp_path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE kept (value)")
        connection.execute("INSERT INTO kept VALUES (1)")
        connection.commit()
        require_undamaged(tmp_path)

        subprocess.run([sys.executable, "-c", ANOTHER_PROCESS, str(path)], check=True)

        assert path.with_name("mlflow.db-wal").exists()
        assert connection.execute("SELECT sum(value) FROM kept").fetchone() == (3,)


@pytest.mark.parametrize("content", [b"", None], ids=["empty", "missing"])
def test_a_store_without_a_database_is_as_good_as_new(tmp_path, content):
    if content is not None:
        database_path(tmp_path).write_bytes(content)

    require_undamaged(tmp_path)


def test_what_is_no_database_is_refused(tmp_path):
    database_path(tmp_path).write_bytes(b"a text, and a long one\n" * 100)

    with pytest.raises(StoreError, match=r"mlflow\.db must be MLflow's database, but is damaged or something else"):
        require_undamaged(tmp_path)
