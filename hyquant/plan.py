"""Deciding what happens to every layer before anything happens: a configuration becomes a `QuantPlan`."""

from collections.abc import Iterator, Sequence
from typing import Literal

from hyquant.attention.rotation import rotation_problem
from hyquant.config import FA3Fp8, FA3Int8, FrozenModel, LayerSelection, QuantConfig, Target
from hyquant.errors import ConfigError
from hyquant.layers import first_match, require_matches, select_layers
from hyquant.models.attentions import AttentionBlock
from hyquant.models.names import LayerGroup
from hyquant.models.producers import junction_of
from hyquant.schemes import scheme_of
from hyquant.targets import target_problem

SchemeName = Literal["w8a8_static", "w8a8_dynamic", "w8a8_timestep", "w8a16", "w4a16", "w4a8", "w4a4_dynamic"]
AttentionSchemeName = Literal["fa3_int8", "fp8_dynamic"]


class LayerPlan(FrozenModel):
    """What happens to one layer group, and why.

    `scheme=None` leaves it in float. `modules` are paths in the denoiser in row order; they share one input. `smoothed`
    says that its input is divided by a smoothing scale, `folded` that smoothing scales are worked into its weights
    without a multiplier at run time: it reads or produces a smoothed input under placement "fold". `has_bias` says that
    a member has a bias.
    """

    name: str
    modules: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    scheme: SchemeName | None
    smoothed: bool
    folded: bool = False
    reason: str
    has_bias: bool = True

    @property
    def has_multiplier(self) -> bool:
        """Say whether the layer's input is multiplied at run time."""
        return self.smoothed and not self.folded


class AttentionPlan(FrozenModel):
    """What happens to the attention of one block, and why; `scheme=None` leaves it in float."""

    name: str
    module: str
    heads: int
    head_dim: int
    scheme: AttentionSchemeName | None
    reason: str


class QuantPlan(FrozenModel):
    """A configuration worked out for one model: every layer group and block in model order with its decision."""

    config: QuantConfig
    num_steps: int
    layers: tuple[LayerPlan, ...]
    attentions: tuple[AttentionPlan, ...] = ()

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """Return the groups that are quantized."""
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @property
    def quantized_attentions(self) -> tuple[AttentionPlan, ...]:
        """Return the blocks whose attention is quantized."""
        return tuple(block for block in self.attentions if block.scheme is not None)

    @property
    def smoothed(self) -> tuple[LayerPlan, ...]:
        """Return the groups whose outliers are moved into the weights first."""
        return tuple(layer for layer in self.layers if layer.smoothed)

    @property
    def rewritten(self) -> tuple[LayerPlan, ...]:
        """Return the groups that stay in float with other weights, because smoothing scales are folded into them."""
        return tuple(layer for layer in self.layers if layer.folded and layer.scheme is None)

    @property
    def smoothing_units(self) -> tuple[tuple[LayerPlan, ...], ...]:
        """Return the smoothed groups by what must share one smoothing scale: folded into the same rows, else alone."""
        units: dict[tuple[str, ...], list[LayerPlan]] = {}
        for layer in self.smoothed:
            junction = junction_of(layer.name) if layer.folded else None
            units.setdefault((layer.name,) if junction is None else junction.consumers, []).append(layer)
        return tuple(tuple(unit) for unit in units.values())


