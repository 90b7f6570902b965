"""Pictures of a study: the front as PNG and as an interactive page, and how much each parameter matters."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.logged import config_params
from search.overview import TrialRow
from search.plot_data import FrontPlot, PlotPoint, Shape, look
from search.readable import with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FLOAT_COLOUR, _FRONT_COLOUR = "#444444", "#222222"
_MARKERS: dict[Shape, str] = {
    "circle": "o",
    "square": "s",
    "triangle": "^",
    "diamond": "D",
    "pentagon": "p",
    "hexagon": "h",
    "star": "*",
}
_SYMBOLS: dict[Shape, str] = {shape: "triangle-up" if shape == "triangle" else shape for shape in _MARKERS}


def save_front_png(path: Path, plot: FrontPlot) -> None:
    """Draw evaluated trials by strategy, infeasible ones as crosses, the front line, the picks, and float."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if plot.y.is_gap:
        axes.set_yscale("log")
    axes.set_xlim(plot.x.range)
    axes.set_ylim(plot.y.range)
    _draw_control(axes, plot)
    _draw_front_line(axes, plot)
    _draw_bars(axes, plot)
    _draw_points(axes, plot)
    _draw_picks(axes, plot)
    axes.set_xlabel(plot.x.label)
    axes.set_ylabel(plot.y.label)
    axes.set_title(plot.title, fontsize=11)
    axes.grid(alpha=0.25)
    if plot.points:
        figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path)


def save_importances_png(path: Path, importances: Mapping[str, Mapping[str, float]]) -> None:
    """Draw one row of bars per objective: how much each parameter decides about it (shares that add up to 1)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.0 + 2.0 * len(importances)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for index, (objective, shares) in enumerate(importances.items()):
        axes = figure.add_subplot(len(importances), 1, index + 1)
        names = sorted(shares, key=lambda name: shares[name])
        bars = axes.barh(names, [shares[name] for name in names], color="#0072B2")
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.set_xlim(0.0, 1.1)
        axes.set_title(f"what decides about {objective.replace('_', ' ')}", fontsize=10)
    figure.savefig(path)


def save_front_html(path: Path, plot: FrontPlot) -> None:
    """Write the front as one page that needs no network, with each trial's config under the mouse."""
    import plotly.graph_objects as go

    figure = go.Figure()
    front = plot.front
    shape = "hv" if plot.x.is_lower_better else "vh"
    figure.add_scatter(
        x=[p.x for p in front],
        y=[p.y for p in front],
        mode="lines",
        line={"shape": shape, "color": _FRONT_COLOUR, "width": 1.5},
        name="front",
        hoverinfo="skip",
    )
    for strategy in plot.strategies:
        for is_feasible in (True, False):
            points = [p for p in plot.points if p.strategy == strategy and _is_feasible(p) == is_feasible]
            if points:
                figure.add_scatter(**_html_trace(strategy, points, is_feasible))
    x, y = plot.control
    if x is not None:
        figure.add_vline(x=x, line={"dash": "dash", "color": _FLOAT_COLOUR}, annotation_text="float")
    if x is not None and y is not None:
        marker = {"symbol": "star", "size": 14, "color": _FLOAT_COLOUR}
        figure.add_scatter(x=[x], y=[y], mode="markers", name="float model", marker=marker, hovertext="float control")
    figure.update_layout(
        title=plot.title.replace("\n", "<br>"),
        xaxis={"title": plot.x.label, "range": list(plot.x.range)},
        yaxis=_html_y_axis(plot),
        template="plotly_white",
        hoverlabel={"align": "left"},
    )
    figure.write_html(path, include_plotlyjs=True, full_html=True)


def hover_text(row: TrialRow) -> str:
    """Return what the page shows of a trial: number, picks, values with spread, and its config."""
    lines = [f"<b>trial {row.number}</b>" + (f" - {', '.join(row.picks)}" if row.picks else "")]
    lines += [f"{name} {with_interval(value, row.interval(name))}" for name, value in (row.values or {}).items()]
    if row.result is not None and row.result.latency is not None:
        latency = row.result.latency
        lines.append(f"loop latency {latency.loop_latency_s:.3g} s, float {latency.control_loop_latency_s:.3g} s")
        lines.append(latency.conditions)
    if row.reason:
        lines.append(row.reason)
    if row.config is not None:
        lines += [f"{key}: {value or '-'}" for key, value in config_params(row.config).items()]
    return "<br>".join(lines)


def _is_feasible(point: PlotPoint) -> bool:
    return point.row.state == "complete"


def _html_y_axis(plot: FrontPlot) -> dict[str, object]:
    if not plot.y.is_gap:
        return {"title": plot.y.label, "range": list(plot.y.range)}
    exponents = [math.log10(end) for end in plot.y.range]
    return {"title": plot.y.label, "type": "log", "range": exponents, "exponentformat": "power", "dtick": 1}


