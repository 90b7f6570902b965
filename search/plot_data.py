"""What the front plots show, worked out once for the picture and for the interactive page."""

from collections.abc import Sequence
from dataclasses import dataclass

from metrics.registry import METRICS
from search.overview import Overview, TrialRow

Range = tuple[float, float]

COLOURS = {"timestep": "#0072B2", "dynamic": "#E69F00", "static": "#CC79A7", "m4": "#009E73"}
"""One colour per strategy that colour-blind eyes tell apart. Source: Okabe and Ito, "Color Universal Design" (2008)."""
_MORE_COLOURS = ("#D55E00", "#56B4E9", "#F0E442", "#000000")

_MEASURED_UNITS = {
    "latency_ratio": "candidate / float",
    "latency_s": "s per clip",
    "weight_bytes": "bytes",
    "peak_memory_bytes": "bytes",
}
_FLOAT_SCORES = {"latency_ratio": 1.0, "clip_reference": 1.0, "ssim": 1.0}  # what float scores against itself
_MARGIN = 0.12


@dataclass(frozen=True)
class Axis:
    """One axis: which objective, its label, which way is better, and the range that shows every point that may win."""

    metric: str | None
    label: str
    is_lower_better: bool
    range: Range


@dataclass(frozen=True)
class PlotPoint:
    """One evaluated trial; `x` and `y` lie inside the axes' ranges, `is_clamped` tells if it really lies outside."""

    row: TrialRow
    x: float
    y: float
    is_clamped: bool


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
        """Return the strategies that occur, in the order of `COLOURS`, then by name."""
        found = {point.row.strategy or "unknown" for point in self.points}
        return tuple(sorted(found, key=lambda name: (list(COLOURS).index(name) if name in COLOURS else 99, name)))

    def colour(self, strategy: str) -> str:
        """Return the colour of a strategy."""
        others = [name for name in self.strategies if name not in COLOURS]
        return COLOURS.get(strategy) or _MORE_COLOURS[others.index(strategy) % len(_MORE_COLOURS)]


def front_plot(overview: Overview) -> FrontPlot:
    """Choose axes and points for a study's front plot."""
    objectives = overview.config.objectives
    speed = next((o for o in objectives if o.metric.startswith("latency")), objectives[-1])
    quality = next((o for o in objectives if o is not speed), objectives[0])
    x_metric = None if speed is quality else speed.metric
    rows = [row for row in overview.rows if row.values is not None and row.state in ("complete", "infeasible")]

    def place(row: TrialRow) -> tuple[float, float]:
        values = row.values or {}
        return (float(row.number) if x_metric is None else values[x_metric]), values[quality.metric]

    scores = {**_FLOAT_SCORES, **overview.float_scores}
    control = (scores.get(x_metric) if x_metric is not None else None, scores.get(quality.metric))
    shown = [place(row) for row in rows if row.state == "complete"] or [place(row) for row in rows]
    x_range = _spread([x for x, _ in shown] + [v for v in control[:1] if v is not None])
    y_range = _spread([y for _, y in shown] + [v for v in control[1:] if v is not None])
    points = tuple(_point(row, place(row), x_range, y_range) for row in rows)
    shape = overview.config.deployment
    title = (
        f"{overview.config.name}: {overview.num_evaluated} evaluated trials, {len(overview.front)} on the front\n"
        f"latency at {shape.width}x{shape.height}, {shape.num_frames} frames, {shape.num_steps} steps"
    )
    x_label = "trial" if x_metric is None else axis_label(x_metric, speed.direction)
    return FrontPlot(
        title=title,
        x=Axis(x_metric, x_label, speed.direction == "minimize", x_range),
        y=Axis(quality.metric, axis_label(quality.metric, quality.direction), quality.direction == "minimize", y_range),
        points=points,
        control=control,
    )


def axis_label(metric: str, direction: str) -> str:
    """Return an objective's name with its unit and which way is better."""
    spec = METRICS.get(metric)
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


def _point(row: TrialRow, at: tuple[float, float], x_range: Range, y_range: Range) -> PlotPoint:
    x = min(max(at[0], x_range[0]), x_range[1])
    y = min(max(at[1], y_range[0]), y_range[1])
    return PlotPoint(row=row, x=x, y=y, is_clamped=(x, y) != at)
