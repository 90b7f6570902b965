"""Running a denoiser behind blocks whose outputs were kept.

What runs before the first quantized block is the same in every probe. So those blocks give back what they gave in
float, and only the ones behind them run. Of each stack (`double_blocks`) the output of the last block is held and all
of its earlier blocks return that: in a chain of blocks nobody else sees what they return. `is_chain` tells on one
record, bit by bit, whether a denoiser is such a chain wherever it is to be cut.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hyquant.calibration.calls import output_tensor
from hyquant.values import map_tensors

Call: TypeAlias = Callable[[], Any]
"""Calls the denoiser with one record's arguments."""


@dataclass(frozen=True)
class FloatPass:
    """What one call of the float denoiser showed.

    Attributes:
        output: The denoiser's output.
        blocks: Module paths of its blocks in the order they ran in; none if one of them ran more than once.
    """

    output: Tensor
    blocks: tuple[str, ...]


class _Reached(Exception):
    """The block that was waited for has returned."""


class _Kept(nn.Module):
    """Stands in a block's place and returns copies of one kept output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Return the output, whatever the arguments are."""
        return map_tensors(self._output, torch.clone)


@torch.inference_mode()
def float_pass(denoiser: nn.Module, paths: Sequence[str], call: Call) -> FloatPass:
    """Call a denoiser once and note in which order its blocks run.

    Args:
        denoiser: The denoiser.
        paths: Module paths of its blocks, in any order.
        call: The call.
    """
    ran: list[str] = []

    def note(path: str, module: nn.Module, args: object, output: Any) -> None:
        ran.append(path)

    with _hooked(denoiser, paths, note):
        output = output_tensor(call())
    return FloatPass(output, tuple(ran) if len(set(ran)) == len(ran) else ())


def is_chain(denoiser: nn.Module, seen: FloatPass, counts: Collection[int], call: Call) -> bool:
    """Say whether a denoiser gives its output bit by bit behind the kept outputs of so many blocks, for every count.

    Args:
        denoiser: The denoiser, in float.
        seen: What a whole call showed.
        counts: How many blocks are to be kept, in any order; behind 0 there is nothing to check.
        call: The same call.
    """
    outputs: dict[str, Any] = {}
    done = 0
    for count in sorted(set(counts) - {0}):
        outputs = outputs_after(denoiser, seen.blocks[:done], outputs, seen.blocks[done:count], call)
        done = count
        if not torch.equal(output_behind(denoiser, seen.blocks[:count], outputs, call), seen.output):
            return False
    return bool(seen.blocks)


@torch.inference_mode()
def output_behind(denoiser: nn.Module, blocks: Sequence[str], outputs: Mapping[str, Any], call: Call) -> Tensor:
    """Return the denoiser's output with blocks that return what was kept.

    Args:
        denoiser: The denoiser; blocks that are not kept may be quantized.
        blocks: Module paths of the blocks that do not run.
        outputs: What they return, by stack.
        call: The call.
    """
    with _behind(denoiser, blocks, outputs):
        return output_tensor(call())


@torch.inference_mode()
def outputs_after(
    denoiser: nn.Module, blocks: Sequence[str], outputs: Mapping[str, Any], more: Sequence[str], call: Call
) -> dict[str, Any]:
    """Run the next blocks behind kept ones, and nothing after them.

    Args:
        denoiser: The denoiser.
        blocks: Module paths of the blocks that do not run.
        outputs: What they return, by stack.
        more: Module paths of the blocks to run, in the order they run in.
        call: The call.

    Returns:
        What all these blocks return, by stack.
    """
    found = dict(outputs)

    def note(path: str, module: nn.Module, args: object, output: Any) -> None:
        found[stack_of(path)] = map_tensors(output, torch.clone)
        if path == more[-1]:
            raise _Reached

    with _behind(denoiser, blocks, outputs), _hooked(denoiser, more, note):
        try:
            call()
        except _Reached:
            return found
    raise AssertionError("a block that ran in the first pass runs in every other")


def stack_of(path: str) -> str:
    """Return the path of the list that a block stands in."""
    return path.rpartition(".")[0]


@contextmanager
def _behind(denoiser: nn.Module, blocks: Sequence[str], outputs: Mapping[str, Any]) -> Iterator[None]:
    floats = {path: denoiser.get_submodule(path) for path in blocks}
    try:
        for path in blocks:
            _put(denoiser, path, _Kept(outputs[stack_of(path)]))
        yield
    finally:
        for path, block in floats.items():
            _put(denoiser, path, block)


@contextmanager
def _hooked(denoiser: nn.Module, paths: Sequence[str], note: Callable[..., None]) -> Iterator[None]:
    handles = [denoiser.get_submodule(path).register_forward_hook(partial(note, path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _put(denoiser: nn.Module, path: str, block: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(denoiser.get_submodule(parent), name, block)
