"""The command plan: how long a study will take on this machine, and how much its prompts can tell."""

from typing import Annotated

import typer

from search.commands.options import AsJson, Store, Study
from search.console import print_json, print_line, print_table
from search.errors import SearchError


def plan(
    study: Study,
    spread: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=DEVIATION", help="Deviation between prompts of a metric's paired difference."),
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Say how long each phase of a study takes on this machine and what precision it buys; nothing is stored."""
    from hyquant.models import load_model
    from search.locate import config_to_run, locate_study, prompts_to_run
    from search.plain import plain
    from search.planning import measure_costs, phases, precision
    from search.progress import in_words

    spreads = dict(map(_spread, spread or ()))
    ref = locate_study(study, store)
    config = config_to_run(ref)[0]
    prompt = prompts_to_run(ref).search[0]
    about = config.model
    costs = measure_costs(load_model(about.kind, about.source, device=about.device, dtype=about.dtype), config, prompt)
    found = phases(config, costs)
    total_s = sum(phase.total_s for phase in found)
    if as_json:
        print_json(
            {
                "study": config.name,
                "costs": plain(costs),
                "phases": [{**plain(phase), "total_s": phase.total_s} for phase in found],
                "total_s": total_s,
                "precision": precision(config, spreads),
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
    for line in precision(config, spreads):
        print_line(line)


def _spread(text: str) -> tuple[str, float]:
    metric, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not metric or not value > 0:
        raise SearchError(f"--spread must be METRIC=DEVIATION above 0, but got {text!r}; clip_prompt=0.02, for example")
    return metric, value
