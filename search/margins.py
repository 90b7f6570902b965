"""How much worse than float a shipped model may be: the section `certificate` of a study file.

A margin is stated before anybody looks at the held-out videos. It holds for the mean over held-out prompts, and is
one of

    loss       at most so much worse than the float videos themselves: {metric: clip_prompt, loss: 0.005}
    min, max   for metrics that compare with the float video, a bound: {metric: clip_reference, min: 0.98}

For metrics that are 0 or 1 it is the share of prompts with a flawed clip: {metric: collapsed, max: 0.1}.
"""

from typing import Annotated

from pydantic import Field, model_validator

from hyquant.config import FrozenModel
from hyquant.models.base import RenderSettings


class Margin(FrozenModel):
    """How far the mean of one metric may be from the float model's; see the module's docstring.

    Attributes:
        metric: A metric of the study.
        loss: Largest mean loss against the float videos, in the metric's unit, above 0.
        min: Lowest mean.
        max: Highest mean.
    """

    metric: str
    loss: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    min: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _is_one_statement(self) -> "Margin":
        has_bound = self.min is not None or self.max is not None
        if (self.loss is not None) == has_bound:
            raise ValueError(
                f"the margin of {self.metric} must be a loss, or min, max or both, but got "
                f"{'both kinds' if has_bound else 'neither'}; keep one"
            )
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise ValueError(
                f"the margin of {self.metric} must leave room between min and max, but got {self.min:g} and "
                f"{self.max:g}; swap or widen them"
            )
        return self

    def in_words(self) -> str:
        """Return the margin as a reader wants it."""
        limits = [("loses at most", self.loss), ("at least", self.min), ("at most", self.max)]
        return " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None)


DEFAULT_MARGINS = (
    Margin(metric="clip_prompt", loss=0.005),
    Margin(metric="clip_reference", min=0.95),
    Margin(metric="motion_energy_ratio", min=0.8, max=1.25),
    Margin(metric="collapsed", max=0.1),
)
"""Half a point of CLIP on its usual scale to 100, a video that shows what the float one does, its motion, no collapse.

Likeness by pixels has no default: on large models a harmless change of rounding leads to another video as good as the
first, so what PSNR may lose is for whoever knows the model.
"""


class CertificateConfig(FrozenModel):
    """What a certificate is about: held-out prompts, seeds, margins and the error rate.

    Attributes:
        prompts: A prompt file relative to the study file, or "mini:heldout"; no prompt of calibration or search.
        num_prompts: How many of them; docs/evaluation.md says how many are needed.
        seeds_per_prompt: Clips of each prompt. More prompts tell more than more seeds.
        margins: What is promised; one per metric.
        alpha: How often a model beyond its margin may pass, and one within it fail.
        settings: Clip and steps; None for those of the study's workload. Certify what users will run.
    """

    prompts: str
    num_prompts: Annotated[int, Field(ge=3)] = 32
    seeds_per_prompt: Annotated[int, Field(ge=1)] = 2
    margins: Annotated[tuple[Margin, ...], Field(min_length=1)] = DEFAULT_MARGINS
    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    settings: RenderSettings | None = None

    @model_validator(mode="after")
    def _names_each_metric_once(self) -> "CertificateConfig":
        names = [margin.metric for margin in self.margins]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"margins must name each metric once, but {repeated} stand there twice; merge them")
        return self
