"""The command plan: how long a study will take on this machine, and how much its prompts can tell."""

import math
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands.options import AsJson, Storage, Store, Study
from search.console import print_json, print_line, print_table
from search.errors import SearchError

if TYPE_CHECKING:
    from search.study import StudyConfig


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
    from search.short_limits import in_sentences, short_limits
    from search.slot_devices import count_devices

    ref = locate_study(study, store, storage)
    config = config_to_run(ref)[0]
    spreads = dict(_spread(text, config.metrics) for text in spread or ())
    prompt = prompts_to_run(ref).search[0]
    about = config.model
    num_devices = devices or count_devices(about.device)
    model = load_model(about.kind, about.source, device=about.device, dtype=about.dtype)
    threads = _threads(config, num_devices) if model.device.type == "cpu" else (None, None, None)
    measured = {count: measure_costs(model, config, prompt, num_threads=count) for count in dict.fromkeys(threads)}
    costs, layout_costs, alone = (measured[count] for count in threads)
    found = phases(config, costs, alone)
    total_s = sum(phase.total_s for phase in found)
    compared = layouts(config, layout_costs, num_devices, alone)
    warned = in_sentences(short_limits(config, costs), config.timeouts, "the study's slots")
    if [slot.ranks for slot in config.slots] != [compared[0].ranks] * compared[0].slots:
        warned += in_sentences(compared[0].short_limits, config.timeouts, compared[0].name)
    if as_json:
        print_json(
            {
                "study": config.name,
                "costs": plain(costs),
                "phases": [{**plain(phase), "total_s": phase.total_s} for phase in found],
                "total_s": total_s,
                "precision": precision(config, spreads),
                "layouts": [{**plain(one), "name": one.name} for one in compared],
                "layout_costs": plain(layout_costs),
                "reasoning": reasoning(compared),
                "warnings": warned,
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
    if threads[0] != threads[1]:
        print_line(
            f"a rank of the study's slots has {threads[0]} threads of the CPU, one of these layouts {threads[1]}: its "
            f"steps take {layout_costs.step_s:.3g} s and {layout_costs.deployment_step_s:.3g} s"
        )
    print_table(
        [
            {
                "slots": one.name,
                "a trial": in_words(one.trial_s),
                "trials an hour": f"{one.trials_per_hour:.3g}",
                "once": in_words(one.once_s),
                "again": in_words(one.again_s),
                "in all": in_words(one.total_s),
                "needs timeouts": ", ".join(f"{field} {in_words(value)}" for field, value in one.short_limits.items()),
            }
            for one in compared
        ]
    )
    for line in (reasoning(compared), *warned, *precision(config, spreads)):
        print_line(line)


def _threads(config: "StudyConfig", num_devices: int) -> tuple[int, int, int]:
    """Return in how many threads of the CPU a rank of the study's slots computes, one of its layouts, and `certify`."""
    import torch

    from search.slots import rank_threads
    from search.study import Slot

    return rank_threads(config.slots), rank_threads((Slot(),) * num_devices), torch.get_num_threads()


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
