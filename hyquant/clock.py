"""The current denoising step, as an explicit object that quantized layers follow.

A `StepClock` belongs to one denoiser. Whoever runs the denoising loop sets it before each forward (`attach_clock` does
so from a pre-hook); layers whose arithmetic depends on the step subscribe to it.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hyquant.errors import ConfigError

StepCallback = Callable[[int], None]


class StepClock:
    """Hold the 0-based step index of one denoising loop and tell its subscribers when it changes.

    Attributes:
        num_steps: Number of steps of the loop, or None while unknown; set by whoever starts a loop. Once known, a step
            index outside [0, num_steps) is refused.
    """

    def __init__(self, num_steps: int | None = None) -> None:
        self.num_steps = num_steps
        self._step_index: int | None = None
        self._callbacks: list[StepCallback] = []

    @property
    def step_index(self) -> int | None:
        """Return the current step index, or None before the first `set`."""
        return self._step_index

    def set(self, step_index: int) -> None:
        """Move to a step; subscribers hear about it only if the step changes.

        Args:
            step_index: 0-based index of the step whose forward comes next.

        Raises:
            ConfigError: If the index is negative or, with `num_steps` known, not below it.
        """
        if step_index < 0 or (self.num_steps is not None and step_index >= self.num_steps):
            bound = "num_steps" if self.num_steps is None else str(self.num_steps)
            raise ConfigError(
                f"step_index must lie in [0, {bound}), but got {step_index}; "
                "set the clock's num_steps to the length of the loop that runs."
            )
        if step_index == self._step_index:
            return
        for callback in tuple(self._callbacks):
            callback(step_index)
        self._step_index = step_index

    def subscribe(self, callback: StepCallback, *, num_steps: int | None = None) -> None:
        """Call `callback(step_index)` on every change of step, and at once if a step is already set.

        Args:
            callback: What to call.
            num_steps: Length of the loops that the subscriber is for; a step beyond it, where a longer one has ended,
                is not told at once.
        """
        if self._step_index is not None and (num_steps is None or self._step_index < num_steps):
            callback(self._step_index)
        self._callbacks.append(callback)

    def unsubscribe(self, callback: StepCallback) -> None:
        """Forget a callback; one that was never subscribed is ignored."""
        if callback in self._callbacks:
            self._callbacks.remove(callback)


class CallCounter:
    """Say the step of a loop by counting the denoiser's calls: for `attach_clock`, where nothing else knows the step.

    After the last step it begins again at 0, so one counter serves run after run. A run that was cut short leaves it
    in the middle: `restart` then.

    Args:
        num_steps: Steps of every run, at least 1.
        calls_per_step: Denoiser calls in each step: 2 where guidance makes a conditional and an unconditional one.

    Raises:
        ConfigError: If either is below 1.
    """

    def __init__(self, num_steps: int, calls_per_step: int = 1) -> None:
        if num_steps < 1 or calls_per_step < 1:
            raise ConfigError(
                f"num_steps and calls_per_step must be at least 1, but got {num_steps} and {calls_per_step}; "
                "give the length of the denoising loop."
            )
        self._calls_per_step = calls_per_step
        self._calls_per_run = num_steps * calls_per_step
        self._num_calls = 0

    def __call__(self) -> int:
        """Return the step index of the call that comes next, and count it."""
        step_index = self._num_calls % self._calls_per_run // self._calls_per_step
        self._num_calls += 1
        return step_index

    def restart(self) -> None:
        """Begin a new run with the next call."""
        self._num_calls = 0


def attach_clock(denoiser: nn.Module, clock: StepClock, step_of: Callable[[], int | None]) -> RemovableHandle:
    """Set the clock before every forward of a denoiser.

    Args:
        denoiser: The module called once per denoising step.
        clock: The clock to set.
        step_of: Returns the current step index, or None when no loop is running; then the clock is left as it is, so
            that a caller who replays single steps can set it by hand.

    Returns:
        A handle whose `remove()` detaches the clock.
    """

    def set_clock(module: nn.Module, args: tuple[Any, ...]) -> None:
        step_index = step_of()
        if step_index is not None:
            clock.set(step_index)

    return denoiser.register_forward_pre_hook(set_clock)
