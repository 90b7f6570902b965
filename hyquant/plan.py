"""Deciding what happens to every layer before anything happens: a configuration becomes a `QuantPlan`."""

from collections.abc import Sequence
from typing import Literal

from hyquant.config import FrozenModel, LayerSelection, QuantConfig
from hyquant.errors import ConfigError
from hyquant.layers import first_match, require_matches, select_layers
from hyquant.models.names import LayerGroup

SchemeName = Literal["w8a8_static", "w8a8_dynamic", "w8a8_timestep"]


class LayerPlan(FrozenModel):
    """What happens to one layer group, and why.

    `scheme=None` leaves it in float. `modules` are paths in the denoiser in row order; they share one input.
    """

    name: str
    modules: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    scheme: SchemeName | None
    smoothed: bool
    reason: str


class QuantPlan(FrozenModel):
    """A configuration worked out for one model: every layer group in model order with its decision."""

    config: QuantConfig
    num_steps: int
    layers: tuple[LayerPlan, ...]

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """Return the groups that are quantized."""
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @property
    def smoothed(self) -> tuple[LayerPlan, ...]:
        """Return the groups whose outliers are moved into the weights first."""
        return tuple(layer for layer in self.layers if layer.smoothed)


def build_plan(
    groups: Sequence[LayerGroup], config: QuantConfig, *, num_steps: int, model: str = "hunyuan_video"
) -> QuantPlan:
    """Decide for every layer group what a configuration does to it.

    Args:
        groups: All layer groups of the model, in model order.
        config: What to do. `timestep_sep` at or above `num_steps` makes every step dynamic.
        num_steps: Denoising steps of the runs the plan is for, at least 1; tables get this many rows.
        model: Name of the model, for messages.

    Raises:
        ConfigError: If `num_steps` is below 1, no layer is selected, or smoothing would touch no quantized layer.
        LayerMatchError: If a pattern matches no layer of the model.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps must be at least 1, but got {num_steps}; give the length of the denoising loop.")
    names = [group.name for group in groups]
    scheme = None if config.linear is None else config.linear.kind
    selected = set(select_layers(names, config.layers, model=model)) if scheme is not None else set()
    if scheme is not None and not selected:
        raise ConfigError(
            f"a quantized configuration must select a layer, but include {config.layers.include} minus "
            f"exclude {config.layers.exclude} leaves none; use linear=None for the float control."
        )
    smoothed = _smoothed(names, selected, config, model=model)
    layers = (
        LayerPlan(
            name=group.name,
            modules=group.modules,
            in_features=group.in_features,
            out_features=group.out_features,
            scheme=scheme if group.name in selected else None,
            smoothed=group.name in smoothed,
            reason=_reason(group.name, config.layers) if scheme is not None else "the configuration is the control",
        )
        for group in groups
    )
    return QuantPlan(config=config, num_steps=num_steps, layers=tuple(layers))


def _smoothed(names: Sequence[str], selected: set[str], config: QuantConfig, *, model: str) -> set[str]:
    if config.smoothing is None:
        return set()
    patterns = config.smoothing.layers
    require_matches(names, {"smoothing": patterns}, model=model)
    smoothed = {name for name in selected if first_match(name, patterns) is not None}
    if not smoothed:
        raise ConfigError(
            f"smoothing must reach a quantized layer, but its patterns {patterns} match none of the "
            f"{len(selected)} selected ones; drop the smoothing or change the layers."
        )
    return smoothed


def _reason(name: str, selection: LayerSelection) -> str:
    excluded = first_match(name, selection.exclude)
    if excluded is not None:
        return f"excluded by '{excluded}'"
    included = first_match(name, selection.include)
    return f"included by '{included}'" if included is not None else "not included by any pattern"
