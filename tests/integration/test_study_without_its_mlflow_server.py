"""A study run for real while its MLflow server accepts connections and never answers; mended when a server is there."""

import json
import socket
import subprocess
import sys

import pytest
import yaml

from search.cli import exit_code_of
from tests.toys.mlflow_server import mlflow_server
from tests.toys.tiny_study import TINY_STUDY

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]

MAIN = "from search.cli import main; main()"


def test_a_study_runs_without_its_server_and_doctor_brings_everything_there(tmp_path, capsys):
    plan = {**TINY_STUDY, "store": str(tmp_path / "store"), "budget": {"trials": 2}, "slots": [{"ranks": 1}]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    for name in ("calibration", "search"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} prompt {index}\n" for index in range(3)))
    study = str(tmp_path / "study.yaml")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-c", MAIN, "run", study, "--tracking-uri", uri]
        run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    server = mlflow_server(tmp_path)
    server.start()
    try:
        codes = []
        for options in ([], ["--repair"], []):
            codes.append(exit_code_of(["doctor", study, "--tracking-uri", server.url, "--json", *options]))
            answer = json.loads(capsys.readouterr().out)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=server.url)
        runs = client.search_runs([client.get_experiment_by_name("tiny-study").experiment_id])
        held = [{file.path for file in client.list_artifacts(run.info.run_id)} for run in runs]
    finally:
        server.kill()

    assert run.returncode == 0, run.stderr
    assert codes == [3, 0, 0]
    assert answer["ok"]
    assert sum("videos.mp4" in paths for paths in held) >= 2
    assert sum("study.yaml" in paths for paths in held) == 1
    assert not [path for path in (tmp_path / "store").rglob("*") if path.stat().st_mode & 0o007]
