"""The command explain: why a trial is what it is, and what its choices cost and bought."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.commands.options import AsJson, Storage, Store, Study
from search.console import print_json, print_line
from search.errors import SearchError

if TYPE_CHECKING:
    from search.explain import Neighbour
    from search.locate import StudyRef
    from search.overview import Overview, TrialRow


def explain(
    study: Study,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="safe, balanced, fast, or a trial's number.")],
    store: Store = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Say which layers of a trial stay in float and why, and what each of its choices cost and bought."""
    from search.exporting import find_pick
    from search.locate import locate_study, overview_of

    ref = locate_study(study, store, storage)
    overview = overview_of(ref)
    row = find_pick(overview, trial)
    if row.config is None or row.values is None:
        raise SearchError(f"a trial is explained once it was measured, but trial {row.number} is {row.state}; see show")
    if as_json:
        print_json(_answer(row, overview) | {"sensitivity": _sensitivity(row, overview, ref)})
        return
    for line in _lines(row, overview, _sensitivity(row, overview, ref)):
        print_line(line)


def _answer(row: "TrialRow", overview: "Overview") -> dict[str, Any]:
    from search.explain import neighbours
    from search.float_layers import float_layers
    from search.plain import plain
    from search.stability import pick_stability

    assert row.config is not None, "the command has looked"
    stability = pick_stability(overview)
    return {
        "number": row.number,
        "strategy": row.strategy,
        "preset": row.preset,
        "picks": list(row.picks),
        "stability": {pick: shares[row.number] for pick, shares in stability.items() if row.number in shares},
        "float_layers": plain(float_layers(row.config, overview.config.space)),
        "neighbours": plain(neighbours(row, overview)),
    }


def _lines(row: "TrialRow", overview: "Overview", sensitivity: str | None) -> Iterator[str]:
    from search.explain import neighbours
    from search.float_layers import float_layers
    from search.readable import readable
    from search.stability import pick_stability, stability_sentence
    from spaces.targets import left_out

    assert row.config is not None, "the command has looked"
    values = ", ".join(f"{name} {readable(value)}" for name, value in (row.values or {}).items())
    yield f"trial {row.number}: {row.strategy}{f', preset {row.preset}' if row.preset else ''}; {values}"
    if row.reason:
        yield f"may not win: {row.reason}"
    stability = pick_stability(overview) if row.picks else {}
    yield from (
        sentence for pick in row.picks if (sentence := stability_sentence(pick, row.number, stability)) is not None
    )
    kept = float_layers(row.config, overview.config.space)
    yield "in float:" if kept else "in float: nothing that the space includes"
    yield from (f"  {layers.pattern}: {layers.why}" for layers in kept)
    if sensitivity is not None:
        yield sensitivity
    yield from (
        f"{overview.config.target} cannot execute {what}: {reason}"
        for what, reason in left_out(overview.config.space, overview.config.target).items()
    )
    near = neighbours(row, overview)
    if not near:
        yield "choices: no other config was evaluated to compare with"
        return
    yield "choices, against the nearest evaluated trials:"
    yield from (f"  {_sentence(neighbour)}" for neighbour in near)


def _sensitivity(row: "TrialRow", overview: "Overview", ref: "StudyRef") -> str | None:
    """Return what the stored sensitivity map says about a trial; None without a map."""
    from search.explain import sensitivity_sentence
    from search.locate import opened_study
    from search.sensitivity import map_of_study
    from search.storage import stored_prompts

    assert row.config is not None, "the command has looked"
    with opened_study(ref) as study:
        prompts = stored_prompts(study)
    try:
        found = map_of_study(overview.config.model_copy(update={"store": str(ref.store)}), prompts)
    except SearchError:
        return None
    return sensitivity_sentence(row.config, found)


def _sentence(neighbour: "Neighbour") -> str:
    choices = " and ".join(f"{name} {own}, not {other}" for name, (own, other) in neighbour.choices.items())
    gains = ", ".join(f"{name} {value:+.3g}" for name, value in neighbour.gains.items())
    outside = "" if neighbour.is_feasible else ", which breaks a bound"
    kinds, devices = neighbour.latency_kinds, neighbour.timed_on
    reasons = [] if kinds is None else [f"its latency is {kinds[1]} and not {kinds[0]}"]
    reasons += [] if devices is None else [f"it was timed on {devices[1]} and not on {devices[0]}"]
    apart = f"; {' and '.join(reasons)}, so latencies are not compared" if reasons else ""
    return f"{choices} (trial {neighbour.number}{outside}): {gains}{apart}"
