"""Draw docs/images/search.png from docs/benchmarks/search.json: the area that each way to search has after each trial.

python -m tools.bench.tabular.plot
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[3] / "docs"
COLOURS = {"tpe": "#0072B2", "gp": "#D55E00", "nsga2": "#009E73", "random": "#999999", "grid": "#CC79A7"}
"""Colours that colour-blind eyes tell apart. Source: Okabe and Ito, "Color Universal Design" (2008)."""


def main() -> None:
    rows = json.loads((DOCS / "benchmarks" / "search.json").read_text())["rows"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (title, encoding, presets) in zip(
        panels, (("raw bits, no presets", "bits", "no"), ("ladder and presets", "ladder", "yes")), strict=True
    ):
        baseline = rows[0]
        panel.plot(_trials(baseline), baseline["curve"], color="black", linestyle=":", label=baseline["sampler"])
        for row in rows[1:]:
            if (
                (row["exclusions"], row["presets"]) == (encoding, presets)
                and row["sampler"] in COLOURS
                and "curve" in row
            ):
                panel.plot(_trials(row), row["curve"], color=COLOURS[row["sampler"]], label=row["sampler"])
        panel.axhline(0.95, color="#cccccc", linewidth=1, zorder=0)
        panel.set(title=title, xlabel="trials that were paid for", xlim=(1, 40), ylim=(0.3, 1.01))
        panel.legend(loc="lower right", frameon=False)
    panels[0].set_ylabel("share of the table's area, median over seeds")
    figure.savefig(DOCS / "images" / "search.png", dpi=110)


def _trials(row: dict[str, Any]) -> range:
    return range(1, len(row["curve"]) + 1)


if __name__ == "__main__":
    main()