def _legend_name(strategy: str, points: list[PlotPoint]) -> str:
    """Return a strategy's name, and why its marks are empty if their latency is not that of integer kernels."""
    label = next((p.label for p in points if p.label is not None), None)
    return strategy if label is None else f"{strategy} ({label})"


def _html_trace(strategy: str, points: list[PlotPoint], is_feasible: bool) -> dict[str, object]:
    colour, shape = look(strategy)
    symbol = _SYMBOLS[shape]
    return {
        "x": [p.x for p in points],
        "y": [p.y for p in points],
        "mode": "markers+text",
        "text": [", ".join(p.row.picks) for p in points],
        "textposition": "top center",
        "name": _legend_name(strategy, points) if is_feasible else f"{strategy}, infeasible",
        "marker": {
            "color": colour,
            "symbol": [(f"{symbol}-open" if p.label else symbol) if is_feasible else "x" for p in points],
            "size": [13 if p.row.is_on_front else 8 for p in points],
            "line": {"color": _FRONT_COLOUR, "width": [1.5 if p.row.is_on_front else 0 for p in points]},
        },
        "error_x": _html_bars([(p.x, p.x_interval) for p in points]),
        "error_y": _html_bars([(p.y, p.y_interval) for p in points]),
        "hovertext": [hover_text(p.row) for p in points],
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def _html_bars(points: list[tuple[float, tuple[float, float] | None]]) -> dict[str, object]:
    """Return 95 % intervals as plotly's error bars: lengths above and below each point."""
    ends = [(at, at) if interval is None else interval for at, interval in points]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, high - at) for (at, _), (_, high) in zip(points, ends, strict=True)],
        "arrayminus": [max(0.0, at - low) for (at, _), (low, _) in zip(points, ends, strict=True)],
        "thickness": 0.8,
        "width": 0,
    }


def _draw_control(axes: "Axes", plot: FrontPlot) -> None:
    x, y = plot.control
    if x is not None:
        axes.axvline(x, color=_FLOAT_COLOUR, linestyle="--", linewidth=1, zorder=1, label="latency of float")
    if x is not None and y is not None:
        axes.plot([x], [y], "*", color=_FLOAT_COLOUR, markersize=14, zorder=4, label="float model")


def _draw_front_line(axes: "Axes", plot: FrontPlot) -> None:
    how = "steps-post" if plot.x.is_lower_better else "steps-pre"
    xs, ys = [p.x for p in plot.front], [p.y for p in plot.front]
    axes.plot(xs, ys, drawstyle=how, color=_FRONT_COLOUR, linewidth=1.2, zorder=2, label="front")


def _draw_bars(axes: "Axes", plot: FrontPlot) -> None:
    """Draw the 95 % intervals of the front's points; those of all points would hide them."""
    style: dict[str, Any] = {"color": _FRONT_COLOUR, "linewidth": 0.8, "alpha": 0.6, "zorder": 2}
    for point in plot.front:
        if point.x_interval is not None:
            axes.hlines(point.y, *point.x_interval, **style)
        if point.y_interval is not None:
            axes.vlines(point.x, *point.y_interval, **style)


def _draw_points(axes: "Axes", plot: FrontPlot) -> None:
    for strategy in plot.strategies:
        own = [p for p in plot.points if p.strategy == strategy and _is_feasible(p)]
        if own:
            colour, shape = look(strategy)
            place = ([p.x for p in own], [p.y for p in own])
            axes.scatter(
                *place,
                s=[81 if p.row.is_on_front else 30 for p in own],
                marker=_MARKERS[shape],
                facecolors=["none" if p.label else colour for p in own],
                edgecolors=[_FRONT_COLOUR if p.row.is_on_front and not p.label else colour for p in own],
                label=_legend_name(strategy, own),
                zorder=3,
            )
    crosses = [p for p in plot.points if not _is_feasible(p)]
    if crosses:
        outside = "; at the edge: outside" if any(p.is_clamped for p in crosses) else ""
        axes.scatter(
            [p.x for p in crosses],
            [p.y for p in crosses],
            marker="x",
            c=[look(p.strategy)[0] for p in crosses],
            s=35,
            zorder=3,
            clip_on=False,
            label=f"infeasible{outside}",
        )


def _draw_picks(axes: "Axes", plot: FrontPlot) -> None:
    """Write each pick's name above or below it, where better points would be: a front keeps that side empty."""
    up = plot.y.is_better_at_end
    for point in plot.front:
        if point.row.picks:
            axes.annotate(
                f"{', '.join(point.row.picks)} (#{point.row.number})",
                (point.x, point.y),
                xytext=(0, 9 if up else -9),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                fontsize=9,
                fontweight="bold",
                zorder=5,
            )
