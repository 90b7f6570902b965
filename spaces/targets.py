"""What an inference engine cannot execute, taken out of a search space.

Sources: mindiesd 3.1.0, which skips `FAQuant` entries without a message (its int8 attention ended with the 2.3 line),
keeps the float weights of its own model, so that smoothing folded into one of them is lost, and runs float8 attention
on Ascend 950 only. Of Linears with fewer bits it passes over W4A8, adds no bias under W4A4_DYNAMIC (all Linears of
HunyuanVideo have one), multiplies no input of weight-only ones, and knows no groups of W4A16.
"""

from typing import Any

from hyquant.config import Target
from hyquant.targets import ATTENTION_TARGETS, LINEAR_TARGETS, WITHOUT_MULTIPLIER, is_engine
from spaces.space import Preset, SearchSpace
from spaces.strategy import LINEAR_KINDS, parts_of


def left_out(space: SearchSpace, target: Target) -> dict[str, str]:
    """Return strategies, placements and group sizes that a target cannot execute of a space, each with the reason."""
    reasons = {strategy: reason for strategy in space.strategies if (reason := _objection(strategy, space, target))}
    reasons |= {
        f"group_size {size}": f"{target} loads one scale per output channel of w4a16"
        for size in space.group_sizes
        if size not in _group_sizes(space, target)
    }
    if is_engine(target) and "fold" in space.placements and len(space.placements) > 1:
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
    group_sizes = _group_sizes(space, target)
    presets = [preset for preset in space.presets if preset.params.strategy in strategies]
    if placements != space.placements:
        presets = [_without(preset, "placement") for preset in presets if preset.params.placement != "fold"]
    if group_sizes != space.group_sizes:
        presets = [_without(preset, "group_size") for preset in presets if not preset.params.group_size]
    changes: dict[str, Any] = {"strategies": strategies, "placements": placements, "group_sizes": group_sizes}
    return space.model_copy(update=changes | {"presets": tuple(presets)})


def _group_sizes(space: SearchSpace, target: Target) -> tuple[int, ...]:
    """Return the group sizes that a target loads, all where it loads none."""
    fitting = (0,) if is_engine(target) and 0 in space.group_sizes else space.group_sizes
    return fitting if any(parts_of(strategy).scheme == "w4a16" for strategy in space.strategies) else space.group_sizes


def _without(preset: Preset, parameter: str) -> Preset:
    """Return a preset of a space that has one choice only of a parameter, which is none there."""
    return preset.model_copy(update={"params": preset.params.model_copy(update={parameter: None})})


def _objection(strategy: str, space: SearchSpace, target: Target) -> str | None:
    smoothing, scheme, attention = parts_of(strategy)
    if attention == "fa3" and target not in ATTENTION_TARGETS["fa3_int8"]:
        return f"{target} ignores int8 attention without a message"
    if attention == "fp8" and target not in ATTENTION_TARGETS["fp8_dynamic"]:
        return f"{target} has no float8 attention"
    if target not in LINEAR_TARGETS[LINEAR_KINDS[scheme]]:
        return f"{target} leaves {scheme} layers in float without a message"
    if not is_engine(target):
        return None
    if smoothing is not None and "multiplier" not in space.placements:
        return f"{target} keeps its own float weights, so a fold into them is lost; add placement multiplier"
    if scheme == "w4a4_dynamic":
        return f"{target} adds no bias to {scheme} layers, and those of HunyuanVideo have one"
    if smoothing is not None and LINEAR_KINDS[scheme] in WITHOUT_MULTIPLIER:
        return f"{target} does not multiply the input of {scheme} layers, as {smoothing} needs it"
    if scheme == "w4a16" and 0 not in space.group_sizes:
        return f"{target} loads one scale per output channel of w4a16, group_size 0"
    return None
