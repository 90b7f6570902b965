"""What the front plots show, worked out once for the picture and for the interactive page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from metrics.registry import METRICS
from search.control import control_values
from search.metric_names import DROP, EXCESS, WORST
from search.overview import Overview, TrialRow
from spaces.strategy import ATTENTIONS, SCHEMES, SMOOTHINGS, parts_of

Range = tuple[float, float]
Shape = Literal["circle", "square", "triangle", "diamond", "pentagon", "hexagon", "star"]

SMOOTHING_COLOURS = {None: "#0072B2", "m3": "#E69F00", "m4": "#009E73", "m6": "#CC79A7"}
"""Colours that colour-blind eyes tell apart. Source: Okabe and Ito, "Color Universal Design" (2008)."""
SCHEME_SHAPES: dict[str, Shape] = {
    "dynamic": "circle",
    "static": "square",
    "timestep": "triangle",
    "w8a16": "diamond",
    "w4a16": "pentagon",
    "w4a8": "hexagon",
    "w4a4_dynamic": "star",
}
"""One shape per linear scheme."""
_OTHER_COLOUR = "#888888"

_MEASURED_UNITS = {
    "latency_ratio": "candidate / float",
    "latency_s": "s per clip",
    "weight_bytes": "bytes",
    "peak_memory_bytes": "bytes",
    "latent_l2": "relative error",
}
_MARGIN = 0.12
_SMALLEST_GAP = 1e-7
"""Similarities are float32: what is closer to 1 than this is drawn here, because a log axis has no 0."""


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Attributes:
        metric: The objective; None where trials are numbered.
        label: Name, unit and which way is better.
        is_lower_better: Which of two drawn numbers is better.
        range: From the left or lower end to the other; shows every point that may win. A gap's range runs downwards.
        is_gap: Whether not the objective is drawn but its distance to the best possible value, on a log axis. Recipes
            that differ tenfold in their error all lie within a hair of similarity 1 otherwise.
    """

    metric: str | None
    label: str
    is_lower_better: bool
    range: Range
    is_gap: bool = False

    @property
    def is_better_at_end(self) -> bool:
        """Say whether better values are drawn further right or up."""
        return self.is_lower_better == self.is_gap


@dataclass(frozen=True)
class PlotPoint:
    """One evaluated trial; `x` and `y` lie inside the axes' ranges, `is_clamped` tells if it really lies outside.

    The intervals are what is drawn as error bars, lower end first; None if there is none.
    """

    row: TrialRow
    x: float
    y: float
    is_clamped: bool
    x_interval: Range | None = None
    y_interval: Range | None = None

    @property
    def strategy(self) -> str:
        """Return the trial's strategy."""
        return self.row.strategy or "unknown"

    @property
    def label(self) -> str | None:
        """Return "simulated" or "predicted" where its latency is not that of integer kernels."""
        latency = None if self.row.result is None else self.row.result.latency
        return None if latency is None or latency.kind == "native" else latency.kind


@dataclass(frozen=True)
class FrontPlot:
    """A study's evaluated trials in two objectives.

    `x` is the latency objective, else the last one, and the trial's number in a study of one objective; `y` is the
    first of the others. `control` is where the float model stands, if that is known.
    """

    title: str
    x: Axis
    y: Axis
    points: tuple[PlotPoint, ...]
    control: tuple[float | None, float | None]

    @property
    def front(self) -> tuple[PlotPoint, ...]:
        """Return the points that no other dominates, from left to right."""
        return tuple(sorted((point for point in self.points if point.row.is_on_front), key=lambda point: point.x))

    @property
    def strategies(self) -> tuple[str, ...]:
        """Return the strategies that occur, in the order in which names are built."""
        return tuple(sorted({point.strategy for point in self.points}, key=_rank))


def look(strategy: str) -> tuple[str, Shape]:
    """Return colour and shape of a strategy: the colour is its smoothing's, the shape its linear scheme's."""
    try:
        parts = parts_of(strategy)
    except ValueError:  # the control, or attention alone
        return _OTHER_COLOUR, "circle"
    return SMOOTHING_COLOURS[parts.smoothing], SCHEME_SHAPES[parts.scheme]


def _rank(strategy: str) -> tuple[int, int, int, str]:
    try:
        parts = parts_of(strategy)
    except ValueError:
        return 99, 0, 0, strategy
    attentions = (None, *ATTENTIONS)
    smoothings = (None, *SMOOTHINGS)
    return attentions.index(parts.attention), smoothings.index(parts.smoothing), SCHEMES.index(parts.scheme), strategy


