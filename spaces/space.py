"""What may be searched, as data: strategies, ranges, named exclusion sets and presets, read from YAML.

A `SearchSpace` is the opposite of a `QuantConfig`: a space holds every choice, a config holds one. `spaces.suggest`
turns a trial and a space into a config. Shipped spaces are the files in `spaces/presets/`; any YAML file of that form
works.

Layers stay in float by named sets of patterns, or with `exclusions: ladder` by how many rungs of a measured ladder and
by which switches. The ladder is no part of the file: it is put into the space before the study begins.
"""

import difflib
import math
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from hyquant.config import W4A16, ActMethod, FrozenModel, LayerSelection
from hyquant.errors import ConfigError
from hyquant.layers import first_match
from hyquant.sensitivity.ladder import Ladder
from hyquant.text_file import read_text
from spaces.strategy import Strategy, parts_of
from spaces.yaml_text import parse_yaml, what_it_holds

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]
Pattern = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

Calibration = Literal["single_pass", "sequential"]
Placement = Literal["multiplier", "fold"]
AttentionStatistic = Literal["window", "absmax"]
GroupSize = Annotated[int, Field(ge=0, multiple_of=32)]
Percentile = Annotated[float, Field(gt=0.5, lt=1.0)]

LADDER: Final = "ladder"
_SETS = "named sets"
Sets = dict[Name, tuple[Pattern, ...]]
Exclusions = Annotated[
    Annotated[Sets, Field(min_length=1), Tag(_SETS)] | Annotated[Literal["ladder"], Tag(LADDER)],
    Discriminator(lambda value: LADDER if isinstance(value, str) else _SETS),
]

_GRID_TOLERANCE = 1e-8  # of a step; Optuna's own tolerance for "lies on the grid"


class ShareRange(FrozenModel):
    """A grid of shares of the denoising steps: low, low + step, ..., high."""

    low: Share
    high: Share
    step: Annotated[float, Field(gt=0.0, le=1.0)]

    @model_validator(mode="after")
    def _is_a_grid(self) -> "ShareRange":
        if self.low > self.high:
            raise ValueError(f"low <= high must hold, but got low={self.low} and high={self.high}; swap them")
        if not self.contains(self.high):
            raise ValueError(
                f"high must be low plus a whole number of steps, but got low={self.low}, high={self.high} and "
                f"step={self.step}; choose a step that divides {self.high - self.low:g}"
            )
        return self

    def contains(self, share: float) -> bool:
        """Say whether a share lies on the grid."""
        position = (share - self.low) / self.step
        last = (self.high - self.low) / self.step
        on_grid = math.isclose(position, round(position), rel_tol=0.0, abs_tol=_GRID_TOLERANCE)
        return on_grid and -_GRID_TOLERANCE <= position <= last + _GRID_TOLERANCE


class PresetParams(FrozenModel):
    """One point of a space by Optuna parameter names; None where the strategy or the space has no such parameter.

    `switches` names those that are on, in a space with a ladder; the others are off.
    """

    strategy: Strategy
    exclusion: Name | None = None
    float_rungs: Annotated[int | None, Field(ge=0, exclude_if=lambda rungs: rungs is None)] = None
    switches: Annotated[tuple[Name, ...], Field(exclude_if=lambda names: not names)] = ()
    act_method: ActMethod | None = None
    percentile: Percentile | Literal["none"] | None = None
    calibration: Calibration | None = None
    placement: Placement | None = None
    attention_statistic: AttentionStatistic | None = None
    timestep_sep_share: Share | None = None
    group_size: Annotated[GroupSize | None, Field(exclude_if=lambda size: size is None)] = None


class Preset(FrozenModel):
    """A recipe every study evaluates first."""

    name: Name
    params: PresetParams


