"""Choose the three disjoint prompt sets so that every value of every factor is about equally frequent in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from hyquant.models.mini import PROMPTS
from tools.train_mini.domain import Combination, held_out_combinations, training_combinations

NUM_PROMPTS = {"calibration": 16, "search": 24, "heldout": 32}
NUM_EVALUATED = 32  # of training combinations, and as many held out


def balanced_choice(pool: Sequence[Combination], count: int, seed: int) -> list[Combination]:
    """Pick `count` combinations, each time the one whose factor values, and pairs of them, were picked least."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    left = [pool[i] for i in order]
    singles: Counter[tuple[int, int]] = Counter()
    pairs: Counter[tuple[tuple[int, int], tuple[int, int]]] = Counter()
    chosen: list[Combination] = []

    def values(c: Combination) -> list[tuple[int, int]]:
        return list(enumerate(c.indices))

    def couples(c: Combination) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        return [(a, b) for a in values(c) for b in values(c) if a < b]

    while len(chosen) < count:
        best = min(left, key=lambda c: (sum(singles[v] for v in values(c)), sum(pairs[p] for p in couples(c))))
        left.remove(best)
        chosen.append(best)
        singles.update(values(best))
        pairs.update(couples(best))
    return chosen


def choose_prompts() -> dict[str, list[Combination]]:
    """Return the calibration and search sets, of training combinations, and the held-out set."""
    pool = training_combinations()
    calibration = balanced_choice(pool, NUM_PROMPTS["calibration"], seed=1)
    rest = [c for c in pool if c not in calibration]
    return {
        "calibration": calibration,
        "search": balanced_choice(rest, NUM_PROMPTS["search"], seed=2),
        "heldout": balanced_choice(held_out_combinations(), NUM_PROMPTS["heldout"], seed=3),
    }


def evaluation_combinations() -> list[Combination]:
    """Return the 64 combinations on which the bars are measured: 32 of training, then 32 held out."""
    seen = balanced_choice(training_combinations(), NUM_EVALUATED, seed=4)
    return seen + balanced_choice(held_out_combinations(), NUM_EVALUATED, seed=3)


def write_prompts(files: dict[str, Path] = PROMPTS) -> None:
    """Write the three prompt files, one caption a line."""
    for name, combinations in choose_prompts().items():
        files[name].parent.mkdir(parents=True, exist_ok=True)
        files[name].write_text("".join(f"{c.caption}\n" for c in combinations))
