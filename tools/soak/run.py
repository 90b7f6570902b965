"""Run `hyq-search run` on the mini study with a budget it does not reach, and look at its processes every few seconds.

The study has an empty store and an empty folder for temporary files, of compiled graphs too, so that both are measured.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import optuna
import psutil
import yaml

from search.artifacts import kept_trials
from search.storage import open_study, stored_config
from search.tracking import Tracker
from tools.soak.sample import Sample, taken

NAME = "soak"
MINI = Path(__file__).resolve().parents[2] / "studies" / "mini.yaml"
UNREACHED = 100_000
TIDY_UP_S = 300
POLICY = {"keep": "last", "last": 5}


@dataclass(frozen=True)
class Soaked:
    """What a run left.

    Attributes:
        samples: In order of time.
        finished_s: When trials finished, in seconds from the start.
        videos: The trials whose videos lie in the store at the end.
        kept: The trials whose videos the policy keeps.
    """

    samples: list[Sample]
    finished_s: list[float]
    videos: set[int]
    kept: set[int]


def soak(folder: Path, *, seconds: float, interval_s: float) -> Soaked:
    """Run the study for so long, interrupt it, and return what it held and left.

    Args:
        folder: An empty one; the study file, the store, `run.log` and `samples.jsonl` are written there.
        seconds: How long.
        interval_s: Seconds between two samples.

    Raises:
        RuntimeError: If the run ends by itself; the message has the end of its log.
    """
    study_file, log = write_study(folder), folder / "run.log"
    samples: list[Sample] = []
    started, started_unix = time.monotonic(), time.time()
    with log.open("wb") as output, (folder / "samples.jsonl").open("w") as lines:
        run = psutil.Popen(
            [sys.executable, "-c", "from search.cli import main; main()", "run", str(study_file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "TMPDIR": str(folder / "tmp"),
                "TORCHINDUCTOR_CACHE_DIR": str(folder / "tmp" / "graphs"),
            },
            start_new_session=True,
        )
        try:
            while (now := time.monotonic() - started) < seconds:
                if run.poll() is not None:
                    raise RuntimeError(f"the run ended by itself: {log.read_text()[-2000:]}")
                samples.append(taken(run, now, {"store": folder / "store", "temporary": folder / "tmp"}))
                print(samples[-1].model_dump_json(), file=lines, flush=True)
                time.sleep(interval_s)
        finally:
            _end(run)
    study = open_study(folder / "store", NAME)
    trials = study.get_trials(deepcopy=False)
    return Soaked(
        samples,
        [t.datetime_complete.timestamp() - started_unix for t in trials if t.datetime_complete is not None],
        videos_of(folder / "store", study),
        kept_trials(study, stored_config(study).artifacts),
    )


def videos_of(store: Path, study: optuna.Study) -> set[int]:
    """Return the trials whose videos lie in a store."""
    folders = {path.parents[1].name for path in (store / "artifacts").glob("*/artifacts/videos.mp4")}
    return set(Tracker.of(store, study).trial_numbers(folders).values())


def write_study(folder: Path) -> Path:
    """Write the mini study with another name, a space that needs no probing, and no end."""
    content = yaml.safe_load(MINI.read_text())
    content |= {"name": NAME, "space": "mini", "store": str(folder / "store"), "budget": {"trials": UNREACHED}}
    content["artifacts"] = POLICY
    (folder / "tmp").mkdir()
    path = folder / "soak.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _end(run: psutil.Popen) -> None:
    """Interrupt the run as Ctrl-C does, and end by force what is left after its grace."""
    try:
        tree = [run, *run.children(recursive=True)]
        run.send_signal(signal.SIGINT)
        run.wait(timeout=TIDY_UP_S)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired:
        for process in tree:
            if process.is_running():
                process.kill()
