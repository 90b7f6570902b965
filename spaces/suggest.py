"""From a trial and a space to one `QuantConfig`: define-by-run, so a live, frozen or fixed trial gives the same config.

A parameter is asked for only where it means something. Parameter names and choices are part of stored studies:

    strategy            one of space.strategies
    exclusion           name of one of space.exclusions
    act_method          only for timestep and static
    timestep_sep_share  only for timestep; the stored index is round(share * num_steps)
"""

from typing import TYPE_CHECKING, cast

from hyquant.config import (
    M4,
    ActMethod,
    LayerSelection,
    LinearScheme,
    QuantConfig,
    W8A8Dynamic,
    W8A8Static,
    W8A8Timestep,
)
from hyquant.errors import ConfigError
from spaces.space import WITH_ACT_METHOD, SearchSpace, did_you_mean

if TYPE_CHECKING:
    from optuna.trial import BaseTrial


def suggest(trial: "BaseTrial", space: SearchSpace, *, num_steps: int) -> QuantConfig:
    """Ask a trial for one point of the space.

    Configs that are the same quantization are equal values, so that duplicates are found by digest: a `timestep_sep`
    equal to `num_steps` leaves no static step, and is therefore given as the plain dynamic scheme.

    Args:
        trial: Anything with Optuna's `suggest_*`: a live trial, or a FrozenTrial or FixedTrial to replay one.
        space: What may be chosen.
        num_steps: Denoising steps of the study's renderings.

    Source: share and index of the first static step: msModelSlim's `timestep_sep`, made independent of the step count.
    """
    strategy = trial.suggest_categorical("strategy", space.strategies)
    exclusion = trial.suggest_categorical("exclusion", tuple(space.exclusions))
    linear: LinearScheme = W8A8Dynamic()
    if strategy in WITH_ACT_METHOD:
        act_method = cast("ActMethod", trial.suggest_categorical("act_method", space.act_methods))
        linear = W8A8Static(act_method=act_method)
        if strategy == "timestep":
            grid = space.timestep_sep_share
            share = trial.suggest_float("timestep_sep_share", grid.low, grid.high, step=grid.step)
            timestep_sep = round(share * num_steps)
            is_dynamic = timestep_sep == num_steps
            linear = W8A8Dynamic() if is_dynamic else W8A8Timestep(act_method=act_method, timestep_sep=timestep_sep)
    return QuantConfig(
        linear=linear,
        smoothing=M4() if strategy == "m4" else None,
        layers=LayerSelection(include=space.include, exclude=space.exclusions[exclusion]),
    )


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
    return by_name[preset].model_dump(exclude_none=True)
