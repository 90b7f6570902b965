"""Recording the calls of any module, and making them again: calibration for pipelines of your own.

    clock = StepClock(num_steps=50)
    attach_clock(denoiser, clock, CallCounter(50))
    with capture_calls(denoiser, clock) as records:
        run_my_pipeline()
    stats = observe(denoiser, groups, records, clock)

Arguments are recorded as they come, positional and by keyword, so the module's signature does not matter.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyquant.clock import StepClock
from hyquant.errors import CalibrationError
from hyquant.models.base import Record, RecordSink
from hyquant.values import map_tensors, require_plain


@contextmanager
def capture_calls(
    denoiser: nn.Module, clock: StepClock, *, prompt_index: int = 0, sink: RecordSink | None = None
) -> Iterator[list[Record]]:
    """Record every call of a module while the block runs.

    Tensors are copied to the CPU when the module is called. One that equals the tensor at the same place of the call
    before, such as text or rotary tables, is held once.

    Args:
        denoiser: Any module; it is called as always.
        clock: Holds the step of each call. Whoever runs the loop sets it, or `attach_clock` does so before the call:
            from a scheduler, or by counting with a `CallCounter`.
        prompt_index: What the records say about where they come from; give each run its own.
        sink: Takes the records instead of the list, for instance that of `hyquant.calibration.records.write_records`,
            which keeps none of them in memory.

    Yields:
        The list that records are appended to; empty with a sink.

    Raises:
        CalibrationError: In the call, if the clock has no step or an argument is not made of plain values.
    """
    records: list[Record] = []
    take: RecordSink = records.append if sink is None else sink
    copies = SharedCopies()

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if clock.step_index is None:
            raise CalibrationError(
                "a recorded call must have a denoising step, but its clock was never set; attach_clock the denoiser, "
                "with a CallCounter where nothing else knows the step."
            )
        for index, value in enumerate(args):
            require_plain(value, f"positional argument {index}")
        for name, value in kwargs.items():
            require_plain(value, f"argument {name}")
        positional, named = copies.take(args, kwargs)
        take(Record(clock.step_index, prompt_index, named, positional))

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield records
    finally:
        handle.remove()


class SharedCopies:
    """Copies of the arguments of call after call, on the CPU.

    A tensor that equals the one at the same place of the call before is not copied again.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def take(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of a call's positional arguments and of those by keyword."""
        before = iter(self._held)
        held: list[Tensor] = []

        def copy(tensor: Tensor) -> Tensor:
            held.append(_copied(tensor, next(before, None)))
            return held[-1]

        named, positional = map_tensors(dict(kwargs), copy), map_tensors(args, copy)
        self._held = held
        return positional, named


@torch.no_grad()
def _copied(tensor: Tensor, before: Tensor | None) -> Tensor:
    """Return a copy on the CPU, or what was copied at this place before if it is the same bit by bit."""
    copy = tensor.detach().to("cpu", copy=True)
    same_kind = before is not None and before.dtype == copy.dtype and before.shape == copy.shape
    return before if before is not None and same_kind and torch.equal(before, copy) else copy


def replay(denoiser: nn.Module, record: Record, device: torch.device) -> Any:
    """Call a denoiser as it was called when the record was made, and return what it returns."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    return denoiser(*map_tensors(record.args, move), **map_tensors(dict(record.inputs), move))


def output_tensor(output: Any) -> Tensor:
    """Return the tensor that a denoiser returned: by itself, or first in a tuple, a list or a dictionary.

    Raises:
        CalibrationError: If it returned something else.
    """
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, Sequence):
        first = next(iter(output), None)
    if not isinstance(first, Tensor):
        raise CalibrationError(
            f"a denoiser must return a tensor, or one as the first entry of a tuple or dict, but it returned "
            f"{type(output).__name__}; wrap it in a module that does."
        )
    return first
