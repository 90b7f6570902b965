"""Which layers stay in float: a named set, or so many rungs of a ladder and the layers of some switches."""

from typing import TYPE_CHECKING

from hyquant.config import LayerSelection, QuantConfig
from hyquant.errors import ConfigError
from hyquant.layers import first_match
from hyquant.sensitivity.bands import patterns_of
from spaces.space import LADDER, PresetParams, SearchSpace

if TYPE_CHECKING:
    from optuna.trial import BaseTrial


def suggest_exclude(trial: "BaseTrial", space: SearchSpace) -> tuple[str, ...]:
    """Ask a trial which layers stay in float and return their patterns.

    Raises:
        ConfigError: If the space wants a ladder and has none yet.
    """
    if space.exclusions != LADDER:
        return space.exclusions[trial.suggest_categorical("exclusion", tuple(space.exclusions))]
    ladder = space.ladder
    if ladder is None:
        raise ConfigError(
            f"space {space.name} has `exclusions: ladder`, but its ladder is not measured; run hyq-search sensitivity "
            f"first"
        )
    excluded = set(ladder.excluded(trial.suggest_int("float_rungs", 0, ladder.height)))
    for name, patterns in space.switches.items():
        if trial.suggest_categorical(_switch(name), (False, True)):
            excluded |= {layer for layer in ladder.layers if first_match(layer, patterns)}
    return patterns_of(excluded, ladder.layers)


def exclusion_params(params: PresetParams, space: SearchSpace) -> dict[str, bool]:
    """Return the switches of a preset as Optuna parameters; none without a ladder."""
    return {_switch(name): name in params.switches for name in space.switches}


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


def _switch(name: str) -> str:
    return f"switch_{name}"
