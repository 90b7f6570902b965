"""Which layers so many rungs of a ladder and some switches leave in float, and the one config that stands for them."""

from collections.abc import Iterable

from hyquant.config import LayerSelection, QuantConfig
from hyquant.layers import first_match
from hyquant.sensitivity.bands import patterns_of
from hyquant.sensitivity.ladder import Ladder
from spaces.space import PresetParams, SearchSpace


def excluded_patterns(ladder: Ladder, float_rungs: int, switched_on: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the patterns of the layers that so many rungs and some switches leave in float.

    Args:
        ladder: The ladder.
        float_rungs: How many of its rungs.
        switched_on: The patterns of each switch that is on.
    """
    excluded = set(ladder.excluded(float_rungs))
    for patterns in switched_on:
        excluded |= {layer for layer in ladder.layers if first_match(layer, patterns)}
    return patterns_of(excluded, ladder.layers)


def exclusion_params(params: PresetParams, space: SearchSpace) -> dict[str, bool]:
    """Return the switches of a preset as Optuna parameters; none without a ladder."""
    return {switch_param(name): name in params.switches for name in space.switches}


def canonical(config: QuantConfig, layers: tuple[str, ...]) -> QuantConfig:
    """Return the one config that stands for all that do the same to a model.

    Smoothing that reaches no quantized layer is no smoothing. If every layer stays in float, so do the Linears as a
    whole, and nothing else that is said of them matters.

    Args:
        config: A config whose Linears are quantized.
        layers: Canonical names of all layers that its selection includes.
    """
    quantized = [name for name in layers if first_match(name, config.layers.exclude) is None]
    if not quantized:
        return QuantConfig(linear=None, attention=config.attention, layers=LayerSelection())
    smoothing = config.smoothing
    if smoothing is not None and not any(first_match(name, smoothing.layers) for name in quantized):
        return config.model_copy(update={"smoothing": None})
    return config


def switch_param(name: str) -> str:
    """Return the name of a switch's Optuna parameter."""
    return f"switch_{name}"
