"""Where results come from: versions of the clone, the packages, drivers that are there, and no passwords."""

import subprocess
from pathlib import Path

import torch

from search.provenance import chosen_environment, code_version, differences, driver_versions, provenance_here


def test_the_commit_of_a_clone_and_whether_it_was_changed(tmp_path):
    def git(*arguments):
        options = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", *options, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert code_version(tmp_path / "nothing") == ""
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    commit = code_version(tmp_path)
    assert len(commit) == 40
    assert not commit.endswith("+")
    (tmp_path / "a").write_text("2")
    code_version.cache_clear()
    assert code_version(tmp_path) == commit + "+"


def test_drivers_that_are_there_say_their_first_line(tmp_path):
    (tmp_path / "version.info").write_text("Version=24.1.0\nascendhal_version=7\n")

    assert driver_versions({"ascend driver": tmp_path / "version.info", "cann": Path("/nowhere/version.cfg")}) == {
        "ascend driver": "Version=24.1.0"
    }


def test_only_variables_of_devices_and_collectives_are_kept():
    environment = {"HCCL_IF_BASE_PORT": "61000", "HYQ_STORAGE": "postgresql://u:secret@h/x", "HOME": "/root"}

    assert chosen_environment(environment) == {"HCCL_IF_BASE_PORT": "61000"}


def test_differences_are_named_and_ports_are_none():
    one = provenance_here(torch.device("cpu"), seed=1, ranks=8, digests={"model": "a"})
    other = one.model_copy(
        update={
            "packages": {**one.packages, "torch": "0.0.1"},
            "environment": {**one.environment, "HCCL_IF_BASE_PORT": "61000"},
            "ranks": 1,
            "digests": {"model": "b"},
        }
    )

    assert one.packages["optuna"].startswith(("4", "5"))
    assert differences(one, one) == ()
    assert set(differences(one, other)) == {
        f"torch {one.packages['torch']} -> 0.0.1",
        "ranks 8 -> 1",
        "model digest a -> b",
    }
