"""The command plan: how long a study will take on this machine, and how much its prompts can tell."""

import math
from typing import Annotated

import typer

from search.commands.options import AsJson, Storage, Store, Study
from search.console import print_json, print_line, print_table
from search.errors import SearchError


def plan(
    study: Study,
    spread: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=DEVIATION", help="Deviation between prompts of a metric's paired difference."),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option("--devices", min=1, help="Compare slot layouts of so many devices [default: those there are]."),
    ] = None,
    store: Store = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Say how long each phase of a study takes here, what precision it buys, and which slots are faster."""
    from hyquant.models import load_model
    from search.layouts import layouts, reasoning
    from search.locate import config_to_run, locate_study, prompts_to_run
    from search.plain import plain
    from search.planning import measure_costs, phases, precision
    from search.progress import in_words
    from search.slot_devices import count_devices

    ref = locate_study(study, store, storage)
    config = config_to_run(ref)[0]
    spreads = dict(_spread(text, config.metrics) for text in spread or ())
    prompt = prompts_to_run(ref).search[0]
    about = config.model
    costs = measure_costs(load_model(about.kind, about.source, device=about.device, dtype=about.dtype), config, prompt)
    found = phases(config, costs)
    total_s = sum(phase.total_s for phase in found)
    compared = layouts(config, costs, devices or count_devices(config.model.device))
    if as_json:
        print_json(
            {
                "study": config.name,
                "costs": plain(costs),
                "phases": [{**plain(phase), "total_s": phase.total_s} for phase in found],
                "total_s": total_s,
                "precision": precision(config, spreads),
                "layouts": [{**plain(one), "name": one.name} for one in compared],
                "reasoning": reasoning(compared),
            }
        )
        return
    print_line(
        f"a step takes {costs.step_s:.3g} s at the clip and {costs.deployment_step_s:.3g} s at the deployment shape; a "
        f"rendering {costs.overhead_s:.3g} s beside its steps; float, not compiled"
    )
    print_table(
        [
            {"phase": one.name, "once": in_words(one.seconds), "times": str(one.times), "in all": in_words(one.total_s)}
            for one in found
        ]
    )
    print_line(f"in all {in_words(total_s)}; scores, quantizing, compiling and loading come on top")
    print_table(
        [
            {
                "slots": one.name,
                "a trial": in_words(one.trial_s),
                "trials an hour": f"{one.trials_per_hour:.3g}",
                "once": in_words(one.once_s),
                "in all": in_words(one.total_s),
            }
            for one in compared
        ]
    )
    print_line(reasoning(compared))
    for line in precision(config, spreads):
        print_line(line)


def _spread(text: str, metrics: tuple[str, ...]) -> tuple[str, float]:
    """Read one --spread: a metric of the study, and a deviation."""
    from spaces.space import did_you_mean

    metric, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not metric or not 0 < value < math.inf:
        raise SearchError(
            f"--spread must be METRIC=DEVIATION with a number above 0, but got {text!r}; clip_prompt=0.02, for example"
        )
    if metric not in metrics:
        raise SearchError(
            f"--spread must name a metric of the study ({', '.join(metrics)}), but got {metric!r}"
            f"{did_you_mean(metric, metrics) or '; give one of them'}"
        )
    return metric, value
