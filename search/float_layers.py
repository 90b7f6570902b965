"""Which layers a config leaves in float, and why: an exclusion set of its space, or rungs of a ladder and switches."""

from dataclasses import dataclass
from itertools import combinations

from hyquant.config import QuantConfig
from hyquant.layers import first_match
from hyquant.sensitivity.ladder import Ladder
from spaces.space import LADDER, SearchSpace

BY_HAND = "written by hand"


@dataclass(frozen=True)
class FloatLayers:
    """Layers that stay in float, as one pattern, and why."""

    pattern: str
    why: str


@dataclass(frozen=True)
class LadderChoice:
    """What was chosen of a ladder: the rung, and the switches that are on."""

    rung: int
    switches: tuple[str, ...]

    def __str__(self) -> str:
        return " + ".join((f"rung {self.rung}", *self.switches))


def float_layers(config: QuantConfig, space: SearchSpace) -> list[FloatLayers]:
    """Return what a config leaves in float and why, one entry per pattern."""
    if config.linear is None:
        return [FloatLayers("*", "no Linear is quantized")]
    patterns = config.layers.exclude
    if space.exclusions != LADDER:
        name = _set_name(config, space)
        return [FloatLayers(pattern, BY_HAND if name is None else f"exclusion set {name}") for pattern in patterns]
    choice = ladder_choice(config, space)
    return [FloatLayers(pattern, _why(pattern, choice, space)) for pattern in patterns]


def in_words(config: QuantConfig, space: SearchSpace) -> str:
    """Return in a few words what a config leaves in float; its patterns if nothing of the space says so."""
    if config.linear is None:
        return "every Linear"
    chosen = ladder_choice(config, space) if space.exclusions == LADDER else _set_name(config, space)
    return ", ".join(config.layers.exclude) if chosen is None else str(chosen)


def ladder_choice(config: QuantConfig, space: SearchSpace) -> LadderChoice | None:
    """Return the fewest switches and the lowest rung that leave in float just what a config does; None if none do."""
    ladder = space.ladder
    if ladder is None:
        return None
    kept = _matched(ladder, config.layers.exclude)
    for count in range(len(space.switches) + 1):
        for switches in combinations(space.switches, count):
            by_switch = _matched(ladder, tuple(pattern for name in switches for pattern in space.switches[name]))
            for rung in range(ladder.height + 1):
                if by_switch | set(ladder.excluded(rung)) == kept:
                    return LadderChoice(rung, switches)
    return None


def _set_name(config: QuantConfig, space: SearchSpace) -> str | None:
    sets = {} if space.exclusions == LADDER else space.exclusions
    return next((name for name, patterns in sets.items() if set(patterns) == set(config.layers.exclude)), None)


def _why(pattern: str, choice: LadderChoice | None, space: SearchSpace) -> str:
    if choice is None or space.ladder is None:
        return BY_HAND
    layers = _matched(space.ladder, (pattern,))
    reasons = [
        f"rung {rung} of the ladder"
        for rung, added in enumerate(space.ladder.rungs[: choice.rung], start=1)
        if not layers.isdisjoint(added)
    ]
    reasons += [f"switch {name}" for name in choice.switches if layers & _matched(space.ladder, space.switches[name])]
    return " and ".join(reasons) or BY_HAND


def _matched(ladder: Ladder, patterns: tuple[str, ...]) -> set[str]:
    return {layer for layer in ladder.layers if first_match(layer, patterns) is not None}
