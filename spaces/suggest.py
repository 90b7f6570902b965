"""From a trial and a space to one `QuantConfig`: define-by-run, so a live, frozen or fixed trial gives the same config.

A parameter is asked for only where it means something. Parameter names and choices are part of stored studies:

    strategy            one of space.strategies
    exclusion           name of one of space.exclusions; not with a ladder
    float_rungs         how many rungs of the ladder stay in float; with a ladder only
    switch_NAME         whether the layers of this switch stay in float; with a ladder only
    act_method          only where ranges are stored: timestep and static
    timestep_sep_share  only for timestep; the stored index is round(share * num_steps)
    percentile          only where ranges are stored and the space has several
    calibration         only where ranges are stored and the space has both
    placement           only where there is smoothing and the space has both
    attention_statistic only for fa3 and where the space has both
    group_size          only for w4a16 and where the space has several
"""

from typing import TYPE_CHECKING, Any

from hyquant.config import (
    M3,
    M4,
    M6,
    W4A8,
    W4A16,
    W8A16,
    AttentionScheme,
    FA3Fp8,
    FA3Int8,
    LayerSelection,
    LinearScheme,
    QuantConfig,
    Smoothing,
    StoredRange,
    W4A4Dynamic,
    W8A8Dynamic,
    W8A8Static,
    W8A8Timestep,
)
from hyquant.errors import ConfigError
from spaces.exclusion import canonical, excluded_patterns, exclusion_params, switch_param
from spaces.space import LADDER, SearchSpace, did_you_mean, optional_choices
from spaces.strategy import StrategyParts, parts_of

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

_WITHOUT_RANGES: dict[str, type[W8A8Dynamic] | type[W8A16] | type[W4A16] | type[W4A8] | type[W4A4Dynamic]] = {
    "dynamic": W8A8Dynamic,
    "w8a16": W8A16,
    "w4a16": W4A16,
    "w4a8": W4A8,
    "w4a4_dynamic": W4A4Dynamic,
}
_SMOOTHINGS: dict[str, type[M3] | type[M4] | type[M6]] = {"m3": M3, "m4": M4, "m6": M6}


def suggest(trial: "BaseTrial", space: SearchSpace, *, num_steps: int) -> QuantConfig:
    """Ask a trial for one point of the space.

    Configs that are the same quantization are equal values, so that duplicates are found by digest: a `timestep_sep`
    equal to `num_steps` leaves no static step, and is therefore given as the plain dynamic scheme. With a ladder, the
    same layers are the same patterns however rungs and switches came to them; see `spaces.exclusion.canonical`.

    Args:
        trial: Anything with Optuna's `suggest_*`: a live trial, or a FrozenTrial or FixedTrial to replay one.
        space: What may be chosen.
        num_steps: Denoising steps of the study's renderings.

    Raises:
        ConfigError: If the space wants a ladder and has none yet.

    Source: share and index of the first static step: msModelSlim's `timestep_sep`, made independent of the step count.
    """
    strategy = trial.suggest_categorical("strategy", space.strategies)
    exclude = _exclude(trial, space)
    parts = parts_of(strategy)
    linear: LinearScheme = _linear_scheme(trial, space, parts, num_steps)
    optional: dict[str, Any] = {
        name: trial.suggest_categorical(name, choices) if is_asked else choices[0]
        for name, is_asked, choices in optional_choices(strategy, space)
    }
    stores_ranges = isinstance(linear, StoredRange)
    if stores_ranges:
        percentile = None if optional["percentile"] == "none" else optional["percentile"]
        linear = linear.model_copy(update={"percentile": percentile})
    elif isinstance(linear, W4A16):
        linear = W4A16(group_size=optional["group_size"])
    config = QuantConfig(
        linear=linear,
        smoothing=_smoothing(parts, optional),
        attention=_attention(parts, optional),
        calibration=optional["calibration"] if stores_ranges else "single_pass",
        layers=LayerSelection(include=space.include, exclude=exclude),
    )
    return config if space.ladder is None else canonical(config, space.ladder.layers)


def _exclude(trial: "BaseTrial", space: SearchSpace) -> tuple[str, ...]:
    if space.exclusions != LADDER:
        return space.exclusions[trial.suggest_categorical("exclusion", tuple(space.exclusions))]
    if space.ladder is None:
        raise ConfigError(
            f"a space with `exclusions: ladder` needs its ladder, but that of {space.name} is not measured; run "
            "hyq-search sensitivity first"
        )
    float_rungs = trial.suggest_int("float_rungs", 0, space.ladder.height)
    is_on = {name: trial.suggest_categorical(switch_param(name), (False, True)) for name in space.switches}
    return excluded_patterns(space.ladder, float_rungs, (space.switches[name] for name in is_on if is_on[name]))


def _linear_scheme(trial: "BaseTrial", space: SearchSpace, parts: StrategyParts, num_steps: int) -> LinearScheme:
    if not parts.stores_ranges:
        return _WITHOUT_RANGES[parts.scheme]()
    act_method: Any = trial.suggest_categorical("act_method", space.act_methods)
    if parts.scheme == "static":
        return W8A8Static(act_method=act_method)
    grid = space.timestep_sep_share
    share = trial.suggest_float("timestep_sep_share", grid.low, grid.high, step=grid.step)
    timestep_sep = round(share * num_steps)
    return (
        W8A8Dynamic() if timestep_sep == num_steps else W8A8Timestep(act_method=act_method, timestep_sep=timestep_sep)
    )


def _smoothing(parts: StrategyParts, optional: dict[str, Any]) -> Smoothing | None:
    return None if parts.smoothing is None else _SMOOTHINGS[parts.smoothing](placement=optional["placement"])


def _attention(parts: StrategyParts, optional: dict[str, Any]) -> AttentionScheme | None:
    if parts.attention is None:
        return None
    return FA3Fp8() if parts.attention == "fp8" else FA3Int8(statistic=optional["attention_statistic"])


def preset_params(space: SearchSpace, preset: str) -> dict[str, str | float]:
    """Return the Optuna parameters of a preset by its name, for `study.enqueue_trial`.

    Raises:
        ConfigError: If the space has no such preset; the message lists the known ones.
    """
    by_name = {entry.name: entry.params for entry in space.presets}
    if preset not in by_name:
        known = tuple(by_name)
        raise ConfigError(
            f"a preset of space {space.name} is one of {list(known)}, but got {preset!r}{did_you_mean(preset, known)}"
        )
    params = by_name[preset]
    return {**params.model_dump(exclude_none=True, exclude={"switches"}), **exclusion_params(params, space)}
