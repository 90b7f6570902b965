"""One small HunyuanVideo in both layouts, with records of a short loop."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from hyquant.calibration.calls import capture_calls
from hyquant.clock import CallCounter, StepClock, attach_clock
from hyquant.models.base import Record
from hyquant.models.names import to_diffusers
from tests.toys.original_dit import ToyOriginalDiT


class AsDiffusers(nn.Module):
    """The diffusers class behind the toy's signature, so that one loop runs both; its weights are the toy's."""

    def __init__(self, toy: ToyOriginalDiT) -> None:
        super().__init__()
        sizes = asdict(toy.size) | {"out_channels": toy.size.in_channels}
        self.denoiser = HunyuanVideoTransformer3DModel(**sizes).eval().requires_grad_(False)
        self.denoiser.load_state_dict(to_diffusers(toy.state_dict()))

    def forward(self, x, t, text_states, text_mask, text_states_2, freqs_cos, freqs_sin, guidance) -> dict[str, Tensor]:
        """Call the class with what the toy takes."""
        del freqs_cos, freqs_sin  # the class makes its own
        return {
            "x": self.denoiser(
                hidden_states=x,
                timestep=t,
                encoder_hidden_states=text_states,
                encoder_attention_mask=text_mask,
                pooled_projections=text_states_2,
                guidance=guidance,
            ).sample
        }


def recorded(
    denoiser: nn.Module, loop: Callable[[Any], Any], inputs: Any, *, num_steps: int
) -> tuple[StepClock, list[Record], Any]:
    """Run a loop once in float; return the clock that follows the denoiser's calls, records, and the result."""
    clock = StepClock(num_steps)
    attach_clock(denoiser, clock, CallCounter(num_steps))
    with capture_calls(denoiser, clock) as records:
        result = loop(inputs)
    return clock, records, result
