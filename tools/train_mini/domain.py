"""The world of the mini model: one plain shape that moves, or stands still, on a plain background.

A combination is one value of each of the four factors; its caption says exactly that, and a rendered clip shows
exactly that. 480 combinations exist. 48 of them are held out of all training, spread so that every single value stays
common in training.

A clip of fewer frames is the beginning of a longer one: motion per frame does not depend on the clip length, and
neither does the start. Nuisance variation is small on purpose (size, start position and shade vary a little), because
the point of the mini model is a video that visibly obeys its prompt, not a rich world.

    B batch   T frames   H, W height, width   C colour channels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.92, 0.08, 0.08),
    "green": (0.08, 0.72, 0.12),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (0.98, 0.90, 0.08),
    "magenta": (0.90, 0.10, 0.85),
    "cyan": (0.08, 0.85, 0.92),
}
MOTIONS = {
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
    "standing still": (0.0, 0.0),
}
BACKGROUNDS = {
    "black": (0.03, 0.03, 0.03),
    "white": (0.97, 0.97, 0.97),
    "gray": (0.50, 0.50, 0.50),
    "brown": (0.44, 0.25, 0.08),
}
FACTORS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "motion": tuple(MOTIONS),
    "background": tuple(BACKGROUNDS),
}

SIZE = 64
NUM_FRAMES = 13
SPEED = 2.0  # pixels per frame
RADIUS = (14.0, 16.0)  # pixels
JITTER = 1.5  # pixels, of the start position
EDGE = 2.5  # pixels over which an edge fades

_SQUARE, _TRIANGLE_TOP, _TRIANGLE_BASE, _CROSS_LONG, _CROSS_WIDE = 0.92, 1.15, 0.85, 1.12, 0.36  # in radii


@dataclass(frozen=True)
class Combination:
    """One value of each factor, by index into `FACTORS`."""

    shape: int
    colour: int
    motion: int
    background: int

    @property
    def indices(self) -> tuple[int, int, int, int]:
        """Return the four indices in the order of `FACTORS`."""
        return self.shape, self.colour, self.motion, self.background

    @property
    def caption(self) -> str:
        """Return the sentence that describes the clip completely."""
        shape, colour, motion, background = (v[i] for v, i in zip(FACTORS.values(), self.indices, strict=True))
        return f"a {colour} {shape} {motion} on a {background} background"


def all_combinations() -> list[Combination]:
    """Return the 480 combinations in a fixed order."""
    return [
        Combination(s, c, m, b)
        for s in range(len(SHAPES))
        for c in range(len(COLOURS))
        for m in range(len(MOTIONS))
        for b in range(len(BACKGROUNDS))
    ]


def is_held_out(combination: Combination) -> bool:
    """Say whether a combination is kept out of all training: three (colour, motion) pairs per shape and background."""
    s, b = combination.shape, combination.background
    return any(
        combination.colour == (2 * k + s + b) % len(COLOURS)
        and combination.motion == (2 * k + s + 2 * b) % len(MOTIONS)
        for k in range(3)
    )


def training_combinations() -> list[Combination]:
    """Return the 432 combinations that training may use."""
    return [c for c in all_combinations() if not is_held_out(c)]


def held_out_combinations() -> list[Combination]:
    """Return the 48 combinations that no training stage sees."""
    return [c for c in all_combinations() if is_held_out(c)]


def draw_combinations(pool: Sequence[Combination], count: int, generator: torch.Generator) -> list[Combination]:
    """Draw `count` combinations from the pool, with replacement."""
    picks = torch.randint(len(pool), (count,), generator=generator)
    return [pool[int(i)] for i in picks]


def render_clips(
    combinations: Sequence[Combination], generator: torch.Generator, num_frames: int = NUM_FRAMES
) -> Tensor:
    """Draw one clip per combination.

    Returns:
        [B, T, C, H, W] float32 in [0, 1].
    """
    batch = len(combinations)
    uniform = torch.rand(batch, 5, generator=generator)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * uniform[:, 0]
    start = (SIZE - 1) / 2 + JITTER * (2 * uniform[:, 1:3] - 1)  # [B, xy]
    direction = torch.tensor([list(MOTIONS.values())[c.motion] for c in combinations])
    steps = torch.arange(num_frames) - (NUM_FRAMES - 1) / 2  # a whole clip passes the centre half-way
    centre = start[:, None] + SPEED * steps[None, :, None] * direction[:, None]  # [B, T, xy]

    pixel = torch.arange(SIZE, dtype=torch.float32)
    x = pixel[None, None, None, :] - centre[:, :, 0, None, None]  # [B, T, 1, W]
    y = pixel[None, None, :, None] - centre[:, :, 1, None, None]  # [B, T, H, 1]
    distance = _signed_distance(x, y, radius[:, None, None, None], torch.tensor([c.shape for c in combinations]))
    coverage = (0.5 - distance / EDGE).clamp(0, 1)[:, :, None]  # [B, T, 1, H, W]

    ink = _shaded(list(COLOURS.values()), [c.colour for c in combinations], uniform[:, 3])
    paper = _shaded(list(BACKGROUNDS.values()), [c.background for c in combinations], uniform[:, 4])
    return coverage * ink + (1 - coverage) * paper


def _shaded(palette: list[tuple[float, float, float]], index: list[int], uniform: Tensor) -> Tensor:
    """Return [B, 1, C, 1, 1] colours, each moved by at most 0.03 towards dark or light."""
    colour = torch.tensor([palette[i] for i in index]) + 0.06 * (uniform[:, None] - 0.5)
    return colour.clamp(0, 1)[:, None, :, None, None]


def _signed_distance(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Return [B, T, H, W] pixels to the outline of each clip's shape, negative inside."""
    x = x.abs()
    rows, columns = x / radius, y / radius
    outlines = (_circle, _square, _triangle, _cross)
    distance = torch.empty(torch.broadcast_shapes(x.shape, y.shape))
    for index, outline in enumerate(outlines):
        chosen = shape == index
        if chosen.any():
            distance[chosen] = outline(rows[chosen], columns[chosen]) * radius[chosen]
    return distance


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt() - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y.abs()) - _SQUARE


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    height = _TRIANGLE_TOP + _TRIANGLE_BASE
    side = (height * x - _TRIANGLE_TOP * (y + _TRIANGLE_TOP)) / (height**2 + _TRIANGLE_TOP**2) ** 0.5
    return torch.maximum(side, y - _TRIANGLE_BASE)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    y = y.abs()
    upright = torch.maximum(x - _CROSS_WIDE, y - _CROSS_LONG)
    lying = torch.maximum(x - _CROSS_LONG, y - _CROSS_WIDE)
    return torch.minimum(upright, lying)
