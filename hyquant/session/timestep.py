"""`TimestepManager`: the denoising step of the loop that runs, for scripts that have no clock of their own."""

from operator import index

from hyquant.clock import StepClock
from hyquant.errors import ConfigError


class TimestepManager:
    """Tell quantized models and dumps the denoising step; call `set_timestep_idx` at the start of every step.

    It only forwards to one `StepClock` of the process. Models that `quant_model` quantized look at it before each call.
    One that was loaded follows it after `attach_clock(model, clock, TimestepManager.get_timestep_idx)`.
    """

    _clock = StepClock()

    @classmethod
    def set_timestep_idx(cls, timestep_idx: int) -> None:
        """Move to a step.

        Args:
            timestep_idx: 0-based index of the denoising step, any integer type.

        Raises:
            ConfigError: If it is no integer or negative.
        """
        if isinstance(timestep_idx, bool) or not hasattr(timestep_idx, "__index__"):
            raise ConfigError(
                f"timestep_idx must be the index of a denoising step, but got {timestep_idx!r}; give 0, 1, 2 and so on."
            )
        cls._clock.set(index(timestep_idx))

    @classmethod
    def get_timestep_idx(cls) -> int | None:
        """Return the current step, None before the first was set."""
        return cls._clock.step_index
