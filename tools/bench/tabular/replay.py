"""Replay samplers on the table of the tabular benchmark, with the code that a study suggests points with.

    python -m tools.bench.tabular.replay --json docs/benchmarks/search.json

For each way to search: how many trials, and how many seconds of trials, until 95 % of the whole table's area is reached
(see `tools.bench.tabular.volume`), and the area after 20 trials; medians over seeds. The baseline is the sampler that
Optuna takes for several objectives if none is named, on raw bits, without presets, paying for repeated points.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

from hyquant.config import QuantConfig, digest
from search.grid import GridSampler, tried_out
from search.order import WorkOrder
from search.outlook import lost_constraints
from search.pace import MAX_DUPLICATES_IN_A_ROW, next_draw
from search.result import MetricResult
from search.retry import known_experiments
from search.rungs import Scored, beaten_by
from search.samplers import sampler_for
from search.study import DEFAULT_CONSTRAINTS, Objective, RungsConfig, SamplerConfig
from search.trials import is_dominated
from spaces.points import points
from spaces.space import SearchSpace
from spaces.suggest import preset_params, suggest
from tools.bench.tables import markdown, write_json
from tools.bench.tabular.domain import NUM_STEPS, base_space, ladder_space
from tools.bench.tabular.table import TABLE, Row, Table, read_table
from tools.bench.tabular.volume import area, areas_over_time, is_feasible, loss, reference_point

KINDS = ("tpe", "gp", "nsga2", "random", "grid", "auto")
GOAL = 0.95
RUNG = 4
OBJECTIVES = (
    Objective(metric="clip_reference", direction="maximize"),
    Objective(metric="latency_ratio", direction="minimize"),
)
ORDER = WorkOrder(store=Path(), url=None, study="", slot=0, first_trial=0, deadline=None, until_trial=None)


@dataclass(frozen=True)
class Way:
    """One way to search; `kind` None is Optuna's default without any part of ours."""

    kind: str | None
    space: SearchSpace
    encoding: str
    has_presets: bool
    has_rungs: bool = False


@dataclass(frozen=True)
class Replay:
    """One replayed study.

    Attributes:
        rows: What it evaluated in order, each as often as it was paid for.
        seconds: What each of them cost; less where it ended at a rung.
        ended: Which of them ended at a rung, so that they are on no front.
        num_free: How many points were answered from the record.
    """

    rows: tuple[Row, ...]
    seconds: tuple[float, ...]
    ended: tuple[bool, ...]
    num_free: int


def replay(way: Way, table: Table, *, seed: int, num_trials: int) -> Replay:
    """Search until so many trials were paid for, or the space seems used up."""
    rows_by_digest = {row.digest: row for row in table.rows}
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=_sampler(way, seed, num_trials))
    sampler = study.sampler
    grid = sampler if isinstance(sampler, GridSampler) else None
    if way.has_presets:
        for preset in way.space.presets:
            study.enqueue_trial(preset_params(way.space, preset.name), skip_if_exists=True)
    first: dict[str, int] = {}
    paid: list[Row] = []
    seconds: list[float] = []
    ended: list[bool] = []
    num_free = in_a_row = 0
    while len(paid) < num_trials and (grid is not None or in_a_row < MAX_DUPLICATES_IN_A_ROW):
        trials = study.get_trials(deepcopy=False)
        if tried_out(grid, trials):
            break
        if way.kind is not None:
            drawn = next_draw(trials, ORDER, is_grid=grid is not None)
            study.sampler = sampler if drawn == "sampler" else RandomSampler(seed * 1000 + len(study.trials))
        trial = study.ask()
        config: QuantConfig = suggest(trial, way.space, num_steps=NUM_STEPS)
        row = rows_by_digest[digest(config)]
        is_free = way.kind is not None and row.digest in first
        if is_free:
            has_ended = ended[[one.digest for one in paid].index(row.digest)]
            trial.set_user_attr("reused_from", first[row.digest])
            num_free, in_a_row = num_free + 1, in_a_row + 1
        else:
            members = (one for one, was_ended in zip(paid, ended, strict=True) if not was_ended and is_feasible(one))
            has_ended = way.has_rungs and ends_at_rung(row, list(members))
            paid.append(row)
            ended.append(has_ended)
            seconds.append(row.trial_s - (1 - RUNG / len(row.scores["clip_reference"])) * row.render_s * has_ended)
            first.setdefault(row.digest, trial.number)
            in_a_row = 0
        trial.set_constraint("feasible", -1.0 if is_feasible(row) else 1.0)
        if is_feasible(row) and not has_ended:
            study.tell(trial, [mean(row.scores["clip_reference"]), row.ratio])
        else:
            study.tell(trial, state=TrialState.PRUNED)
    return Replay(rows=tuple(paid), seconds=tuple(seconds), ended=tuple(ended), num_free=num_free)


def ends_at_rung(row: Row, members: Sequence[Row]) -> bool:
    """Say whether a trial of this row ends after its first prompts, by the rules of a study.

    Args:
        row: What would be rendered.
        members: Feasible rows that were evaluated completely; the front is among them.
    """
    trial, num_prompts = _scored(row, RUNG), len(row.scores["clip_reference"])
    if lost_constraints(DEFAULT_CONSTRAINTS, trial.results, trial.figures, num_prompts):
        return True
    points = [loss(member) for member in members]
    front = [
        _scored(one, num_prompts) for one, own in zip(members, points, strict=True) if not is_dominated(own, points)
    ]
    rules = {"num_prompts": num_prompts, "num_looks": 1, "alpha": RungsConfig().alpha}
    return beaten_by(trial, front, OBJECTIVES, **rules) is not None


