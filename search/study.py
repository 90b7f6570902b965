"""What a study is: space, workload, judge, objectives, constraints, budget and slots, as one frozen value.

A study file is YAML, read once by `search.study_file.load_study`; everything inside the program is typed.
`StudyConfig.identity()` is the part that may not change between runs of one study: all but when trials and the study
stop, what is measured again, slots, where it is stored, and what its exports are certified by.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hyquant.config import FrozenModel, Target
from hyquant.cost import DeviceProfile, Positive
from hyquant.models.base import DeploymentShape, RenderSettings
from search.margins import CertificateConfig
from search.redaction import names_a_secret, redacted
from search.slot_devices import AUTO, read_devices
from spaces.space import SearchSpace, did_you_mean
from spaces.targets import narrowed


class ModelConfig(FrozenModel):
    """Which model: an entry of the model table and where its weights are ("mini", "mini-outliers" or a folder)."""

    kind: str = "hunyuan_video"
    source: str
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Workload(FrozenModel):
    """What is rendered in a trial: prompts, clip, steps and seed.

    Prompt files hold one prompt per line; `calibration_prompts` and `search_prompts` must be disjoint.
    A prompt file is a path relative to the study file, or "mini:calibration" / "mini:search" / "mini:heldout".
    """

    calibration_prompts: str
    search_prompts: str
    num_calibration_prompts: Annotated[int, Field(ge=1)] = 4
    num_search_prompts: Annotated[int, Field(ge=1)] = 8
    settings: RenderSettings
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class JudgeConfig(FrozenModel):
    """The open_clip model that judges: a shipped name ("mini"), a published (model, pretrained) pair, or a folder."""

    model: str
    pretrained: str | None = None
    view: Literal["frames", "grid"] = "frames"


class Objective(FrozenModel):
    """One objective: a metric's name (or "latency_ratio" / "latency_s") and its direction."""

    metric: str
    direction: Literal["maximize", "minimize"]


class Constraint(FrozenModel):
    """A bound on a metric's mean over prompts; a trial outside it may not win.

    `{metric}_drop` is how much worse the metric is than on the float videos of the same prompts (above 0 is worse), and
    `{metric}_excess` how much farther from them than the noise floor (0 is as near as float under a neutral change).
    """

    metric: str
    min: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max: Annotated[float, Field(allow_inf_nan=False)] | None = None

    def violation(self, value: float) -> float:
        """Return how far a value lies outside the bounds; 0 or less is inside."""
        below = -float("inf") if self.min is None else self.min - value
        above = -float("inf") if self.max is None else value - self.max
        return max(below, above)

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Constraint":
        if self.min is None and self.max is None:
            raise ValueError(f"constraint on {self.metric} must give min, max or both, but got neither; add one")
        return self

    @model_validator(mode="after")
    def _has_values_within(self) -> "Constraint":
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(
                f"constraint on {self.metric} must have min <= max, but got {self.min:g} and {self.max:g}; swap them"
            )
        return self


class SamplerConfig(FrozenModel):
    """How points are chosen: multivariate TPE by default.

    `grid` tries every point of the space once, in random order, and is done when none is left; `auto` picks by budget
    and size of the space.
    """

    kind: Literal["auto", "tpe", "gp", "nsga2", "random", "grid"] = "tpe"
    seed: int = 0
    num_startup_trials: Annotated[int, Field(ge=0)] = 8


class Budget(FrozenModel):
    """When to stop: evaluated trials (complete, infeasible and stopped, not reused), optionally seconds of one `run`
    (`worker` has no such limit, and `run` does not wait for its trials then), and optionally when the hypervolume has
    grown by no more than `stall_gain` over `stall_trials` evaluated trials.
    """

    trials: Annotated[int, Field(ge=1)] = 30
    time_s: Positive | None = None
    stall_trials: Annotated[int, Field(ge=2)] | None = None
    stall_gain: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01


