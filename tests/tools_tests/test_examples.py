"""The examples of docs/examples: options exist, scripts parse, and the Job has no field that batch/v1 does not have."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Literal

import pytest
import typer
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from search.cli import app
from search.locate import STORAGE_VARIABLE

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
SBATCH, JOB = EXAMPLES / "worker.sbatch", EXAMPLES / "worker-job.yaml"


class Strict(BaseModel):
    """The part of Kubernetes' batch/v1 and core/v1 that the example uses; any other field is refused.

    Source: Kubernetes API reference, Job v1 batch and Pod v1 core.
    """

    model_config = ConfigDict(extra="forbid", strict=True)


class SecretKey(Strict):
    name: str
    key: str


class ValueFrom(Strict):
    secretKeyRef: SecretKey


class Variable(Strict):
    name: str
    valueFrom: ValueFrom


class Resources(Strict):
    requests: dict[str, str]
    limits: dict[str, str]


class Mount(Strict):
    name: str
    mountPath: str


class Container(Strict):
    name: str
    image: str
    args: list[str]
    env: list[Variable]
    resources: Resources
    volumeMounts: list[Mount]


class Claim(Strict):
    claimName: str


class EmptyDir(Strict):
    medium: Literal["", "Memory"] = ""
    sizeLimit: str


class Volume(Strict):
    name: str
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class PodSpec(Strict):
    restartPolicy: Literal["OnFailure", "Never"]
    terminationGracePeriodSeconds: int
    containers: list[Container]
    volumes: list[Volume]


class Template(Strict):
    spec: PodSpec


class JobSpec(Strict):
    completionMode: Literal["Indexed", "NonIndexed"]
    completions: int
    parallelism: int
    backoffLimit: int
    template: Template


class Metadata(Strict):
    name: str


class Job(Strict):
    apiVersion: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: Metadata
    spec: JobSpec


def test_the_job_is_one_and_its_mounts_have_volumes():
    job = Job.model_validate(yaml.safe_load(JOB.read_text()))

    (container,) = job.spec.template.spec.containers
    volumes = {volume.name for volume in job.spec.template.spec.volumes}
    assert {mount.name for mount in container.volumeMounts} == volumes
    for quantity in (*container.resources.requests.values(), *container.resources.limits.values()):
        assert re.fullmatch(r"\d+(Ki|Mi|Gi|Ti)?", quantity)


def test_a_misspelt_field_is_refused():
    content = yaml.safe_load(JOB.read_text())
    content["spec"]["template"]["spec"]["restartpolicy"] = "OnFailure"

    with pytest.raises(ValidationError, match="restartpolicy"):
        Job.model_validate(content)


@pytest.mark.parametrize("path", [SBATCH, JOB], ids=lambda path: path.name)
def test_every_option_is_one_of_the_worker_command(path):
    text = "\n".join(line for line in path.read_text().splitlines() if not line.strip().startswith("#"))
    used = set(re.findall(r"--[a-z-]+", text))
    worker = typer.main.get_command(app).commands["worker"]

    assert {"--shared", "--store", "--slots"} <= used
    assert used <= {option for parameter in worker.params for option in parameter.opts}


def test_the_job_gives_the_entry_point_of_the_images_a_command_of_ours():
    """A `command:` would replace the entry point, and with it the environment that an Ascend image sets up."""
    (container,) = Job.model_validate(yaml.safe_load(JOB.read_text())).spec.template.spec.containers

    assert container.args[0] in typer.main.get_command(app).commands


def test_the_address_of_the_database_reaches_the_worker_by_its_variable_and_is_on_no_command_line():
    (container,) = Job.model_validate(yaml.safe_load(JOB.read_text())).spec.template.spec.containers
    commands = [*container.args, *SBATCH.read_text().split("hyq-search worker")[-1].split()]

    assert [variable.name for variable in container.env] == [STORAGE_VARIABLE]
    assert f"export {STORAGE_VARIABLE}" in SBATCH.read_text()
    assert not [word for word in commands if "storage" in word.lower()]


def test_the_batch_script_parses():
    assert subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True).returncode == 0


@pytest.mark.multiproc
def test_the_batch_script_hands_the_signal_on_and_waits_for_the_trial_in_hand(tmp_path):
    fake = tmp_path / "hyq-search"
    fake.write_text(
        '#!/bin/bash\ntrap \'echo asked >> "$LOG"; sleep 0.5; echo finished >> "$LOG"; exit 0\' TERM\n'
        'echo "$HYQ_STORAGE" "$@" > "$LOG"\nwhile true; do sleep 0.05; done\n'
    )
    fake.chmod(0o755)
    log = tmp_path / "log"
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HYQ_STORAGE": "postgresql://h/s", "HYQ_SHARED": "/shared"}
    bash = shutil.which("bash")
    assert bash is not None
    with subprocess.Popen([bash, str(SBATCH), "video"], env={**os.environ, **here, "LOG": str(log)}) as script:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=60) == 0

    first, *later = log.read_text().splitlines()
    assert first.startswith("postgresql://h/s worker video --shared /shared")
    assert later == ["asked", "finished"]
