"""Good clips by a seeded generator: what a sound model may render, and how a sound quantization may change it.

Seven kinds of scene, from a textured pan to a still camera, in colours, speeds and sizes of its own for each seed; and
changes no viewer would call broken.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

FRAMES, SIDE = 13, 64


def uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def texture(generator: Generator, height: int, width: int, grain: int) -> Tensor:
    """[3, height, width] smooth random colours whose patches have about `grain` pixels."""
    coarse = torch.rand(1, 3, height // grain + 2, width // grain + 2, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1)


def shape_over(ground: Tensor, generator: Generator, *, speed: float) -> Tensor:
    """A disc of one colour that moves over a still or moving ground of [FRAMES, 3, SIDE, SIDE]."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    radius, angle = uniform(generator, 6, 14), uniform(generator, 0, 6.28)
    colour = torch.rand(3, 1, 1, generator=generator)
    t = torch.arange(FRAMES) - FRAMES / 2
    centre_x = SIDE / 2 + speed * t * torch.cos(torch.tensor(angle))
    centre_y = SIDE / 2 + speed * t * torch.sin(torch.tensor(angle))
    distance = ((columns - centre_x[:, None, None]) ** 2 + (rows - centre_y[:, None, None]) ** 2).sqrt()
    alpha = (radius - distance).clamp(0, 1)[:, None]
    return ground * (1 - alpha) + colour * alpha


def moving_shape(generator: Generator) -> Tensor:
    ground = texture(generator, SIDE, SIDE, 32).expand(FRAMES, 3, SIDE, SIDE)
    return shape_over(ground, generator, speed=uniform(generator, 0.5, 3))


def pan(generator: Generator) -> Tensor:
    grain, speed = int(uniform(generator, 3, 20)), int(uniform(generator, 1, 4))
    wide = texture(generator, SIDE, SIDE + speed * FRAMES, grain)
    return torch.stack([wide[:, :, speed * t : speed * t + SIDE] for t in range(FRAMES)])


def waves(generator: Generator) -> Tensor:
    """Stripes that travel, of any width down to three pixels."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    angle, width = torch.tensor(uniform(generator, 0, 6.28)), uniform(generator, 3, 20)
    phase = (columns * angle.cos() + rows * angle.sin()) * 6.28 / width
    t = torch.arange(FRAMES)[:, None, None] * uniform(generator, 0.1, 0.8)
    colours = torch.rand(2, 3, 1, 1, generator=generator)
    mix = (0.5 + 0.5 * torch.sin(phase - t))[:, None]
    return colours[0] * mix + colours[1] * (1 - mix)


def chequered_pan(generator: Generator) -> Tensor:
    """Hard-edged fields of 8 to 24 pixels under a moving camera."""
    field, speed = int(uniform(generator, 8, 25)), uniform(generator, 0.5, 2)
    light, dark = uniform(generator, 0.6, 0.95), uniform(generator, 0.05, 0.4)
    columns, rows = torch.arange(SIDE), torch.arange(SIDE)[:, None]
    frames = [((columns + round(speed * t)) // field + rows // field) % 2 for t in range(FRAMES)]
    return dark + (light - dark) * torch.stack(frames)[:, None].float().expand(FRAMES, 3, SIDE, SIDE)


def low_light(generator: Generator) -> Tensor:
    return moving_shape(generator) * uniform(generator, 0.05, 0.2)


def fade(generator: Generator) -> Tensor:
    """Into black or out of it."""
    light = torch.linspace(uniform(generator, 0.8, 1), uniform(generator, 0, 0.1), FRAMES)[:, None, None, None]
    return pan(generator) * (light if uniform(generator, 0, 1) < 0.5 else light.flip(0))


def still_camera(generator: Generator) -> Tensor:
    """A picture in which one small thing hardly moves."""
    ground = texture(generator, SIDE, SIDE, int(uniform(generator, 4, 24))).expand(FRAMES, 3, SIDE, SIDE)
    return shape_over(ground, generator, speed=uniform(generator, 0, 0.3))


SCENES = (moving_shape, pan, waves, chequered_pan, low_light, fade, still_camera)


def grain(video: Tensor, generator: Generator) -> Tensor:
    return (video + 0.02 * torch.randn(video.shape, generator=generator)).clamp(0, 1)


def softer(video: Tensor, generator: Generator) -> Tensor:
    return F.avg_pool2d(F.pad(video, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def other_tone(video: Tensor, generator: Generator) -> Tensor:
    return (video * uniform(generator, 0.85, 1.1) + uniform(generator, -0.03, 0.05)).clamp(0, 1)


def other_place(video: Tensor, generator: Generator) -> Tensor:
    return video.roll((int(uniform(generator, -6, 7)), int(uniform(generator, -6, 7))), dims=(2, 3))


def slower(video: Tensor, generator: Generator) -> Tensor:
    """Two thirds of the speed, frames blended as a codec or a sampler would."""
    at = torch.arange(len(video)) * 2 / 3
    share = (at % 1)[:, None, None, None]
    first = at.long()
    return video[first] * (1 - share) + video[(first + 1).clamp(max=len(video) - 1)] * share


def eight_bits(video: Tensor, generator: Generator) -> Tensor:
    return (video * 255).round() / 255


CHANGES: tuple[Callable[[Tensor, Generator], Tensor], ...] = (
    grain,
    softer,
    other_tone,
    other_place,
    slower,
    eight_bits,
)  # fmt: skip


def good_clip(seed: int) -> tuple[Tensor, Tensor]:
    """Return a changed clip and the clip: [FRAMES, 3, SIDE, SIDE] float32 in [0, 1] each."""
    generator = torch.Generator().manual_seed(seed)
    reference = SCENES[seed % len(SCENES)](generator)
    change = CHANGES[seed // len(SCENES) % len(CHANGES)]
    return change(reference, generator), reference
