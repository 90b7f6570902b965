"""What an inference engine cannot execute, taken out of a search space.

Sources: mindiesd 3.1.0, which skips `FAQuant` entries without a message (its int8 attention ended with the 2.3 line),
keeps the float weights of its own model, so that smoothing folded into one of them is lost, and runs float8 attention
on Ascend 950 only.
"""

from hyquant.config import Target
from spaces.space import Preset, SearchSpace
from spaces.strategy import parts_of

_INT8_ATTENTION = ("hyquant", "mindie-sd-2.3/910b")
_FLOAT8_ATTENTION = ("hyquant", "mindie-sd-3.1/950")


def left_out(space: SearchSpace, target: Target) -> dict[str, str]:
    """Return strategies and placements of a space that a target cannot execute, each with the reason."""
    reasons = {strategy: reason for strategy in space.strategies if (reason := _objection(strategy, target))}
    if target != "hyquant" and "fold" in space.placements and len(space.placements) > 1:
        reasons["placement fold"] = f"{target} keeps its own float weights, so a fold into them is lost"
    return reasons


def narrowed(space: SearchSpace, target: Target) -> SearchSpace:
    """Return a space without what a target cannot execute, and without the presets that need it.

    Raises:
        ValueError: If nothing is left.
    """
    out = left_out(space, target)
    strategies = tuple(strategy for strategy in space.strategies if strategy not in out)
    if not strategies:
        raise ValueError(
            f"a space must hold a strategy that its target can execute, but {target} can execute none of "
            f"{list(space.strategies)}; choose another target or add a strategy such as 'dynamic'"
        )
    placements = tuple(place for place in space.placements if f"placement {place}" not in out)
    presets = [preset for preset in space.presets if preset.params.strategy in strategies]
    if placements != space.placements:
        presets = [_without_placement(preset) for preset in presets if preset.params.placement != "fold"]
    return space.model_copy(update={"strategies": strategies, "placements": placements, "presets": tuple(presets)})


def _without_placement(preset: Preset) -> Preset:
    """Return a preset of a space that has one placement only, which is no parameter there."""
    return preset.model_copy(update={"params": preset.params.model_copy(update={"placement": None})})


def _objection(strategy: str, target: Target) -> str | None:
    attention = parts_of(strategy).attention
    if attention == "fa3" and target not in _INT8_ATTENTION:
        return f"{target} ignores int8 attention without a message"
    if attention == "fp8" and target not in _FLOAT8_ATTENTION:
        return f"{target} has no float8 attention"
    return None
