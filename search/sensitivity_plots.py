"""Heat maps of a sensitivity map: blocks over kinds of Linear, a panel for each range of steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hyquant.sensitivity.bands import place_of
from hyquant.sensitivity.map import SensitivityMap

_COLOURS, _EMPTY = "magma", "#dddddd"
_SMALLEST = 1e-12
"""What has less error than this is drawn here, because a log scale has no 0."""


@dataclass(frozen=True)
class Panel:
    """The blocks of one stack in one range of steps.

    Attributes:
        title: The steps.
        blocks: Rows, in model order.
        kinds: Columns.
        values: [blocks][kinds] log10 of the relative L2 error; NaN where there is no such layer, or no finite output.
    """

    title: str
    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


def panels_of(found: SensitivityMap) -> tuple[tuple[Panel, ...], ...]:
    """Return a row of panels for each stack of blocks, one for each range of steps."""
    stacks: dict[str, list[tuple[str, str]]] = {}
    for band in found.subject.bands:
        place = place_of(band.layers[0])
        stacks.setdefault("" if place is None else place.stack, []).append((band.block, band.kind))
    errors = {(row.block, row.kind, row.first_step): row.relative_l2 for row in found.rows}
    rows = []
    for members in stacks.values():
        blocks = tuple(dict.fromkeys(block for block, _ in members))
        kinds = tuple(dict.fromkeys(kind for _, kind in members))
        rows.append(
            tuple(
                Panel(
                    title=part.label,
                    blocks=blocks,
                    kinds=kinds,
                    values=tuple(
                        tuple(_height(errors.get((block, kind, part.first))) for kind in kinds) for block in blocks
                    ),
                )
                for part in found.subject.ranges
            )
        )
    return tuple(rows)


def save_sensitivity_png(path: Path, found: SensitivityMap, title: str) -> None:
    """Draw a map as one picture, with one colour scale for all panels."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = panels_of(found)
    low, high = _span(rows)
    heights = [max(len(row[0].blocks), 3) for row in rows]
    widths = max(len(row[0].kinds) for row in rows)
    size = (2.5 + len(rows[0]) * (0.32 * widths + 0.7), 2.4 + 0.26 * sum(heights) + 1.2 * len(rows))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False, height_ratios=heights)
    colours = colormaps[_COLOURS].with_extremes(bad=_EMPTY)
    for row, cells in zip(rows, grid, strict=True):
        for index, (panel, axes) in enumerate(zip(row, cells, strict=True)):
            image = axes.imshow(panel.values, cmap=colours, vmin=low, vmax=high, aspect="auto")
            axes.set_xticks(range(len(panel.kinds)), panel.kinds, rotation=60, ha="right", fontsize=7)
            axes.set_yticks(
                range(len(panel.blocks)), panel.blocks if index == 0 else [""] * len(panel.blocks), fontsize=7
            )
            axes.set_title(panel.title, fontsize=9)
    figure.suptitle(title, fontsize=11)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, label="relative L2 error of the denoiser's output")
    ticks = range(math.ceil(low), math.floor(high) + 1)
    bar.set_ticks(list(ticks), labels=[f"1e{tick}" for tick in ticks])
    figure.savefig(path)


def save_sensitivity_html(path: Path, found: SensitivityMap, title: str) -> None:
    """Write a map as one page that needs no network, with each error under the mouse."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows = panels_of(found)
    low, high = _span(rows)
    heights = [max(len(row[0].blocks), 3) for row in rows]
    figure = make_subplots(
        rows=len(rows),
        cols=len(rows[0]),
        row_heights=heights,
        subplot_titles=[panel.title for row in rows for panel in row],
        horizontal_spacing=0.03,
    )
    for row_index, row in enumerate(rows):
        for column_index, panel in enumerate(row):
            figure.add_trace(
                go.Heatmap(
                    z=panel.values,
                    x=panel.kinds,
                    y=panel.blocks,
                    coloraxis="coloraxis",
                    customdata=[[f"{10**value:.3g}" for value in line] for line in panel.values],
                    hovertemplate="%{y} %{x}<br>relative L2 %{customdata}<extra></extra>",
                    hoverongaps=False,
                ),
                row=row_index + 1,
                col=column_index + 1,
            )
    ticks = list(range(math.ceil(low), math.floor(high) + 1))
    bar = {"title": "relative L2", "tickvals": ticks, "ticktext": [f"1e{tick}" for tick in ticks]}
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(
        title=title,
        template="plotly_white",
        coloraxis={"colorscale": _COLOURS, "cmin": low, "cmax": high, "colorbar": bar},
        height=250 + 24 * sum(heights) + 120 * len(rows),
    )
    figure.write_html(path, include_plotlyjs=True, full_html=True)


def _height(error: float | None) -> float:
    return math.nan if error is None else math.log10(max(error, _SMALLEST))


def _span(rows: Sequence[Sequence[Panel]]) -> tuple[float, float]:
    """Return the range of all drawn values, at least a decade wide."""
    drawn = [value for row in rows for panel in row for line in panel.values for value in line if not math.isnan(value)]
    low, high = (min(drawn), max(drawn)) if drawn else (-6.0, 0.0)
    return (low, high) if high - low >= 1 else (low - (1 - high + low) / 2, high + (1 - high + low) / 2)
