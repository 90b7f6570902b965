"""The command metrics: what videos can be judged by, and what each number is blind to."""

from typing import TYPE_CHECKING, Any

from search.commands.options import AsJson
from search.console import print_json, print_line, print_table

if TYPE_CHECKING:
    from metrics.base import MetricSpec

_BETTER = {"maximize": "higher", "minimize": "lower"}


def metrics(as_json: AsJson = False) -> None:
    """Show every metric with direction, unit, range, cost, what it looks at and what it is blind to."""
    from metrics.registry import known_metrics

    specs = known_metrics().values()
    missing = {spec.name: _missing_weights(spec) for spec in specs}
    if as_json:
        print_json([_as_json(spec, missing[spec.name]) for spec in specs])
        return
    print_table([_row(spec) for spec in specs])
    print_line("A trial's value is the mean over its prompts; NAME_worst is the value of its worst prompt.")
    print_line("NAME_drop is how much worse than the float video; metrics that read no reference have it.")
    print_line("NAME_excess is how far from the float video beyond its noise floor; metrics with a reference have it.")
    for reason in missing.values():
        if reason is not None:
            print_line(f"not usable here: {reason}")


def _missing_weights(spec: "MetricSpec") -> str | None:
    from metrics.errors import MetricError

    try:
        spec.find_weights()
    except MetricError as error:
        return str(error)
    return None


def _row(spec: "MetricSpec") -> dict[str, str]:
    low, high = spec.range
    return {
        "metric": spec.name,
        "better": _BETTER[spec.direction],
        "unit": spec.unit,
        "range": f"{low:.4g} to {high:.4g}",
        "cost": spec.cost,
        "looks at": spec.looks_at,
        "blind to": spec.blind_to,
    }


def _as_json(spec: "MetricSpec", missing: str | None) -> dict[str, Any]:
    from search.plain import plain

    facts = (
        "name",
        "direction",
        "unit",
        "range",
        "needs",
        "looks_at",
        "blind_to",
        "cost",
        "of_itself",
        "smallest_side",
    )
    return {**{name: plain(getattr(spec, name)) for name in facts}, "missing": missing}
