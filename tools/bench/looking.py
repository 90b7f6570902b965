"""What it costs to look at a study, by how many of its trials are running.

    python -m tools.bench.looking --json docs/benchmarks/looking.json [--url postgresql://...]

One look is what each `run` and `worker` does every `RENEW_S` seconds (`search.watching`): one list of the trials that
have not finished, and one read of the study's attributes. CPU times are milliseconds of this process, of the process
of PostgreSQL that serves it (if it is of this host), and of a storage proxy in front of the database.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import optuna
import psutil
import sqlalchemy
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.storages._grpc.auto_generated.api_pb2 import GetTrialsRequest
from optuna.storages._grpc.servicer import OptunaStorageProxyService
from optuna.trial import TrialState

from hyquant.config import digest
from search.databases import open_database
from search.lean import CONFIG, WORKER
from search.lease import LEASE
from search.locate import quiet_optuna
from search.patience import Patience
from search.processes import this_process, this_worker
from search.prompts import load_prompts
from search.proposal import HOLDS
from search.storage import create_study, open_study
from search.study_file import load_study
from search.watching import Watcher
from spaces.space import load_space
from spaces.suggest import suggest
from tools.bench.tables import markdown, write_json

STUDY = Path("studies/mini.yaml")
STEPS = 50
LOOKS = 10


def main() -> None:
    """Print one line per number of running trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="address of an empty database [default: SQLite in a temporary folder]")
    parser.add_argument("--running", type=int, nargs="+", default=[10, 100, 400])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_optuna()
    rows = []
    for num_running in args.running:
        with tempfile.TemporaryDirectory(prefix="hyq-bench-") as folder:
            rows.append(measure(Path(folder), args.url, num_running))
            print(markdown(rows[-1:]), flush=True)
    if args.json:
        write_json(args.json, rows, looks=LOOKS)


def measure(folder: Path, url: str | None, num_running: int) -> dict[str, Any]:
    """Return one row: means over several looks."""
    config = load_study(STUDY).model_copy(update={"name": f"running{num_running}", "store": str(folder)})
    create_study(folder, config, load_prompts(config.workload, STUDY.parent), url=url)
    study = open_study(folder, config.name, url=url)
    fill(study, num_running)
    watcher = Watcher(study, config, [], lambda event: None)
    watcher.look()
    engine = study._storage._backend._backend.engine  # type: ignore[attr-defined]
    sent: list[str] = []
    sqlalchemy.event.listen(engine, "before_cursor_execute", lambda *told: sent.append(told[2]))
    clocks = {"look ms": process_time, "wall ms": perf_counter, "server ms": _server_clock(engine)}
    before = {name: clock() for name, clock in clocks.items()}
    for _ in range(LOOKS):
        watcher.look()
    spent = {name: round(1e3 * (clock() - before[name]) / LOOKS, 1) for name, clock in clocks.items()}
    num_statements = len(sent) // LOOKS
    trials = study.get_trials(deepcopy=False)
    list_by_proxy = _list_by_proxy(folder, url, study, trials)
    started = process_time()
    for _ in range(LOOKS):
        list_by_proxy()
    return {
        "storage": engine.name,
        "running": num_running,
        **spent,
        "statements": num_statements,
        "rows": sum(1 + len(t.params) + len(t.user_attrs) + len(t.system_attrs) for t in trials),
        "proxy ms": round(1e3 * (process_time() - started) / LOOKS, 1),
    }


def fill(study: optuna.Study, num_running: int) -> None:
    """Add running trials with all that one has: a point of the largest space, a worker of another host, a lease."""
    drafts = optuna.create_study(storage=InMemoryStorage(), sampler=RandomSampler(0))
    space = load_space("hunyuan_video")
    worker = this_worker(0, crew="a-host-of-a-rack-0123456-0", runner=this_process())
    elsewhere = worker.model_copy(update={"host": "a-host-of-a-rack"})
    for _ in range(num_running):
        draft = drafts.ask()
        point = suggest(draft, space, num_steps=STEPS)
        trial = optuna.create_trial(
            state=TrialState.RUNNING,
            params=draft.params,
            distributions=draft.distributions,
            user_attrs={
                WORKER: elsewhere.model_dump(),
                LEASE: 5,
                CONFIG: point.model_dump(mode="json"),
                HOLDS: digest(point),
            },
        )
        study.add_trial(trial)


def _server_clock(engine: sqlalchemy.Engine) -> Callable[[], float]:
    """Return what tells the CPU seconds of the process that serves this one; always 0 where there is none."""
    if engine.name != "postgresql":
        return lambda: 0.0
    with engine.connect() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    return lambda: sum(psutil.Process(pid).cpu_times()[:2])


def _list_by_proxy(
    folder: Path, url: str | None, study: optuna.Study, trials: list[optuna.trial.FrozenTrial]
) -> Callable[[], object]:
    """Return a list of these trials as a proxy reads and packs it for one client."""
    database: BaseStorage = open_database(folder, create=False, url=url, patience=Patience())
    service = OptunaStorageProxyService(database)  # type: ignore[no-untyped-call]
    ids = [trial._trial_id for trial in trials]
    request = GetTrialsRequest(study_id=study._study_id, included_trial_ids=ids, trial_id_greater_than=-1)
    answer = lambda: service.GetTrials(request, None).SerializeToString()  # noqa: E731
    answer()  # reads finished trials for the first time
    return answer


if __name__ == "__main__":
    main()
