"""A chaos run from its first process to its table; called inside namespaces of its own."""

import json
import logging
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import psutil
import torch

from search.consistency import PARTS
from search.locate import quiet_optuna
from search.storage import open_study
from search.trials import count_states, num_evaluated
from tools.bench.tables import markdown
from tools.chaos.checks import Check, checks
from tools.chaos.faults import Rack, Undo, begin
from tools.chaos.follow import Follower
from tools.chaos.network import build_network, on_host
from tools.chaos.plan import Fault, make_plan
from tools.chaos.servers import STUDY_URL, TRACKING_URI, mount_disk, start_mlflow, start_postgres
from tools.chaos.study import NAME, write_study
from tools.chaos.workers import HYQ_SEARCH, Worker, send

logger = logging.getLogger("chaos")

DISK_MIB = 400
PLACES = (("hyq-a", "run"), ("hyq-a", "worker"), ("hyq-b", "worker"))
FIRST_TRIAL_S, LEAVE_S, FINISH_S = 300.0, 90.0, 600.0
TARGET_S = 120.0
"""So long a fault waits for a trial in flight; after a cut or a restart of everything that takes a while."""
MORE_TRIALS = 5
"""So many trials are evaluated after the last fault, to see that everybody still works."""


def run_chaos(folder: Path, num_faults: int, seed: int, pace_s: float, only: tuple[str, ...], minutes: float) -> int:
    """Run it and return the exit status: 0 if every check holds, also that all faults began within so many minutes."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    quiet_optuna()
    torch.set_num_threads(1)
    started = time.monotonic()
    (folder / "kept").mkdir()
    build_network(folder)
    postgres = start_postgres(folder / "postgres")
    mlflow = start_mlflow(folder / "mlflow")
    study_file = write_study(folder / "kept" / "study")
    follower = Follower(STUDY_URL)
    rack = Rack(postgres, mlflow, _workers(folder, study_file), lambda: follower.busy)
    follower.start()
    _begin_work(rack, follower)
    plan = make_plan(num_faults, seed, pace_s, num_workers=len(rack.workers), only=only)
    missed = _carry_out(rack, plan, follower, limit_s=60.0 * minutes)
    _finish(rack, study_file, follower)
    mended, problems = _repaired(rack)
    follower.stop()
    found = [Check("every fault hit a trial in flight", not missed, f"{len(plan)} faults; not done: {missed}")]
    found += checks(_study(rack), follower, STUDY_URL, rack.workers[0].store, folder / "quiet")
    found.append(Check("doctor --repair leaves nothing to mend", not problems, f"mended: {mended}; left: {problems}"))
    starts = ", ".join(f"{worker.name} {worker.num_starts}" for worker in rack.workers)
    logger.info("%d faults in %.0f s; starts: %s", len(plan), time.monotonic() - started, starts)
    print(
        markdown([{"": "yes" if one.holds else "NO", "what must hold": one.what, "found": one.found} for one in found])
    )
    return 0 if _all_hold(found) else 1


def _all_hold(found: list[Check]) -> bool:
    return all(one.holds for one in found)


def _workers(folder: Path, study_file: Path) -> list[Worker]:
    workers = []
    for index, (host, command) in enumerate(PLACES):
        disk = folder / f"disk{index}"
        mount_disk(disk, DISK_MIB)
        what = str(study_file) if command == "run" else NAME
        arguments = [command, what, "--storage", STUDY_URL, "--store", str(disk)]
        if command == "worker":
            arguments += ["--tracking-uri", TRACKING_URI]
        workers.append(Worker(f"{command}{index}", host, disk, arguments, folder / "kept" / f"{command}{index}.log"))
    return workers


def _begin_work(rack: Rack, follower: Follower) -> None:
    """Let `run` create the study and evaluate a trial, then let the others join."""
    rack.workers[0].start()

    def is_under_way() -> bool:
        rack.workers[0].see_to_it()
        return bool(follower.evaluated())

    _until(is_under_way, FIRST_TRIAL_S, "no trial was evaluated")
    for worker in rack.workers[1:]:
        worker.start()


def _carry_out(rack: Rack, plan: list[Fault], follower: Follower, *, limit_s: float) -> list[str]:
    """Do every fault at its time and end it; start again whatever has ended.

    A fault waits until there is a trial in flight for it to hit, and all later ones with it. Returns those that were
    left out, because they waited too long or because the time was up.
    """
    began = time.monotonic()
    missed: list[str] = []
    waiting = list(plan)
    under_way: list[tuple[float, Undo]] = []
    late_s = 0.0
    while waiting or under_way:
        now = time.monotonic() - began
        for ending in [one for one in under_way if one[0] <= now]:
            under_way.remove(ending)
            ending[1]()
        if now > limit_s:
            missed += [f"{fault.number} {fault.kind}" for fault in waiting]
            waiting.clear()
        if waiting and waiting[0].start_s + late_s <= now:
            fault = waiting[0]
            begun = begin(rack, fault)
            is_missed = begun is None and now - fault.start_s - late_s > TARGET_S
            if begun is not None:
                effect, undo = begun
                under_way.append((now + fault.lasts_s, undo))
            elif is_missed:
                effect = "nothing to hit"
                missed.append(f"{fault.number} {fault.kind}")
            if begun is not None or is_missed:
                waiting.pop(0)
                late_s = now - fault.start_s
                logger.info(
                    "fault %2d at %4.0f s: %s for %.0f s: %s (%d evaluated)",
                    fault.number, now, fault.kind, fault.lasts_s, effect, len(follower.evaluated()),
                )  # fmt: skip
        for worker in rack.workers:
            worker.see_to_it()
        time.sleep(0.2)
    return missed


def _finish(rack: Rack, study_file: Path, follower: Follower) -> None:
    """Let everybody leave, lower the budget to what there is and a few more, and run the study to its end."""
    rack.postgres.wait()
    rack.mlflow.wait()
    logger.info("faults are over: %d evaluated; everybody leaves", len(follower.evaluated()))
    for worker in rack.workers:
        if worker.is_running:
            send(psutil.Process(worker.process.pid), signal.SIGINT)  # type: ignore[union-attr]
    _until(lambda: not any(worker.is_running for worker in rack.workers), LEAVE_S, None)
    for worker in rack.workers:
        if worker.is_running:
            logger.info("%s did not leave in %.0f s and is killed", worker.name, LEAVE_S)
            worker.kill_tree()
    counts = count_states(_study(rack))
    write_study(study_file.parent, trials=num_evaluated(counts) + counts["waiting"] + counts["running"] + MORE_TRIALS)
    first, *others = rack.workers
    told = len(first.log.read_text())
    first.start()
    _until(lambda: "resumed study" in first.log.read_text()[told:], FIRST_TRIAL_S, "the study was not resumed")
    for worker in others:
        worker.start()

    def is_over() -> bool:
        for worker in rack.workers:
            if not worker.is_running and worker.process is not None and worker.process.returncode:
                worker.see_to_it()
        return all(not worker.is_running and not worker.process.returncode for worker in rack.workers if worker.process)

    _until(is_over, FINISH_S, "the study did not come to its end")


def _repaired(rack: Rack) -> tuple[list[str], list[str]]:
    """Let `hyq-search doctor --repair` mend the study from every host; return what it mended, and what is left."""
    verdicts: dict[str, list[str]] = {"mended": [], "problem": []}
    for worker in rack.workers:
        places = ["--store", str(worker.store), "--storage", STUDY_URL, "--tracking-uri", TRACKING_URI]
        command = on_host(worker.host, [*HYQ_SEARCH, "doctor", NAME, *places, "--repair", "--json"])
        answer = subprocess.run(command, check=False, stdout=subprocess.PIPE).stdout
        for check in json.loads(answer)["checks"]:
            if check["name"] in (f"study {NAME}", *PARTS) and check["verdict"] in verdicts:
                verdicts[check["verdict"]].append(f"{worker.name}: {check['name']}: {check['found']}")
    return verdicts["mended"], verdicts["problem"]


def _study(rack: Rack) -> optuna.Study:
    return open_study(rack.workers[0].store, NAME, url=STUDY_URL)


def _until(is_done: Callable[[], bool], limit_s: float, complaint: str | None) -> None:
    """Wait; after the limit raise the complaint, or go on if there is none."""
    deadline = time.monotonic() + limit_s
    while not is_done():
        if time.monotonic() > deadline:
            if complaint is None:
                return
            raise RuntimeError(f"{complaint} in {limit_s:.0f} s")
        time.sleep(0.2)
