from pathlib import Path

import pytest

from tests.toys.faulty import Faults, install


@pytest.fixture
def faults(tmp_path, monkeypatch) -> Faults:
    """The model that fails on command, installed for this process and for those that it starts."""
    folder = tmp_path / "plugin"
    folder.mkdir()
    installed = install(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).parents[2]}")
    monkeypatch.syspath_prepend(str(folder))
    return installed
