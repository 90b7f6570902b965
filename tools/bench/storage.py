"""What Optuna's storage and samplers cost as a study and its workers grow.

    python -m tools.bench.storage --json docs/benchmarks/storage.json [--url postgresql://...]

Workers are processes of this machine that ask, suggest, write what a real trial writes (a config, a result of 10 kB)
and tell, as fast as they can, with no rendering between. With more workers than cores they also contend for the cores,
which is part of what the table shows; on machines of their own they would not. Random samplers show the storage alone.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from search.databases import open_storage
from search.locate import quiet_optuna
from search.order import WorkOrder
from search.pace import must_wait, stop_reason
from search.samplers import sampler_for
from search.study import Budget, SamplerConfig
from search.trials import LATENCY_KIND
from spaces.space import SearchSpace, load_space
from spaces.suggest import suggest
from tools.bench.tables import markdown, write_json

STEPS = 50
RESULT = json.dumps({"metrics": {f"metric_{index}": [0.123456789 + index] * 50 for index in range(16)}})
"""About what `TrialResult` is as JSON: 10.5 kB in the mini study."""
DIRECTIONS = ["minimize", "minimize"]
Timings = dict[str, list[float]]


def main() -> None:
    """Print one line per storage, number of trials, sampler and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="address of an empty database [default: SQLite in a temporary folder]")
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe", "nsga2", "gp"])
    parser.add_argument("--rounds", type=int, default=4, help="trials of each worker")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_optuna()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hyq-bench-") as folder:
        for num_trials in args.trials:
            place = Place(Path(folder), args.url, f"study{num_trials}")
            fill(place, num_trials)
            for kind in args.samplers:
                for num_workers in args.workers if kind in ("random", "tpe") else args.workers[:1]:
                    rows.append(measure(place, num_trials, kind, num_workers, args.rounds))
                    print(markdown(rows[-1:]), flush=True)
    if args.json:
        write_json(args.json, rows)


class Place:
    """A study in a database, opened anew in every process."""

    def __init__(self, folder: Path, url: str | None, name: str) -> None:
        self.folder, self.url, self.name = folder, url, name

    @property
    def kind(self) -> str:
        """Return which database it is."""
        return "sqlite" if self.url is None else self.url.partition(":")[0].partition("+")[0]

    def storage(self) -> BaseStorage:
        """Open the storage; its tables are made if they are not there."""
        return open_storage(self.folder, create=True, url=self.url)

    def study(self, sampler: BaseSampler) -> optuna.Study:
        """Open the study, or create it."""
        return optuna.create_study(
            study_name=self.name, storage=self.storage(), directions=DIRECTIONS, sampler=sampler, load_if_exists=True
        )


def space() -> SearchSpace:
    """Return the largest space that is shipped, with conditional parameters."""
    return load_space("hunyuan_video")


def fill(place: Place, num_trials: int) -> None:
    """Add finished trials at random points; an eighth is infeasible."""
    drafts = optuna.create_study(storage=InMemoryStorage(), directions=DIRECTIONS, sampler=RandomSampler(0))
    study, here = place.study(RandomSampler(0)), space()
    for index in range(num_trials):
        draft = drafts.ask()
        config = suggest(draft, here, num_steps=STEPS)
        frozen = drafts.trials[-1] if index == 0 else drafts._storage.get_trial(draft._trial_id)
        study.add_trial(_finished(frozen, config.model_dump(mode="json"), index))


def _finished(draft: FrozenTrial, config: dict[str, Any], index: int) -> FrozenTrial:
    is_feasible = index % 8 != 0
    unit = hash((draft.params["strategy"], index)) % 1000 / 1000
    return optuna.create_trial(
        state=TrialState.COMPLETE if is_feasible else TrialState.PRUNED,
        values=[unit, 1.0 - unit**2] if is_feasible else None,
        params=draft.params,
        distributions=draft.distributions,
        user_attrs={"config": config, "config_digest": f"{index:016x}", "result": RESULT, LATENCY_KIND: "native"},
    )


def measure(place: Place, num_trials: int, kind: str, num_workers: int, num_rounds: int) -> dict[str, Any]:
    """Return one row: medians over all trials of all workers, and how many trials a second they made together."""
    context = multiprocessing.get_context("fork")
    queue, gate = context.SimpleQueue(), context.Barrier(num_workers + 1)
    workers = [
        context.Process(target=_work, args=(place, kind, index, num_rounds, queue, gate))
        for index in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    gate.wait()
    started = perf_counter()
    found: list[Timings] = [queue.get() for _ in workers]
    wall_s = perf_counter() - started
    for worker in workers:
        worker.join()
    every = {name: [value for one in found for value in one[name]] for name in found[0]}
    return {
        "storage": place.kind,
        "trials": num_trials,
        "sampler": kind,
        "workers": num_workers,
        "suggest s": round(median(every["suggest"]), 3),
        "suggest p90 s": round(quantiles(every["suggest"], n=10)[-1], 3),
        "ask ms": round(1e3 * median(every["ask"]), 1),
        "write ms": round(1e3 * median(every["write"]), 1),
        "list ms": round(1e3 * median(every["list"]), 1),
        "decide ms": round(1e3 * median(every["decide"]), 1),
        "first list s": round(median(every["first list"]), 2),
        "trials/s": round(num_workers * num_rounds / wall_s, 1),
    }


def _work(place: Place, kind: str, index: int, num_rounds: int, queue: Any, gate: Any) -> None:
    """Be one worker: open the study, then run trials that cost nothing but bookkeeping."""
    here, budget = space(), Budget(trials=10**6)
    sampler = sampler_for(SamplerConfig(kind=kind), here, seed=index, num_steps=STEPS, num_trials=10**6)
    study = place.study(sampler)
    order = WorkOrder(
        store=place.folder, url=place.url, study=place.name, slot=index, first_trial=0, deadline=None, until_trial=None
    )
    found: Timings = {name: [] for name in ("suggest", "ask", "write", "list", "decide", "first list")}
    _timed(found["first list"], lambda: study.get_trials(deepcopy=False))
    gate.wait()
    for _ in range(num_rounds):
        trials = _timed(found["list"], lambda: study.get_trials(deepcopy=False))
        _timed(found["decide"], lambda: _decide(trials, budget, order))  # noqa: B023
        trial = _timed(found["ask"], study.ask)
        config = _timed(found["suggest"], lambda: suggest(trial, here, num_steps=STEPS))  # noqa: B023
        _timed(found["write"], lambda: _write(study, trial, config.model_dump(mode="json")))  # noqa: B023
    queue.put(found)


def _decide(trials: Sequence[FrozenTrial], budget: Budget, order: WorkOrder) -> None:
    """Do what a worker's leader decides from all trials before each of its own."""
    stop_reason(trials, budget, order, now=0.0)
    must_wait(trials, budget, order)


def _write(study: optuna.Study, trial: optuna.Trial, config: dict[str, Any]) -> None:
    """Write what a real trial writes, and tell."""
    trial.set_user_attr("worker", {"host": "bench", "pid": 1, "started": "", "slot": 0})
    trial.set_user_attr("config", config)
    trial.set_user_attr("config_digest", f"{trial.number:016x}")
    trial.set_user_attr(LATENCY_KIND, "native")
    trial.set_user_attr("result", RESULT)
    study.tell(trial, [0.5, 0.5])


def _timed(times: list[float], work: Callable[[], Any]) -> Any:
    started = perf_counter()
    answer = work()
    times.append(perf_counter() - started)
    return answer


if __name__ == "__main__":
    main()
