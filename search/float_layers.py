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
    """Layers that stay in float, as one pattern or "all but" some patterns, and why."""

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
    """Return what a config leaves in float and why, one entry per pattern, and one for all that it does not include."""
    if config.linear is None:
        return [FloatLayers("*", "no Linear is quantized")]
    patterns = config.layers.exclude
    left_out = [FloatLayers(_all_but(config), BY_HAND)] if _is_narrower(config, space) else []
    if space.exclusions != LADDER:
        name = _set_name(config, space)
        why = BY_HAND if name is None else f"exclusion set {name}"
        return [*left_out, *(FloatLayers(pattern, why) for pattern in patterns)]
    choice = ladder_choice(config, space)
    return [*left_out, *(FloatLayers(pattern, _why(pattern, choice, space)) for pattern in patterns)]


def in_words(config: QuantConfig, space: SearchSpace) -> str:
    """Return in a few words what a config leaves in float; its patterns if nothing of the space says so."""
    if config.linear is None:
        return "every Linear"
    chosen = ladder_choice(config, space) if space.exclusions == LADDER else _set_name(config, space)
    if chosen is not None:
        return str(chosen)
    return spelled_out(config) if _is_narrower(config, space) else ", ".join(config.layers.exclude)


def spelled_out(config: QuantConfig) -> str:
    """Return in words what a config leaves in float by its own patterns, both kinds of them."""
    return "; also ".join(filter(None, (_all_but(config), ", ".join(config.layers.exclude))))


def ladder_choice(config: QuantConfig, space: SearchSpace) -> LadderChoice | None:
    """Return the fewest switches and the lowest rung that leave in float just what a config does; None if none do."""
    ladder = space.ladder
    if ladder is None:
        return None
    kept = _matched(ladder, config.layers.exclude) | _left_out(ladder, config, space)
    for count in range(len(space.switches) + 1):
        for switches in combinations(space.switches, count):
            by_switch = _matched(ladder, tuple(pattern for name in switches for pattern in space.switches[name]))
            for rung in range(ladder.height + 1):
                if by_switch | set(ladder.excluded(rung)) == kept:
                    return LadderChoice(rung, switches)
    return None


def _all_but(config: QuantConfig) -> str:
    return f"all but {', '.join(config.layers.include)}"


def _set_name(config: QuantConfig, space: SearchSpace) -> str | None:
    sets = {} if space.exclusions == LADDER or _is_narrower(config, space) else space.exclusions
    return next((name for name, patterns in sets.items() if set(patterns) == set(config.layers.exclude)), None)


def _is_narrower(config: QuantConfig, space: SearchSpace) -> bool:
    """Tell whether a config leaves out what its space includes: by layers if a ladder names them, else by pattern."""
    if space.ladder is not None:
        return bool(_left_out(space.ladder, config, space))
    return "*" not in config.layers.include and not set(space.include) <= set(config.layers.include)


def _left_out(ladder: Ladder, config: QuantConfig, space: SearchSpace) -> set[str]:
    return _matched(ladder, space.include) - _matched(ladder, config.layers.include)


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