def front_plot(overview: Overview) -> FrontPlot:
    """Choose axes and points for a study's front plot."""
    objectives = overview.config.objectives
    speed = next((o for o in objectives if o.metric.startswith("latency")), objectives[-1])
    quality = next((o for o in objectives if o is not speed), objectives[0])
    x_metric = None if speed is quality else speed.metric
    is_excess = quality.metric.endswith(EXCESS) and _is_similarity(quality.metric.removesuffix(EXCESS))
    is_similarity = _is_similarity(quality.metric) and quality.direction == "maximize"
    is_gap = is_similarity or (is_excess and quality.direction == "minimize")
    rows = [row for row in overview.rows if row.values is not None and row.state in ("complete", "infeasible")]

    def height(value: float) -> float:
        gap = value if is_excess else 1.0 - value
        return max(gap, _SMALLEST_GAP) if is_gap else value

    def place(row: TrialRow) -> tuple[float, float]:
        values = row.values or {}
        return (float(row.number) if x_metric is None else values[x_metric]), height(values[quality.metric])

    float_x, float_y = control_values((x_metric or "", quality.metric), overview.float_scores, overview.floor)
    float_y = None if is_gap else float_y
    shown = [place(row) for row in rows if row.state == "complete"] or [place(row) for row in rows]

    def bars(row: TrialRow) -> tuple[Range | None, Range | None]:
        y_ends = row.interval(quality.metric)
        return (
            None if x_metric is None else row.interval(x_metric),
            None if y_ends is None else (min(map(height, y_ends)), max(map(height, y_ends))),
        )

    x_range = _spread([x for x, _ in shown] + [v for v in (float_x,) if v is not None])
    y_values = [y for _, y in shown] + [v for v in (float_y,) if v is not None]
    y_range = _log_spread(y_values)[::-1] if is_gap else _spread(y_values)
    points = tuple(_point(row, place(row), x_range, y_range, bars(row)) for row in rows)
    shape = overview.config.deployment
    title = (
        f"{overview.config.name}: {overview.num_evaluated} evaluated trials, {len(overview.front)} on the front\n"
        f"latency at {shape.width}x{shape.height}, {shape.num_frames} frames, {shape.num_steps} steps"
    )
    x_label = "trial" if x_metric is None else axis_label(x_metric, speed.direction)
    y_label = gap_label(quality.metric) if is_gap else axis_label(quality.metric, quality.direction)
    return FrontPlot(
        title=title,
        x=Axis(x_metric, x_label, speed.direction == "minimize", x_range),
        y=Axis(quality.metric, y_label, is_gap or quality.direction == "minimize", y_range, is_gap),
        points=points,
        control=(float_x, float_y),
    )


def gap_label(metric: str) -> str:
    """Return the label of an axis that shows how far a similarity is from 1, or beyond the noise floor."""
    name = metric.replace("_", " ")
    return f"{name if metric.endswith(EXCESS) else f'1 - {name}'}, log scale, up is better"


def axis_label(metric: str, direction: str) -> str:
    """Return an objective's name with its unit and which way is better."""
    spec = METRICS.get(metric.removesuffix(WORST).removesuffix(DROP).removesuffix(EXCESS))
    unit = spec.unit if spec is not None else _MEASURED_UNITS.get(metric)
    name = metric.replace("_", " ")
    return f"{name}{f' [{unit}]' if unit else ''}, {'lower' if direction == 'minimize' else 'higher'} is better"


def _spread(values: Sequence[float]) -> Range:
    """Return the range of values with a margin, never empty."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    margin = (high - low) * _MARGIN or abs(high) * _MARGIN or 1.0
    return low - margin, high + margin


def _log_spread(gaps: Sequence[float]) -> Range:
    """Return the range of gaps with a margin that looks the same on a log axis."""
    low, high = _spread([math.log10(gap) for gap in gaps] or [-6.0, 0.0])
    return 10.0**low, 10.0**high


def _is_similarity(metric: str) -> bool:
    """Say whether a metric compares with the float video and is 1 for the video itself."""
    spec = METRICS.get(metric)
    return spec is not None and spec.range[1] == 1.0 and "reference" in spec.needs


def _point(
    row: TrialRow,
    at: tuple[float, float],
    x_range: Range,
    y_range: Range,
    bars: tuple[Range | None, Range | None],
) -> PlotPoint:
    x = min(max(at[0], min(x_range)), max(x_range))
    y = min(max(at[1], min(y_range)), max(y_range))
    return PlotPoint(row=row, x=x, y=y, is_clamped=(x, y) != at, x_interval=bars[0], y_interval=bars[1])
