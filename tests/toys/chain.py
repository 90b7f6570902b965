"""A toy denoiser whose sensitivity is known by construction: every block adds its own product to a sum.

    output = sum over blocks b and kinds k of gain[b][k] * W[b][k] x

Scales are powers of 2, inputs lie on the grid of int8, and of each weight all entries but one lie a quarter of a scale
beside the grid, or on it where the gain is 0. So quantizing one Linear changes the output by exactly
gain * SCALE / 4 * (sum of x without its first entry), in every output channel.
"""

import torch
from torch import Tensor, nn

from hyquant.models.base import Record

WEIGHT_SCALE, INPUT_SCALE = 2.0**-7, 2.0**-5
CHANNELS = 8


class ToyBlock(nn.Module):
    """Add the products of two Linears, `a` and `b`, to the sum; the input goes on as it came."""

    def __init__(self, gains: tuple[float, float], generator: torch.Generator) -> None:
        super().__init__()
        self.gains = gains
        self.a, self.b = (linear_beside_the_grid(generator) for _ in gains)
        self.num_calls = 0

    def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        self.num_calls += 1
        return x, total + self.gains[0] * self.a(x) + self.gains[1] * self.b(x)


class ToyChain(nn.Module):
    """Blocks in a row; with `skips_to` the first block's sum is added again before that block, past those between.

    The number of blocks stands for the end.
    """

    def __init__(self, gains: list[tuple[float, float]], *, skips_to: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(ToyBlock(pair, generator) for pair in gains)
        self.skips_to = skips_to

    def forward(self, x: Tensor) -> Tensor:
        total, sums = torch.zeros_like(x), []
        for index, block in enumerate(self.blocks):
            x, total = block(x, total + sums[0] if index == self.skips_to else total)
            sums.append(total)
        return total + sums[0] if self.skips_to == len(self.blocks) else total

    @property
    def num_block_calls(self) -> int:
        return sum(block.num_calls for block in self.blocks)


def linear_beside_the_grid(generator: torch.Generator) -> nn.Linear:
    """Return a Linear without bias whose rows have 127 scales first and a quarter beside whole numbers then."""
    codes = torch.randint(-90, 90, (CHANNELS, CHANNELS), generator=generator) + 0.25
    codes[:, 0] = 127
    linear = nn.Linear(CHANNELS, CHANNELS, bias=False)
    linear.weight = nn.Parameter(codes * WEIGHT_SCALE, requires_grad=False)
    return linear


def toy_records(num_steps: int, num_prompts: int = 1) -> list[Record]:
    """Return calls whose inputs, [5, CHANNELS], are whole numbers of scales, 127 among them in each row."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for prompt_index in range(num_prompts):
        for step_index in range(num_steps):
            codes = torch.randint(-126, 127, (5, CHANNELS), generator=generator).float()
            codes[:, 0] = 127
            found.append(Record(step_index, prompt_index, {"x": codes * INPUT_SCALE}))
    return found
