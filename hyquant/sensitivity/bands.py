"""What is probed together: the Linears of one kind in a block, or in a few adjacent blocks."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from hyquant.config import FrozenModel
from hyquant.errors import ConfigError

OUTSIDE = "outside"
"""The block of a Linear that belongs to no numbered block."""

_NAME = re.compile(r"(?P<stack>.+?)\.(?P<number>\d+)\.(?P<kind>.+)")


class Place(NamedTuple):
    """Where a layer is: `double_blocks.3.img_mlp.fc1` is kind img_mlp.fc1 in block 3 of the stack double_blocks."""

    stack: str
    number: int
    kind: str

    @property
    def block(self) -> str:
        """Return the block's name."""
        return f"{self.stack}.{self.number}"


class LayerBand(FrozenModel):
    """Layers that one probe quantizes.

    Attributes:
        block: "double_blocks.3", or "double_blocks.0-4" for several; "outside" for what belongs to no numbered block.
        kind: What follows the block in the layers' canonical names.
        layers: Canonical names, in model order.
    """

    block: str
    kind: str
    layers: tuple[str, ...]

    @property
    def first_block(self) -> str | None:
        """Return the first of its blocks in model order; None outside of blocks."""
        place = place_of(self.layers[0])
        return None if place is None else place.block


def place_of(name: str) -> Place | None:
    """Return where a layer, or a module by its path, is; None if it belongs to no numbered block."""
    match = _NAME.fullmatch(name)
    return None if match is None else Place(match["stack"], int(match["number"]), match["kind"])


def bands_of(names: Sequence[str], *, width: int = 1) -> tuple[LayerBand, ...]:
    """Cut layers into bands.

    Args:
        names: Canonical names, in model order.
        width: How many adjacent blocks of a stack are probed together.

    Returns:
        Bands in model order; within the same blocks in the order of their first layer.

    Raises:
        ConfigError: If `width` is below 1.
    """
    if width < 1:
        raise ConfigError(f"a band must span at least 1 block, but got {width}; use 1 for every block by itself")
    found: dict[tuple[str, int, str], list[str]] = {}
    for name in names:
        place = place_of(name)
        key = (OUTSIDE, 0, name) if place is None else (place.stack, place.number // width, place.kind)
        found.setdefault(key, []).append(name)
    stacks = list(dict.fromkeys(stack for stack, _, _ in found))
    keys = sorted(found, key=lambda key: (stacks.index(key[0]), key[1]))
    return tuple(
        LayerBand(block=_label(stack, found[stack, index, kind]), kind=kind, layers=tuple(found[stack, index, kind]))
        for stack, index, kind in keys
    )


def patterns_of(layers: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return glob patterns that match some layers and no others: the same patterns for the same layers.

    One pattern with `*` for a kind in all blocks of a stack, else one for each ten of block numbers, such as
    `double_blocks.1[0246].img_mlp.fc1`.

    Args:
        layers: Canonical names.
        known: Canonical names of all layers there are, in model order, these among them.
    """
    wanted = set(layers)
    by_kind: dict[tuple[str, str], list[int]] = {}
    patterns: list[str] = []
    for name in known:
        place = place_of(name)
        if place is not None:
            by_kind.setdefault((place.stack, place.kind), []).append(place.number)
        elif name in wanted:
            patterns.append(name)
    for (stack, kind), numbers in by_kind.items():
        chosen = [number for number in numbers if f"{stack}.{number}.{kind}" in wanted]
        globs = ["*"] if chosen == numbers and len(numbers) > 1 else _globs(chosen)
        patterns += [f"{stack}.{glob}.{kind}" for glob in globs]
    return tuple(patterns)


def _globs(numbers: Sequence[int]) -> list[str]:
    tens = groupby(sorted(numbers), key=lambda number: str(number)[:-1])
    digits = {head: "".join(str(number)[-1] for number in members) for head, members in tens}
    return [f"{head}{last if len(last) == 1 else f'[{last}]'}" for head, last in digits.items()]


def _label(stack: str, names: Sequence[str]) -> str:
    numbers = [place.number for name in names if (place := place_of(name)) is not None]
    if not numbers:
        return OUTSIDE
    return f"{stack}.{numbers[0]}" if len(numbers) == 1 else f"{stack}.{numbers[0]}-{numbers[-1]}"