class SearchSpace(FrozenModel):
    """Everything a study may try.

    Attributes:
        strategies: The search's top-level choice, by the names of `spaces.strategy`.
        timestep_sep_share: Share of the steps that stays dynamic under `timestep`; a share here and an index in
            `QuantConfig`, so that one space serves 20 and 50 steps.
        act_methods: How stored activation ranges are found, with `timestep` and `static`.
        percentiles: Which share of all values a stored range keeps; "none" keeps all.
        calibrations: Whether stored ranges come from the float model, or layer by layer from a quantized one.
        placements: Where smoothing divides the input: at run time, or folded into the layer that makes it.
        attention_statistics: What the stored scales of `fa3` cover: a window that leaves out the outermost values, or
            all of them.
        group_sizes: How many input channels share a scale under `w4a16`; 0 means all.
        include: Glob patterns over canonical layer names that take part at all.
        exclusions: Named sets of glob patterns that stay in float; the search picks one set. Or "ladder": the search
            picks how many rungs of the ladder stay in float, and each of the switches.
        switches: Named sets of glob patterns that stay in float where their switch is on; with a ladder only.
        ladder: What the rungs are, once `hyq-search sensitivity` has measured them; with `exclusions: ladder` only.
        presets: Recipes that a study enqueues before it searches.
    """

    name: Name
    description: str = ""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)]
    timestep_sep_share: ShareRange = ShareRange(low=0.0, high=0.9, step=0.1)
    act_methods: Annotated[tuple[ActMethod, ...], Field(min_length=1)] = ("minmax", "mean_minmax")
    percentiles: Annotated[tuple[Percentile | Literal["none"], ...], Field(min_length=1)] = ("none",)
    calibrations: Annotated[tuple[Calibration, ...], Field(min_length=1)] = ("single_pass",)
    placements: Annotated[tuple[Placement, ...], Field(min_length=1)] = ("multiplier",)
    attention_statistics: Annotated[tuple[AttentionStatistic, ...], Field(min_length=1)] = ("window",)
    group_sizes: Annotated[
        tuple[GroupSize, ...], Field(min_length=1, exclude_if=lambda sizes: sizes == (W4A16().group_size,))
    ] = (W4A16().group_size,)
    include: Annotated[tuple[Pattern, ...], Field(min_length=1)] = LayerSelection().include
    exclusions: Exclusions
    switches: Annotated[Sets, Field(default_factory=dict, exclude_if=lambda switches: not switches)]
    ladder: Annotated[Ladder | None, Field(exclude_if=lambda ladder: ladder is None)] = None
    presets: tuple[Preset, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> "SearchSpace":
        if problems := [*_repetitions(self), *_ladder_problems(self), *_preset_problems(self)]:
            raise ValueError("; ".join(problems))
        return self

    @property
    def exclusion_sets(self) -> Sets:
        """Return the named sets, or what each rung of the ladder excludes without any switch."""
        if self.exclusions != LADDER:
            return self.exclusions
        if self.ladder is None:
            return {"rung_0": ()}
        return {f"rung_{rung}": self.ladder.patterns(rung) for rung in range(self.ladder.height + 1)}


def load_space(name_or_path: str | Path) -> SearchSpace:
    """Load a shipped space by its name, or any space by the path of its YAML file.

    Args:
        name_or_path: "mini", "hunyuan_video", or a path that ends in .yaml or .yml.

    Raises:
        ConfigError: If there is no such space or file, or the file breaks rules; the message lists every problem.
    """
    source = str(name_or_path)
    if source.endswith((".yaml", ".yml")):
        try:
            text = read_text(Path(source))
        except FileNotFoundError as error:
            raise ConfigError(
                f"a search space must be an existing file, but {source} is none; correct the path"
            ) from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"search space {source} must be readable text, but cannot be read: {error}") from error
        return _parse_space(text, source)
    shipped = shipped_spaces()
    if source not in shipped:
        raise ConfigError(
            f"a search space is a shipped name ({', '.join(shipped)}) or a path to a .yaml file, but got {source!r}"
            f"{did_you_mean(source, shipped)}"
        )
    text = files("spaces").joinpath("presets", f"{source}.yaml").read_text(encoding="utf-8")
    return _parse_space(text, f"{source}.yaml")


