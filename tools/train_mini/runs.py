"""Long trainings at the rim: seeds, step schedules, atomic checkpoints and a CSV of losses."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def learning_rate_share(step: int, num_steps: int, warm_up: int = 100, flat_share: float = 0.5) -> float:
    """Return the share of the peak learning rate at a step: warm-up, flat, then linear to 2 %.

    It depends on step counts only, never on the clock, so that a rerun follows the same schedule.
    """
    if step < warm_up:
        return (step + 1) / warm_up
    flat_until = flat_share * num_steps
    if step < flat_until:
        return 1.0
    return max(0.02, 1 - 0.98 * (step - flat_until) / (num_steps - flat_until))


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of one training step, so that a resumed run draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def save_atomically(value: Any, path: Path) -> None:
    """Write a checkpoint so that a reader finds the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    torch.save(value, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint, or return None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


class LossLog:
    """A CSV file of `step`, `seconds` and named values, appended to line by line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._start = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line, and print it."""
        row = {"step": step, "seconds": round(time.monotonic() - self._start, 1)}
        row |= {name: round(value, 5) for name, value in values.items()}
        is_new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


class WeightAverage:
    """An exponential moving average of a module's parameters, in the order of `parameters()`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = list(module.parameters())
        self.weights = [p.detach().clone() for p in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the live weights, faster in the first steps."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.weights, [p.detach() for p in self._live], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the parameters of a module of the same architecture."""
        for parameter, average in zip(module.parameters(), self.weights, strict=True):
            parameter.copy_(average)
