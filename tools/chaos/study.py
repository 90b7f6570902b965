"""The study under test: the tiny model, the hashing judge, predicted latencies, so that a config has one outcome."""

from pathlib import Path
from typing import Any

import yaml

from search.study import StudyConfig
from search.study_file import load_study
from tests.toys.tiny_study import TINY_STUDY
from tools.chaos.servers import TRACKING_URI

NAME = "chaos"
PROFILE = Path(__file__).resolve().parents[2] / "studies" / "devices" / "ascend_910b.yaml"
UNREACHED = 10_000
"""The budget while faults come; it is lowered when they are over."""

_STUDY: dict[str, Any] = {
    **TINY_STUDY,
    "name": NAME,
    "workload": {
        **TINY_STUDY["workload"],
        "settings": {"height": 16, "width": 16, "num_frames": 5, "num_steps": 4, "batch_size": 1},
    },
    "deployment": {"height": 32, "width": 32, "num_frames": 5, "num_steps": 4},
    "latency": {"compile": False, "device_profile": str(PROFILE)},
    "rungs": None,
    "sampler": {"kind": "random", "seed": 0},
    "slots": [{"ranks": 1}],
    "timeouts": {"first_s": 120.0, "least_s": 45.0, "factor": 4.0},
    "tracking": TRACKING_URI,
}


def write_study(folder: Path, *, trials: int = UNREACHED) -> Path:
    """Write study file and prompts; called again, it changes the budget alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.txt").write_text("one red cube\ntwo blue balls\n")
    (folder / "search.txt").write_text("a green cone\na grey ring\nthree white stars turning\n")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**_STUDY, "budget": {"trials": trials}}))
    return path


def read_study(path: Path) -> StudyConfig:
    """Return the study's config."""
    return load_study(path)