def build_plan(
    groups: Sequence[LayerGroup],
    config: QuantConfig,
    *,
    num_steps: int,
    model: str = "hunyuan_video",
    target: Target = "hyquant",
    attentions: Sequence[AttentionBlock] = (),
) -> QuantPlan:
    """Decide for every layer group, and for every block's attention, what a configuration does to it.

    Args:
        groups: All layer groups of the model, in model order.
        config: What to do. `timestep_sep` at or above `num_steps` makes every step dynamic.
        num_steps: Denoising steps of the runs the plan is for, at least 1; tables get this many rows.
        model: Name of the model, for messages.
        target: What is meant to execute the result.
        attentions: The blocks that own an attention, by `hyquant.models.attentions.attention_blocks`; needed only where
            the configuration quantizes attention.

    Raises:
        ConfigError: If `num_steps` is below 1, no layer is selected, smoothing would touch no quantized layer, a
            smoothed layer has nothing to fold into, attention is to be quantized and there are no blocks, a layer's
            input channels do not fit the scheme, or the target cannot execute the result.
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
    folded = _folded(smoothed, selected, config)
    layers = (
        LayerPlan(
            name=group.name,
            modules=group.modules,
            in_features=group.in_features,
            out_features=group.out_features,
            scheme=scheme if group.name in selected else None,
            smoothed=group.name in smoothed,
            folded=group.name in folded,
            reason=_reason(group.name, config.layers) if scheme is not None else _float_reason(config),
            has_bias=group.has_bias,
        )
        for group in groups
    )
    plan = QuantPlan(
        config=config,
        num_steps=num_steps,
        layers=tuple(layers),
        attentions=tuple(_attention_plans(attentions, config, model=model)),
    )
    if (problem := shape_problem(plan) or target_problem(plan, target)) is not None:
        raise ConfigError(problem)
    return plan


def shape_problem(plan: QuantPlan) -> str | None:
    """Return why a scheme cannot hold a layer's weights or rotate an attention's heads, None if it can all of them."""
    linear, attention = plan.config.linear, plan.config.attention
    if isinstance(attention, FA3Fp8) and attention.rotate:
        for block in plan.quantized_attentions:
            if (problem := rotation_problem(block.head_dim)) is not None:
                return problem
    if linear is None:
        return None
    multiple = scheme_of(linear).input_multiple
    misfits = [layer for layer in plan.quantized if layer.in_features % multiple]
    if not misfits:
        return None
    way_out = (
        "choose a group_size that divides it, 0 for one scale per output channel"
        if linear.kind == "w4a16"
        else "exclude the layer"
    )
    return (
        f"the input channels of a {linear.kind} layer must be a multiple of {multiple}, but {misfits[0].name} has "
        f"{misfits[0].in_features} ({len(misfits)} such layers); {way_out}"
    )


def _attention_plans(blocks: Sequence[AttentionBlock], config: QuantConfig, *, model: str) -> Iterator[AttentionPlan]:
    names = [block.name for block in blocks]
    attention = config.attention
    if attention is not None:
        if not blocks:
            raise ConfigError(
                f"a configuration with {attention.kind} needs blocks that own an attention, but {model} was given with "
                "none; pass attentions=attention_blocks(denoiser), or use attention=None."
            )
        require_matches(names, {"attention": attention.layers}, model=model)
    for block in blocks:
        pattern = None if attention is None else first_match(block.name, attention.layers)
        yield AttentionPlan(
            name=block.name,
            module=block.module,
            heads=block.heads,
            head_dim=block.head_dim,
            scheme=None if attention is None or pattern is None else attention.kind,
            reason="the configuration keeps attention in float"
            if attention is None
            else "not included by any pattern"
            if pattern is None
            else f"included by '{pattern}'",
        )


def _float_reason(config: QuantConfig) -> str:
    is_control = config.attention is None
    return "the configuration is the control" if is_control else "the configuration keeps Linears in float"


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


def _folded(smoothed: set[str], selected: set[str], config: QuantConfig) -> set[str]:
    """Return every layer whose weights change when smoothing scales are folded; none under placement "multiplier"."""
    if config.smoothing is None or config.smoothing.placement == "multiplier":
        return set()
    folded: set[str] = set()
    for name in sorted(smoothed):
        junction = junction_of(name)
        if junction is None:
            raise ConfigError(
                f"a layer that is smoothed with placement fold must read what linear rows produce, but {name} does "
                "not; use placement multiplier or take it out of the smoothing's layers."
            )
        if left := sorted(set(junction.consumers) & selected - smoothed):
            raise ConfigError(
                f"layers that read one produced input must be folded together, but {name} is smoothed and {left[0]} is "
                "quantized without; name both in the smoothing's layers or use placement multiplier."
            )
        if len(junction.consumers) > 1 and isinstance(config.attention, FA3Int8):
            raise ConfigError(
                f"the scales of int8 attention must belong to the v that runs, but folding {name} would change v after "
                "they were observed; use placement multiplier or take it out of the smoothing's layers."
            )
        folded |= {*junction.consumers, *(rows.name for rows in junction.producers)}
    return folded


def _reason(name: str, selection: LayerSelection) -> str:
    excluded = first_match(name, selection.exclude)
    if excluded is not None:
        return f"excluded by '{excluded}'"
    included = first_match(name, selection.include)
    return f"included by '{included}'" if included is not None else "not included by any pattern"