def shipped_spaces() -> tuple[str, ...]:
    """Return the names of the spaces in `spaces/presets/`, sorted."""
    folder = files("spaces").joinpath("presets")
    return tuple(sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def did_you_mean(name: str, known: tuple[str, ...]) -> str:
    """Return the end of an error sentence: the closest known name as a question, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def with_ladder(space: SearchSpace, ladder: Ladder) -> SearchSpace:
    """Return a space with `exclusions: ladder` with its measured ladder.

    Raises:
        ConfigError: If a switch or a preset does not fit the ladder.
    """
    return _checked_space({**space.model_dump(), "ladder": ladder.model_dump()}, space.name)


def _parse_space(text: str, source: str) -> SearchSpace:
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"search space {source} must be YAML, but cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"search space {source} must be a mapping of fields, but {what_it_holds(content)}")
    return _checked_space(content, source)


def _checked_space(content: dict[str, Any], source: str) -> SearchSpace:
    try:
        return SearchSpace.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(_sentence(problem["loc"], problem["msg"]) for problem in error.errors())
        raise ConfigError(f"search space {source} breaks rules: {problems}") from error


def plain_location(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return where a problem is as a file shows it, without the marks of alternatives."""
    return tuple(part for index, part in enumerate(location) if location[index - 1 : index] != ("exclusions",))


def _sentence(location: tuple[int | str, ...], message: str) -> str:
    path = ".".join(str(part) for part in plain_location(location))
    text = message.removeprefix("Value error, ")
    return f"{path}: {text}" if path else text


def _repetitions(space: SearchSpace) -> list[str]:
    listed: dict[str, tuple[str, ...]] = {
        "strategies": space.strategies,
        "act_methods": space.act_methods,
        "percentiles": tuple(map(str, space.percentiles)),
        "calibrations": space.calibrations,
        "placements": space.placements,
        "attention_statistics": space.attention_statistics,
        "group_sizes": tuple(map(str, space.group_sizes)),
        "include": space.include,
        "presets": tuple(preset.name for preset in space.presets),
    }
    problems = [
        f"{field} must not repeat a value, but {value!r} stands there more than once; delete one"
        for field, values in listed.items()
        for value, group in groupby(sorted(values))
        if len(list(group)) > 1
    ]
    for what, sets in (
        ("exclusion sets", {} if space.exclusions == LADDER else space.exclusions),
        ("switches", space.switches),
    ):
        by_patterns: dict[frozenset[str], str] = {}
        for name, patterns in sets.items():
            first = by_patterns.setdefault(frozenset(patterns), name)
            if first != name:
                problems.append(f"{what} must differ, but {first!r} and {name!r} have the same patterns; delete one")
    return problems


def _ladder_problems(space: SearchSpace) -> list[str]:
    if space.exclusions != LADDER:
        beside = [name for name, value in (("switches", space.switches), ("ladder", space.ladder)) if value]
        return [f"{name} belongs to `exclusions: ladder`, but exclusions are named sets; delete it" for name in beside]
    problems = [
        f"switch {name!r} must have a pattern; add one" for name, patterns in space.switches.items() if not patterns
    ]
    if space.ladder is not None:
        problems += [
            f"pattern {pattern!r} of switch {name!r} matched none of the {len(space.ladder.layers)} layers that the "
            f"ladder covers, such as {space.ladder.layers[0]!r}; correct it"
            for name, patterns in space.switches.items()
            for pattern in patterns
            if not any(first_match(layer, (pattern,)) for layer in space.ladder.layers)
        ]
    return problems


def _preset_problems(space: SearchSpace) -> list[str]:
    return [
        f"preset {preset.name!r}: {problem}" for preset in space.presets for problem in _misfits(preset.params, space)
    ]


def _misfits(params: PresetParams, space: SearchSpace) -> list[str]:
    """Return what keeps a preset from being a point of the space."""
    problems = []
    if params.strategy not in space.strategies:
        problems.append(f"strategy must be one of {list(space.strategies)}, but got {params.strategy!r}")
    problems += _exclusion_misfits(params, space)
    parts = parts_of(params.strategy)
    problems += _needs(parts.stores_ranges, "act_method", params.act_method, params.strategy)
    problems += _needs(parts.scheme == "timestep", "timestep_sep_share", params.timestep_sep_share, params.strategy)
    for field, is_asked, choices in optional_choices(params.strategy, space):
        problems += _needs(is_asked, field, getattr(params, field), params.strategy)
        problems += _known(field, getattr(params, field), choices)
    problems += _known("act_method", params.act_method, space.act_methods)
    share, grid = params.timestep_sep_share, space.timestep_sep_share
    if share is not None and not grid.contains(share):
        problems.append(
            f"timestep_sep_share must lie on the grid from {grid.low} to {grid.high} by {grid.step}, but got {share}"
        )
    return problems


def _exclusion_misfits(params: PresetParams, space: SearchSpace) -> list[str]:
    if space.exclusions != LADDER:
        known = tuple(space.exclusions)
        problems = []
        if params.exclusion not in known:
            hint = "" if params.exclusion is None else did_you_mean(params.exclusion, known)
            problems.append(f"exclusion must be one of {list(known)}, but got {params.exclusion!r}{hint}")
        if params.float_rungs is not None or params.switches:
            problems.append("float_rungs and switches belong to `exclusions: ladder`; delete them")
        return problems
    problems = [
        f"switches must be among {list(space.switches)}, but got {name!r}{did_you_mean(name, tuple(space.switches))}"
        for name in params.switches
        if name not in space.switches
    ]
    if params.exclusion is not None:
        problems.append(f"a space with a ladder has no exclusion, but got {params.exclusion!r}; give float_rungs")
    if params.float_rungs is None:
        problems.append("a space with a ladder needs float_rungs; add it, 0 for none")
    elif space.ladder is not None and params.float_rungs > space.ladder.height:
        problems.append(f"float_rungs must be at most {space.ladder.height}, but got {params.float_rungs}")
    return problems


def optional_choices(strategy: Strategy, space: SearchSpace) -> tuple[tuple[str, bool, tuple[Any, ...]], ...]:
    """Return (parameter, whether it is asked for, its choices) of what is only asked for where there is a choice."""
    parts = parts_of(strategy)
    return (
        ("percentile", parts.stores_ranges and len(space.percentiles) > 1, space.percentiles),
        ("calibration", parts.stores_ranges and len(space.calibrations) > 1, space.calibrations),
        ("placement", parts.smoothing is not None and len(space.placements) > 1, space.placements),
        (
            "attention_statistic",
            parts.attention == "fa3" and len(space.attention_statistics) > 1,
            space.attention_statistics,
        ),
        ("group_size", parts.scheme == "w4a16" and len(space.group_sizes) > 1, space.group_sizes),
    )


def _known(field: str, value: object, choices: tuple[Any, ...]) -> list[str]:
    if value is None or value in choices:
        return []
    return [f"{field} must be one of {list(choices)}, but got {value!r}"]


def _needs(is_needed: bool, field: str, value: object, strategy: Strategy) -> list[str]:
    if is_needed and value is None:
        return [f"strategy {strategy!r} needs {field}; add it"]
    if not is_needed and value is not None:
        return [f"strategy {strategy!r} has no {field}, but got {value!r}; delete it"]
    return []
