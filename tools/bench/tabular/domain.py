"""The space of the tabular benchmark: 18 bundles of techniques times all subsets of four units of layers.

The same layers are offered in two encodings: a switch for each unit (raw bits, 16 subsets), and a ladder of the units
ordered by measured sensitivity (5 nested sets). Equal layers are equal configs, so one table serves both.
"""

from collections.abc import Callable, Sequence
from typing import Any

from hyquant.layers import first_match
from hyquant.models.base import DeploymentShape
from hyquant.sensitivity.ladder import Ladder
from hyquant.sensitivity.map import SensitivityMap, by_band
from search.study import StudyConfig
from spaces.space import Preset, PresetParams, SearchSpace, ShareRange

INCLUDE = ("double_blocks.*attn_*", "double_blocks.*mlp.*", "single_blocks.*.linear[12]")
"""Everything in the blocks but modulation, which sees one row per video and takes no time."""

UNITS = {
    "double": ("*double_blocks*",),
    "single_0": ("*single_blocks.0.*",),
    "linear1": ("*single_blocks.[123].linear1",),
    "linear2": ("*single_blocks.[123].linear2",),
}
"""What stays in float together; each layer belongs to one unit."""

STRATEGIES = (
    *("dynamic", "static", "timestep", "m3", "m4", "m6"),
    *("m4+static", "m4+timestep", "fa3", "m4+fa3"),
)
PRESETS: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {"strategy": "timestep", "act_method": "minmax", "timestep_sep_share": 0.5}),
    (0, {"strategy": "dynamic"}),
    (0, {"strategy": "fa3"}),
    *((rung, {"strategy": "m4"}) for rung in range(len(UNITS))),
    (0, {"strategy": "m3"}),
    (0, {"strategy": "m6"}),
    *((rung, {"strategy": "m4+fa3"}) for rung in range(2)),
)
"""Recipes to evaluate first: the seed's, one smoothed recipe on every rung, and others at the bottom.

After a first replay `m3`, `m6` and a second `m4+fa3` replaced two static recipes; docs/evaluation.md says so.
"""

METRICS = ("clip_prompt", "clip_reference", "psnr_db", "ssim", "motion_energy_ratio", "collapsed")
NUM_STEPS = 8
NUM_PROMPTS = 8


def tabular_study(config: StudyConfig) -> StudyConfig:
    """Return the study of the mini model with the table's space, steps, prompts and metrics."""
    workload = config.workload.model_copy(
        update={
            "num_search_prompts": NUM_PROMPTS,
            "settings": config.workload.settings.model_copy(update={"num_steps": NUM_STEPS, "batch_size": NUM_PROMPTS}),
        }
    )
    shape = DeploymentShape(**{**config.deployment.model_dump(), "num_steps": NUM_STEPS})
    update = {"workload": workload, "space": base_space(()), "deployment": shape, "metrics": METRICS}
    return config.model_copy(update=update)


def base_space(layers: Sequence[str], order: Sequence[str] = ()) -> SearchSpace:
    """Return the space with a switch for each unit.

    Args:
        layers: Canonical names of what takes part; none if they are not known yet.
        order: Units by sensitivity, which presets need; there are none without it.
    """
    ladder = Ladder(source="none", layers=tuple(layers), rungs=()) if layers else None
    return SearchSpace(
        name="tabular",
        strategies=STRATEGIES,
        timestep_sep_share=ShareRange(low=0.0, high=0.5, step=0.5),
        act_methods=("minmax", "histogram"),
        placements=("fold",),
        include=INCLUDE,
        exclusions="ladder",
        switches=UNITS,
        ladder=ladder,
        presets=presets(lambda rung: {"float_rungs": 0, "switches": tuple(order[:rung])}) if order else (),
    )


def presets(excluding: Callable[[int], dict[str, Any]]) -> tuple[Preset, ...]:
    """Return `PRESETS`, with the parameters that leave the units of so many rungs in float."""
    return tuple(
        Preset(name=f"p{index}", params=PresetParams(**params, **excluding(rung)))
        for index, (rung, params) in enumerate(PRESETS)
    )


def ladder_space(layers: Sequence[str], order: Sequence[str]) -> SearchSpace:
    """Return the space with a ladder whose rungs are the units in an order."""
    rungs = tuple(tuple(layer for layer in layers if first_match(layer, UNITS[unit])) for unit in order)
    space = base_space(layers)
    return SearchSpace.model_validate(
        {
            **space.model_dump(),
            "switches": {},
            "presets": [preset.model_dump() for preset in presets(lambda rung: {"float_rungs": rung})],
            "ladder": Ladder(source="units", layers=tuple(layers), rungs=rungs).model_dump(),
        }
    )


def order_of_units(found: SensitivityMap) -> tuple[str, ...]:
    """Return the units by measured sensitivity, the most sensitive first.

    A unit's is the root of the sum of its bands' squares, as errors of bands that do not interact add up.
    """
    by_unit = dict.fromkeys(UNITS, 0.0)
    for (block, kind), value in by_band(found).items():
        unit = next(name for name, patterns in UNITS.items() if first_match(f"{block}.{kind}", patterns))
        by_unit[unit] += value**2
    return tuple(sorted(by_unit, key=lambda unit: -by_unit[unit]))