class RungsConfig(FrozenModel):
    """When a trial may stop before all prompts are rendered: after how many, and how rarely wrongly (`search.rungs`).

    A trial risks at most `alpha` of being stopped by a member of the front that is no better than it.
    """

    prompts: Annotated[tuple[Annotated[int, Field(ge=4)], ...], Field(min_length=1)] = (4, 8)
    alpha: Annotated[float, Field(gt=0.0, le=0.1)] = 0.01


class ConfirmConfig(FrozenModel):
    """How the front is measured again before anything is picked: how many members, from how many new seeds a prompt."""

    members: Annotated[int, Field(ge=1)] = 8
    seeds: Annotated[int, Field(ge=1)] = 1


class PresetsConfig(FrozenModel):
    """What is queued beside the space's presets: the best of earlier studies on the same model, at most so many."""

    earlier: Annotated[int, Field(ge=0)] = 3


class Slot(FrozenModel):
    """One long-lived group of ranks.

    Attributes:
        ranks: Its processes.
        devices: A list such as "0-3,6", of cores where models run on the CPU; "auto" cuts as many as there are ranks
            from those that are free, None leaves all that are visible. A named device belongs to one slot of the host.
        environment: Variables of its processes, set over those of the runner.
    """

    ranks: Annotated[int, Field(ge=1)] = 1
    devices: str | None = None
    environment: dict[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")], str | int] = Field(default={})

    @model_validator(mode="after")
    def _has_a_device_for_each_rank(self) -> "Slot":
        if self.devices in (None, AUTO):
            return self
        num_devices = len(read_devices(self.devices))
        if self.ranks > num_devices:
            raise ValueError(f"ranks must be at most devices, but {self.ranks} ranks share {num_devices}; take fewer")
        return self

    @model_validator(mode="after")
    def _leaves_the_interpreter_alone(self) -> "Slot":
        # A stored study reaches other hosts: it may tune their libraries, never choose what code they load.
        if refused := sorted(name for name in self.environment if name.startswith(("LD_", "PYTHON", "HYQ_"))):
            raise ValueError(f"environment must not set LD_*, PYTHON* or HYQ_*, but sets {refused}; delete them")
        return self

    @model_validator(mode="after")
    def _holds_no_secret(self) -> "Slot":
        values = {name: str(value) for name, value in self.environment.items()}
        if refused := sorted(name for name in values if names_a_secret(name) or redacted(values[name]) != values[name]):
            raise ValueError(
                f"environment is stored with the study and must hold no password, but sets {refused}; set them in the "
                "environment of the command"
            )
        return self


STAGES = (
    "profile",
    "reference",
    "judge",
    "floor",
    "calibrate",
    "quantize",
    "render",
    "score",
    "compile",
    "latency",
)


class TimeoutsConfig(FrozenModel):
    """When a stage of a trial counts as hung and its worker is ended (`search.time_limits`).

    `factor` times the longest that was seen, at least `least_s`; `first_s` where nothing was seen yet; `stages` sets
    seconds by the name of a stage, one of `STAGES`. `room_s` is how long a slot waits for room on a full disk before it
    stops (`search.room`).
    """

    factor: Annotated[float, Field(ge=2.0, allow_inf_nan=False)] = 10.0
    least_s: Positive = 300.0
    first_s: Positive = 14_400.0
    room_s: Positive = 14_400.0
    stages: dict[str, Positive] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_stages(self) -> "TimeoutsConfig":
        for name in self.stages:
            if name not in STAGES:
                raise ValueError(f"stages must be of {', '.join(STAGES)}, but got {name!r}{did_you_mean(name, STAGES)}")
        return self


class ArtifactsConfig(FrozenModel):
    """Whose videos and pictures the store keeps, and how much it and its cache may hold (`search.artifacts`).

    `keep: front` keeps those of the front, `last` those of the `last` measured trials too. `quota_gb` is in 1e9 bytes.
    """

    keep: Literal["all", "front", "last"] = "all"
    last: Annotated[int, Field(ge=0)] = 20
    quota_gb: Positive | None = None


class LatencyConfig(FrozenModel):
    """How loop latency is measured: interleaved rounds per mode, warm-up rounds dropped, compiled or eager.

    With a `device_profile` nothing is timed: latencies are predicted for that device, and labelled so. In a study file
    it is a path relative to the file, or the profile itself.
    """

    rounds: Annotated[int, Field(ge=3)] = 9
    warmup: Annotated[int, Field(ge=1)] = 2
    compile: bool = True
    device_profile: DeviceProfile | None = None


DEFAULT_OBJECTIVES = (
    Objective(metric="clip_reference_excess", direction="minimize"),
    Objective(metric="latency_ratio", direction="minimize"),
)

DEFAULT_CONSTRAINTS = (
    Constraint(metric="collapsed", max=0.0),
    Constraint(metric="clip_prompt_drop", max=0.05),
    Constraint(metric="motion_energy_ratio", min=0.5, max=2.0),
)


PLACES = ("store", "storage", "tracking", "shared")
"""Fields that say where a study is. Every host has its own, addresses hold passwords, and so they are never stored."""


class StudyConfig(FrozenModel):
    """A study file.

    `store` is this host's folder of caches, logs and databases. `storage` is the address of Optuna's database, for
    studies shared by several machines (`search.databases`); None is `optuna.db` in the store. `tracking` is the
    address of an MLflow server; None is `mlflow.db` in the store. `shared` is a folder that all hosts see, through
    which they share what was captured, rendered and measured once.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    model: ModelConfig
    target: Target = "hyquant"
    space: SearchSpace
    workload: Workload
    deployment: DeploymentShape
    judge: JudgeConfig
    metrics: tuple[str, ...] = ("clip_prompt", "clip_reference", "psnr_db", "ssim", "motion_energy_ratio", "collapsed")
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = DEFAULT_OBJECTIVES
    constraints: tuple[Constraint, ...] = DEFAULT_CONSTRAINTS
    latency: LatencyConfig = LatencyConfig()
    sampler: SamplerConfig = SamplerConfig()
    budget: Budget = Budget()
    rungs: RungsConfig | None = RungsConfig()
    confirm: ConfirmConfig | None = ConfirmConfig()
    presets: PresetsConfig = PresetsConfig()
    certificate: CertificateConfig | None = None
    timeouts: TimeoutsConfig = TimeoutsConfig()
    artifacts: ArtifactsConfig = ArtifactsConfig()
    slots: Annotated[tuple[Slot, ...], Field(min_length=1)] = (Slot(),)
    store: str = "mlruns"
    storage: str | None = None
    tracking: str | None = None
    shared: str | None = None

    @property
    def valid_space(self) -> SearchSpace:
        """Return the space without what the study's target cannot execute."""
        return narrowed(self.space, self.target)

    def identity(self) -> dict[str, Any]:
        """Return the part that must stay equal on resume: what a trial depends on."""
        changeable = {"budget", "rungs", "confirm", "presets", "slots", "timeouts", "artifacts", "certificate", *PLACES}
        return self.model_dump(mode="json", exclude=changeable)

    def stored_form(self) -> dict[str, Any]:
        """Return what is stored of a study: all but its places."""
        return self.model_dump(mode="json", exclude=set(PLACES))

    def without_places(self) -> "StudyConfig":
        """Return the config as every host has it."""
        return StudyConfig.model_validate(self.stored_form())

    @model_validator(mode="after")
    def _has_a_valid_strategy(self) -> "StudyConfig":
        narrowed(self.space, self.target)
        return self

    @model_validator(mode="after")
    def _gives_a_device_to_one_slot(self) -> "StudyConfig":
        named = [name for slot in self.slots if slot.devices not in (None, AUTO) for name in read_devices(slot.devices)]
        if repeated := sorted({name for name in named if named.count(name) > 1}):
            raise ValueError(f"slots must not share devices, but {repeated} stand in two; give each to one slot")
        return self

    @model_validator(mode="after")
    def _names_each_thing_once(self) -> "StudyConfig":
        for what, names in (
            ("metrics", self.metrics),
            ("objectives", tuple(objective.metric for objective in self.objectives)),
            ("constraints", tuple(constraint.metric for constraint in self.constraints)),
        ):
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{what} must name each metric once, but {repeated} stand there twice; merge them")
        return self
