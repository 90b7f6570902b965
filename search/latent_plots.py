"""How far latents of the trials drift from float's along the denoising loop, as a picture."""

from pathlib import Path

from hyquant.latents import mean_curve
from search.overview import Overview
from search.plot_data import look

_OTHERS = "#BBBBBB"
_SMALLEST = 1e-9


def save_latent_png(path: Path, overview: Overview) -> None:
    """Draw the mean relative L2 error by step: the front in colour, other trials in grey; nothing without any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in overview.rows if row.result is not None and row.result.latent_l2]
    if not rows:
        return
    figure = Figure(figsize=(8.0, 5.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    for row in sorted(rows, key=lambda row: row.is_on_front):
        assert row.result is not None
        curve = [max(error, _SMALLEST) for error in mean_curve(row.result.latent_l2)]
        steps = range(1, len(curve) + 1)
        if row.is_on_front:
            label = f"#{row.number} {row.strategy}{f' ({chr(44).join(row.picks)})' if row.picks else ''}"
            axes.plot(steps, curve, color=look(row.strategy or "")[0], linewidth=1.4, label=label)
        else:
            axes.plot(steps, curve, color=_OTHERS, linewidth=0.7)
    axes.set_xlabel("after denoising step")
    axes.set_ylabel("relative L2 error of latents, lower is better")
    axes.set_title(
        f"{overview.config.name}: drift from float, mean over prompts; grey: trials off the front", fontsize=10
    )
    axes.grid(alpha=0.25)
    if any(row.is_on_front for row in rows):
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path)
