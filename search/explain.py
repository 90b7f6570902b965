"""What each choice of a trial bought, and how sensitive what it quantizes is.

A choice is judged by the evaluated trials that differ in it alone. Where there is none, the nearest trial that differs
in two says what both together did.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hyquant.config import QuantConfig
from hyquant.layers import takes_part
from hyquant.sensitivity.map import SensitivityMap, by_band
from search.float_layers import in_words, spelled_out
from search.logged import flatten
from search.overview import Overview, TrialRow

_PARTS = ("linear", "smoothing", "attention")
FLOAT_LAYERS = "layers in float"


@dataclass(frozen=True)
class Neighbour:
    """An evaluated trial that differs in few choices.

    Attributes:
        number: Its number.
        choices: By choice what the explained trial has, and what the neighbour has; layers in float as rung and
            switches, as an exclusion set, or as patterns if they are neither.
        gains: By objective the explained trial's value minus the neighbour's.
        is_feasible: Whether the neighbour keeps the study's bounds.
        latency_kinds: The kinds of the explained trial's latency and of the neighbour's if they differ; then gains say
            nothing of latency. None if both are alike.
        timed_on: The devices that timed the explained trial and the neighbour if they differ; gains say nothing of
            latency then either. None if both are alike, or one was not timed.
    """

    number: int
    choices: dict[str, tuple[str, str]]
    gains: dict[str, float]
    is_feasible: bool
    latency_kinds: tuple[str, str] | None = None
    timed_on: tuple[str, str] | None = None


def differences(one: QuantConfig, other: QuantConfig) -> dict[str, tuple[str, str]]:
    """Return the choices in which two configs differ, with the value of each; a part of another kind is one choice."""
    found: dict[str, tuple[str, str]] = {}
    own, others = one.model_dump(mode="json"), other.model_dump(mode="json")
    for part in _PARTS:
        kinds = _kind(own.pop(part)), _kind(others.pop(part))
        if kinds[0] != kinds[1]:
            found[part] = kinds
        else:
            found |= _unequal(_fields(one, part), _fields(other, part), f"{part}.")
    del own["layers"], others["layers"]
    if set(one.layers.include) != set(other.layers.include):
        found[FLOAT_LAYERS] = (spelled_out(one), spelled_out(other))
    elif set(one.layers.exclude) != set(other.layers.exclude):
        found[FLOAT_LAYERS] = (_excluded(one), _excluded(other))
    return found | _unequal(dict(flatten(own)), dict(flatten(others)), "")


def neighbours(row: TrialRow, overview: Overview) -> list[Neighbour]:
    """Return the evaluated trials that differ from one in a single choice, by choice; else the nearest few."""
    if row.config is None or row.values is None:
        return []
    found = []
    for other in overview.rows:
        if other.number == row.number or other.config is None or other.values is None:
            continue
        if other.state not in ("complete", "infeasible"):
            continue
        choices = differences(row.config, other.config)
        if FLOAT_LAYERS in choices:
            space = overview.config.space
            choices[FLOAT_LAYERS] = (in_words(row.config, space), in_words(other.config, space))
        kinds = _unequal_pair(row.latency_kind, other.latency_kind)
        devices = _unequal_pair(row.timed_on, other.timed_on)
        are_timed_alike = kinds is None and devices is None
        compared = [name for name in row.values if are_timed_alike or not name.startswith("latency")]
        gains = {name: row.values[name] - other.values[name] for name in compared if name in other.values}
        if choices:
            found.append(Neighbour(other.number, choices, gains, other.state == "complete", kinds, devices))
    fewest = min((len(neighbour.choices) for neighbour in found), default=0)
    nearest = [neighbour for neighbour in found if len(neighbour.choices) == fewest]
    return sorted(nearest, key=lambda neighbour: (sorted(neighbour.choices), neighbour.number))


def sensitivity_sentence(config: QuantConfig, found: SensitivityMap) -> str | None:
    """Return how much of the measured sensitivity a config quantizes; None if it quantizes no Linear.

    Sensitivities are added as squares, as errors of bands that do not interact add up. The map was measured with one
    scheme, so this speaks of the choice of layers alone.
    """
    if config.linear is None:
        return None
    values = by_band(found)
    quantized = {
        (band.block, band.kind)
        for band in found.subject.bands
        if any(takes_part(layer, config.layers) for layer in band.layers)
    }
    total = sum(value**2 for value in values.values())
    if not quantized or not 0 < total < float("inf"):
        return None
    share = sum(values[band] ** 2 for band in quantized) / total
    worst = max(quantized, key=lambda band: values[band])
    return (
        f"what is quantized holds {share:.0%} of the measured sensitivity, {'.'.join(worst)} alone "
        f"{values[worst] ** 2 / total:.0%} ({values[worst]:.2g} of the output)"
    )


def _unequal_pair(own: str | None, other: str | None) -> tuple[str, str] | None:
    return None if own is None or other is None or own == other else (own, other)


def _kind(part: Mapping[str, Any] | None) -> str:
    return "none" if part is None else str(part["kind"])


def _fields(config: QuantConfig, part: str) -> dict[str, str]:
    value = getattr(config, part)
    return {} if value is None else dict(flatten(value.model_dump(mode="json")))


def _unequal(own: Mapping[str, str], others: Mapping[str, str], prefix: str) -> dict[str, tuple[str, str]]:
    names = [name for name in own if own[name] != others.get(name, "none")]
    return {f"{prefix}{name}": (own[name], others.get(name, "none")) for name in names}


def _excluded(config: QuantConfig) -> str:
    return ", ".join(config.layers.exclude) or "none"
