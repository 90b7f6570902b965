"""The result of probing: relative error of the denoiser's output by block, kind of Linear and range of steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from hyquant.config import FrozenModel, LinearScheme
from hyquant.errors import ConfigError
from hyquant.sensitivity.bands import LayerBand
from hyquant.sensitivity.cost import ProbeCost


class StepRange(FrozenModel):
    """Denoising steps `first` to `last`, both included, of which `probed` stand for all."""

    first: int
    last: int
    probed: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        """Return how many steps it spans."""
        return self.last - self.first + 1

    @property
    def label(self) -> str:
        """Return it in words: "steps 0-6", or "step 3"."""
        return f"step {self.first}" if self.first == self.last else f"steps {self.first}-{self.last}"


class Measurement(FrozenModel):
    """One probe: a band quantized in one denoiser call.

    Attributes:
        prompt_index, step_index: The call.
        block, kind: The band.
        error: Sum of squares of the output's deviation from float; None if the output is not finite.
        reference: Sum of squares of the float output.
    """

    prompt_index: int
    step_index: int
    block: str
    kind: str
    error: float | None
    reference: float

    @property
    def key(self) -> tuple[int, int, str, str]:
        """Return what was probed."""
        return self.prompt_index, self.step_index, self.block, self.kind


class SensitivityRow(FrozenModel):
    """Relative L2 error of the denoiser's output with one band quantized; None if the output is not finite."""

    block: str
    kind: str
    first_step: int
    last_step: int
    relative_l2: float | None


class Subject(FrozenModel):
    """What a map is measured on, and how; maps of equal subjects are the same map.

    Attributes:
        model: Fingerprint of the model's weights and configuration.
        dtype, device: Of the denoiser.
        scheme: What a band is quantized to.
        prompts: Digest of prompts, seeds and render settings, and of the prompts that set ranges if any are stored.
        num_prompts: How many prompts.
        num_steps: Steps of the rendering.
        ranges: How the steps are cut.
        bands: What is probed.
    """

    model: str
    dtype: str
    device: str
    scheme: LinearScheme
    prompts: str
    num_prompts: int
    num_steps: int
    ranges: tuple[StepRange, ...]
    bands: tuple[LayerBand, ...]


class SensitivityMap(FrozenModel):
    """A finished measurement.

    Attributes:
        subject: What was measured.
        rows: One per band and range of steps, in the order of both.
        keeps_blocks: Whether outputs of earlier blocks could be kept.
        cost: Forwards it took.
        seconds: Time that the run took which finished it.
    """

    subject: Subject
    rows: tuple[SensitivityRow, ...]
    keeps_blocks: bool
    cost: ProbeCost
    seconds: float


def step_ranges(num_steps: int, num_ranges: int, *, probes: int = 1) -> tuple[StepRange, ...]:
    """Cut steps into ranges of nearly equal length, and choose the middle step of each part to probe.

    Args:
        num_steps: Denoising steps.
        num_ranges: How many ranges.
        probes: Steps that are probed in each range, at most all of it.

    Raises:
        ConfigError: If there are more ranges than steps, or a number is below 1.
    """
    if not 1 <= num_ranges <= num_steps or probes < 1:
        raise ConfigError(
            f"steps are cut into 1 to {num_steps} ranges with at least 1 probe each, but got {num_ranges} ranges with "
            f"{probes}; ask for fewer ranges"
        )
    bounds = [round(index * num_steps / num_ranges) for index in range(num_ranges + 1)]
    return tuple(
        StepRange(
            first=first,
            last=end - 1,
            probed=tuple(sorted({first + (2 * part + 1) * (end - first) // (2 * probes) for part in range(probes)})),
        )
        for first, end in pairwise(bounds)
    )


def rows_of(subject: Subject, measured: Iterable[Measurement]) -> tuple[SensitivityRow, ...]:
    """Pool measurements over prompts and probed steps: square root of all errors over all references."""
    by_cell: dict[tuple[str, str, int], list[Measurement]] = {}
    range_of = {step: index for index, part in enumerate(subject.ranges) for step in part.probed}
    for one in measured:
        by_cell.setdefault((one.block, one.kind, range_of[one.step_index]), []).append(one)
    return tuple(
        SensitivityRow(
            block=band.block,
            kind=band.kind,
            first_step=part.first,
            last_step=part.last,
            relative_l2=_relative(by_cell[band.block, band.kind, index]),
        )
        for band in subject.bands
        for index, part in enumerate(subject.ranges)
    )


def by_band(found: SensitivityMap) -> Mapping[tuple[str, str], float]:
    """Return the sensitivity of each band by (block, kind): root mean square over all steps; inf if not finite."""
    squares: dict[tuple[str, str], float] = {}
    for row in found.rows:
        steps = row.last_step - row.first_step + 1
        square = math.inf if row.relative_l2 is None else steps * row.relative_l2**2
        squares[row.block, row.kind] = squares.get((row.block, row.kind), 0.0) + square
    return {band: math.sqrt(square / found.subject.num_steps) for band, square in squares.items()}


def _relative(measured: Sequence[Measurement]) -> float | None:
    errors = [one.error for one in measured if one.error is not None]
    reference = sum(one.reference for one in measured)
    return math.sqrt(sum(errors) / reference) if len(errors) == len(measured) and reference > 0 else None