def _scored(row: Row, num_prompts: int) -> Scored:
    """Return what is known of a row after its first prompts."""
    first = {name: values[:num_prompts] for name, values in row.scores.items()}
    results = {name: MetricResult(values=values, mean=mean(values), std=0.0) for name, values in first.items()}
    return Scored(number=None, results=results, figures={"latency_ratio": row.ratio}, latency_kind="simulated")


def _sampler(way: Way, seed: int, num_trials: int) -> BaseSampler:
    if way.kind is None:
        default = optuna.create_study(directions=["maximize", "minimize"]).sampler
        return type(default)(seed=seed)  # type: ignore[call-arg]
    config = SamplerConfig.model_validate({"kind": way.kind})
    return sampler_for(config, way.space, seed=seed, num_steps=NUM_STEPS, num_trials=num_trials)


def summary(way: Way, table: Table, *, num_seeds: int, num_trials: int) -> dict[str, Any]:
    """Replay a way with every seed and return medians; what never reached the goal counts with its full cost."""
    worst = reference_point(table)
    best = area(map(loss, filter(is_feasible, table.rows)), worst)
    curves, costs, needed, free, stopped = [], [], [], [], []
    for seed in range(num_seeds):
        found = replay(way, table, seed=seed, num_trials=num_trials)
        shares = [value / best for value in areas_over_time(found.rows, worst, found.ended)]
        reached = next((index + 1 for index, share in enumerate(shares) if share >= GOAL), len(shares))
        is_reached = shares[reached - 1] >= GOAL
        needed.append(reached if is_reached else num_trials + 1)
        costs.append(sum(found.seconds[:reached]))
        stopped.append(sum(found.ended))
        curves.append(shares + shares[-1:] * (num_trials - len(shares)))
        free.append(found.num_free)
    trials = median(needed)
    return {
        "sampler": way.kind or "Optuna's default, nothing of ours",
        "exclusions": way.encoding,
        "presets": "yes" if way.has_presets else "no",
        "rungs": "yes" if way.has_rungs else "no",
        "area at 10": f"{median(curve[9] for curve in curves):.3f}",
        "area at 20": f"{median(curve[19] for curve in curves):.3f}",
        "area at 40": f"{median(curve[39] for curve in curves):.3f}" if num_trials >= 40 else "",
        "trials to 95 %": f"more than {num_trials}" if trials > num_trials else f"{trials:g}",
        "seconds to 95 %": f"{median(costs):.0f}",
        "seeds that reach it": f"{sum(count <= num_trials for count in needed)} of {num_seeds}",
        "repeats": f"{median(free):g}",
        "ended at a rung": f"{median(stopped):g}" if way.has_rungs else "",
        "curve": [round(median(curve[index] for curve in curves), 4) for index in range(num_trials)],
    }


def ladder_share(table: Table) -> float:
    """Return how much of the table's area the points of the ladder have; more than that no search on it can reach."""
    space = ladder_space(table.about.layers, table.about.order)
    inside = {digest(config) for _, config in points(space, num_steps=NUM_STEPS)}
    rows, worst = list(filter(is_feasible, table.rows)), reference_point(table)
    return area((loss(row) for row in rows if row.digest in inside), worst) / area(map(loss, rows), worst)


def ways(table: Table) -> list[Way]:
    """Return the baseline, then every sampler on both encodings, without and with presets, and two with rungs."""
    layers, order = table.about.layers, table.about.order
    spaces: dict[str, Callable[[], SearchSpace]] = {
        "bits": lambda: base_space(layers, order),
        "ladder": lambda: ladder_space(layers, order),
    }
    found = [Way(None, spaces["bits"](), "bits", has_presets=False)]
    found += [
        Way(kind, space(), encoding, has_presets)
        for kind in KINDS
        for encoding, space in spaces.items()
        for has_presets in (False, True)
    ]
    with_rungs = [
        Way(kind, space(), encoding, has_presets=True, has_rungs=True)
        for kind in ("tpe", "random")
        for encoding, space in spaces.items()
    ]
    return found + with_rungs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--baseline-trials", type=int, default=150, help="until then the baseline may reach the goal")
    parser.add_argument("--sampler", action="append", choices=KINDS, help="default: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = read_table(args.table)
    rows = []
    for way in ways(table):
        if args.sampler is None or way.kind in (None, *args.sampler):
            with known_experiments(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                num_trials = args.baseline_trials if way.kind is None else args.trials
                rows.append(summary(way, table, num_seeds=args.seeds, num_trials=num_trials))
            print({key: value for key, value in rows[-1].items() if key != "curve"}, file=sys.stderr, flush=True)
    print(markdown([{key: value for key, value in row.items() if key != "curve"} for row in rows]))
    share = ladder_share(table)
    print(f"the ladder's own points have {share:.1%} of the area")
    if args.json:
        about = {
            "configs": len(table.rows),
            "seeds": args.seeds,
            "trials": args.trials,
            "ladder_share": round(share, 4),
        }
        write_json(args.json, rows, **about)


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    main()
