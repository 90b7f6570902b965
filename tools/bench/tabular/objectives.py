"""Which balanced pick each choice of quality objective makes, and how it fares on prompts that it was not made with.

    python -m tools.bench.tabular.objectives

The table's prompts are split into two halves in every way. With one half the whole table is evaluated, its front
against latency is found and the balanced pick is made as a study makes it; the other half judges the pick.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import log10
from pathlib import Path
from statistics import mean, median
from typing import Any

from search.picks import Direction, Point, choose_picks, losses
from search.trials import is_dominated
from spaces.strategy import strategy_of
from tools.bench.tables import markdown
from tools.bench.tabular.table import TABLE, Row, Table, read_table
from tools.bench.tabular.volume import RESOLUTION, is_feasible

OBJECTIVES = ("clip_reference", "psnr_db", "ssim", "clip_prompt")
DIRECTIONS: tuple[Direction, Direction] = ("maximize", "minimize")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    table = read_table(parser.parse_args().table)
    print(markdown([summary(table, objective) for objective in OBJECTIVES]))


def summary(table: Table, objective: str) -> dict[str, Any]:
    """Return what one objective picks over all splits, and what the held-out halves say; medians over splits."""
    num_prompts = len(table.about.prompts)
    control = next(row for row in table.rows if row.config.linear is None and row.config.attention is None)
    splits = list(combinations(range(num_prompts), num_prompts // 2))
    picks = [balanced(table.rows, control, objective, half) for half in splits]
    others = [[index for index in range(num_prompts) if index not in half] for half in splits]
    pairs = list(zip(picks, others, strict=True))
    (favourite, times), *_ = Counter(strategy_of(row.config) for row in picks).most_common(1)
    distance = median(log10(max(1 - held_out(row, "clip_reference", half), RESOLUTION)) for row, half in pairs)
    return {
        "objective": objective,
        "strategy picked most": f"{favourite} ({times} of {len(splits)})",
        "configs picked": len({row.digest for row in picks}),
        "latency": f"{median(row.ratio for row in picks):.3f}",
        "held out: 1 - clip_reference": f"{10**distance:.1e}",
        "psnr_db": f"{median(held_out(row, 'psnr_db', half) for row, half in pairs):.1f}",
        "worst psnr_db": f"{min(held_out(row, 'psnr_db', half) for row, half in pairs):.1f}",
        "clip_prompt drop": f"{median(drop(control, row, half) for row, half in pairs):.4f}",
    }


def balanced(rows: Sequence[Row], control: Row, objective: str, half: Sequence[int]) -> Row:
    """Return the balanced pick of the whole table by some of its prompts."""

    def values(row: Row) -> tuple[float, float]:
        return held_out(row, objective, half), row.ratio

    feasible = [row for row in rows if is_feasible(row)]
    every = [losses(values(row), DIRECTIONS) for row in feasible]
    front = [
        Point(number, values(row)) for number, row in enumerate(feasible) if not is_dominated(every[number], every)
    ]
    names = (objective, "latency_ratio")
    return feasible[choose_picks(front, names, DIRECTIONS, values(control))["balanced"]]


def held_out(row: Row, metric: str, half: Sequence[int]) -> float:
    """Return the mean of a metric over some of the prompts."""
    return mean(row.scores[metric][index] for index in half)


def drop(control: Row, row: Row, half: Sequence[int]) -> float:
    """Return how much less than float a config shows what some of the prompts say."""
    return held_out(control, "clip_prompt", half) - held_out(row, "clip_prompt", half)


if __name__ == "__main__":
    main()
