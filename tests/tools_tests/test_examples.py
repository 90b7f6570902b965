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
from search.console import INTERRUPTED
from search.locate import STORAGE_VARIABLE
from search.slots import TERMINATION_GRACE_S
from search.watching import POLL_S

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
    value: str | None = None
    valueFrom: ValueFrom | None = None


class Resources(Strict):
    requests: dict[str, str]
    limits: dict[str, str]


class Mount(Strict):
    name: str
    mountPath: str
    readOnly: bool = False


class Container(Strict):
    name: str
    image: str
    args: list[str]
    env: list[Variable]
    resources: Resources
    volumeMounts: list[Mount]


class Claim(Strict):
    claimName: str
    readOnly: bool = False


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


class OnExitCodes(Strict):
    containerName: str
    operator: Literal["In", "NotIn"]
    values: list[int]


class OnPodCondition(Strict):
    type: str
    status: str


class Rule(Strict):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onExitCodes: OnExitCodes | None = None
    onPodConditions: list[OnPodCondition] | None = None


class FailurePolicy(Strict):
    rules: list[Rule]


class JobSpec(Strict):
    completionMode: Literal["Indexed", "NonIndexed"]
    completions: int
    parallelism: int
    backoffLimit: int
    podFailurePolicy: FailurePolicy
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


def test_a_worker_of_the_job_that_leaves_a_study_that_goes_on_is_replaced():
    """Kubernetes takes a pod that is deleted and ends with 0 for done, and its index with it.

    Source: Kubernetes documentation, Jobs, pod failure policy: it asks for restartPolicy Never, and 0 is no value.
    """
    job = Job.model_validate(yaml.safe_load(JOB.read_text()))
    rules, pod = job.spec.podFailurePolicy.rules, job.spec.template.spec

    (left,) = [rule.onExitCodes for rule in rules if rule.onExitCodes is not None]
    assert left.values == [INTERRUPTED]
    assert left.containerName == pod.containers[0].name
    assert ["DisruptionTarget"] in [[condition.type for condition in rule.onPodConditions or ()] for rule in rules]
    assert pod.restartPolicy == "Never"


@pytest.mark.parametrize("path", [SBATCH, JOB], ids=lambda path: path.name)
def test_a_worker_that_is_asked_to_leave_has_the_time_that_handing_back_takes(path):
    """A trial in hand may take an hour, and no grace is that long."""
    text = path.read_text()
    (grace_s,) = re.findall(r"USR1@(\d+)|terminationGracePeriodSeconds: (\d+)", text)

    assert "--now" in re.sub(r"#.*", "", text)
    assert int("".join(grace_s)) > 2 * TERMINATION_GRACE_S + POLL_S


def test_the_job_mounts_the_weights_where_the_example_study_looks_for_them():
    (container,) = Job.model_validate(yaml.safe_load(JOB.read_text())).spec.template.spec.containers
    study = yaml.safe_load((EXAMPLES.parents[1] / "studies" / "hunyuan_video_720p.yaml").read_text())
    images = (EXAMPLES.parents[1] / "containers").glob("Containerfile.*")
    folders = {re.findall(r"^WORKDIR (.+)$", image.read_text(), flags=re.MULTILINE)[-1] for image in images}
    mounts = [Path(mount.mountPath) for mount in container.volumeMounts if mount.readOnly]
    needed = [Path(folder) / study["model"]["source"] for folder in folders]
    needed += [Path(str(variable.value)) for variable in container.env if variable.name == "HF_HOME"]

    assert len(needed) == 2
    assert all(any(path.is_relative_to(mount) for mount in mounts) for path in needed)


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

    assert [variable.name for variable in container.env if variable.valueFrom] == [STORAGE_VARIABLE]
    assert f"export {STORAGE_VARIABLE}" in SBATCH.read_text()
    assert not [word for word in commands if "storage" in word.lower()]


def test_the_batch_script_parses():
    assert subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True).returncode == 0


FAKE_WORKER = """#!/bin/bash
trap 'echo asked >> "$LOG"; sleep 0.2; echo left >> "$LOG"; exit '"$LEAVES_WITH" TERM
echo "$HYQ_STORAGE" "$@" >> "$LOG"
if [[ $ENDS_WITH = 137 ]]; then kill -KILL $$; fi
if [[ $ENDS_WITH ]]; then exit "$ENDS_WITH"; fi
while true; do sleep 0.05; done
"""


@pytest.fixture
def batch_script(tmp_path):
    """Runs the batch script with a worker that ends by itself, or that is told to leave; returns its code and a log."""

    def run(*, ends_with: str = "", told: signal.Signals | None = None, leaves_with: int = 0) -> tuple[int, list[str]]:
        log = tmp_path / "log"
        programs = {"hyq-search": FAKE_WORKER, "scontrol": '#!/bin/bash\necho scontrol "$@" >> "$LOG"\n'}
        for name, text in programs.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HYQ_STORAGE": "postgresql://h/s", "HYQ_SHARED": "/shared"}
        here |= {"LOG": str(log), "ENDS_WITH": ends_with, "LEAVES_WITH": str(leaves_with), "SLURM_JOB_ID": "17"}
        bash = shutil.which("bash")
        assert bash is not None
        with subprocess.Popen([bash, str(SBATCH), "video"], env={**os.environ, **here}) as script:
            deadline = time.monotonic() + 60
            while told is not None and not (log.exists() and log.read_text()) and time.monotonic() < deadline:
                time.sleep(0.05)
            if told is not None:
                script.send_signal(told)
            code = script.wait(timeout=60)
        first, *later = log.read_text().splitlines()
        assert first.startswith("postgresql://h/s worker video --shared /shared")
        return code, later

    return run


REQUEUED = "scontrol requeue 17"


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("told", "leaves_with", "after"),
    [
        pytest.param(signal.SIGUSR1, INTERRUPTED, [REQUEUED], id="time is over"),
        pytest.param(signal.SIGUSR1, 0, [], id="time is over, and the study too"),
        pytest.param(signal.SIGTERM, INTERRUPTED, [], id="cancelled"),
    ],
)
def test_the_batch_script_asks_the_worker_to_leave_and_is_queued_again_if_time_alone_is_over(
    batch_script, told, leaves_with, after
):
    assert batch_script(told=told, leaves_with=leaves_with) == (leaves_with, ["asked", "left", *after])


@pytest.mark.multiproc
@pytest.mark.parametrize(("ends_with", "after"), [("0", []), ("1", []), ("137", [REQUEUED])])
def test_the_batch_script_is_queued_again_after_a_worker_that_was_killed_and_after_no_other(
    batch_script, ends_with, after
):
    assert batch_script(ends_with=ends_with) == (int(ends_with), after)
