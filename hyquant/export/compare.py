"""Float against quantized, on the same inputs: whole calls of a denoiser, and every quantized layer by itself.

Inputs are rounded to the deployment dtype on both sides. Otherwise the rounding of a timestep or of the guidance, which
the engine does anyway, would be taken for a quantization error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hyquant.calibration.calls import output_tensor, replay
from hyquant.clock import StepClock
from hyquant.config import DeployDtype, FrozenModel
from hyquant.models.base import Record
from hyquant.modules.swap import float_linear
from hyquant.numerics.error import cosine
from hyquant.values import map_tensors

MIN_COSINE = 0.9
MAX_GAIN_ERROR = 0.1
MAX_LAYER_GAIN_ERROR = 0.25
"""Far beyond what a useful quantization does to a call or a layer: what fails here is broken, or 4 bits are too few."""


class ForwardCheck(FrozenModel):
    """One denoiser call, quantized against float, on the same inputs.

    Attributes:
        step_index: The step the clock was set to.
        cosine: Cosine similarity of the outputs; blind to a uniform scale error.
        gain: Least-squares factor from float to quantized output; 1 without a scale error.
    """

    step_index: int
    cosine: float
    gain: float


class LayerCheck(FrozenModel):
    """One layer at one step, quantized against float, on the inputs that the float denoiser gives it."""

    name: str
    step_index: int
    cosine: float
    gain: float


def rounded(record: Record, dtype: DeployDtype) -> Record:
    """Return a record whose float tensors hold values of the deployment dtype, in their own dtypes."""
    deploy: torch.dtype = getattr(torch, dtype)

    def to_deployed(tensor: Tensor) -> Tensor:
        return tensor.to(deploy).to(tensor.dtype) if tensor.is_floating_point() else tensor

    return Record(
        record.step_index,
        record.prompt_index,
        map_tensors(dict(record.inputs), to_deployed),
        map_tensors(record.args, to_deployed),
    )


@torch.no_grad()
def call(denoiser: nn.Module, record: Record, clock: StepClock) -> Tensor:
    """Call a denoiser as recorded at the record's step, and return its output as a vector, float64."""
    clock.set(record.step_index)
    output = replay(denoiser, record, next(denoiser.parameters()).device)
    return output_tensor(output).double().flatten()


def call_with_inputs(
    denoiser: nn.Module, record: Record, clock: StepClock, paths: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Call a float denoiser as `call` does, and return its output with the inputs of some of its Linears.

    Args:
        denoiser: The float denoiser.
        record: The call.
        clock: Its clock.
        paths: Module paths of Linears; of one that is called several times the last input is kept, of one that is not
            called there is none.
    """
    inputs: dict[str, Tensor] = {}

    def keeper(path: str) -> RemovableHandle:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[path] = args[0].detach().cpu()

        return float_linear(denoiser, path).register_forward_pre_hook(keep)

    handles = [keeper(path) for path in paths]
    try:
        return call(denoiser, record, clock), inputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def compare_layer(
    name: str,
    step_index: int,
    floats: Sequence[Callable[[Tensor], Tensor]],
    quantized: Sequence[Callable[[Tensor], Tensor]],
    x: Tensor,
) -> LayerCheck:
    """Run the members of a layer, float and quantized, on one input.

    Args:
        name: What to call the layer.
        step_index: The step that the quantized members are set to.
        floats: The float Linears in row order.
        quantized: What replaces each.
        x: [..., K], the input they share.
    """
    reference, output = (torch.cat([run(x).double() for run in runs], dim=-1).flatten() for runs in (floats, quantized))
    is_silent = not reference.any() and not output.any()
    return LayerCheck(
        name=name,
        step_index=step_index,
        cosine=1.0 if is_silent else cosine(reference, output),
        gain=gain(output, reference),
    )


def gain(output: Tensor, reference: Tensor) -> float:
    """Return the least-squares factor from a reference to an output, both [N] float64; 1 if both are zero."""
    power = reference @ reference
    return float(output @ reference / power) if power > 0 else float(not output.any())


def forward_problems(checks: Sequence[ForwardCheck]) -> Iterator[str]:
    """Say which calls are broken."""
    for check in checks:
        if not check.cosine >= MIN_COSINE:
            yield (
                f"one call at step {check.step_index} must have cosine {MIN_COSINE} or more to the float denoiser's, "
                f"but has {check.cosine:.4f}"
            )
        if not abs(check.gain - 1.0) <= MAX_GAIN_ERROR:
            yield (
                f"one call at step {check.step_index} must have a gain within {MAX_GAIN_ERROR} of 1, but has "
                f"{check.gain:.4f}"
            )


def layer_problems(checks: Sequence[LayerCheck]) -> Iterator[str]:
    """Say which layers are broken, each once with its worst step."""
    worst: dict[str, LayerCheck] = {}
    for check in checks:
        if check.name not in worst or badness(check) > badness(worst[check.name]):
            worst[check.name] = check
    for name, check in worst.items():
        if not check.cosine >= MIN_COSINE or not abs(check.gain - 1.0) <= MAX_LAYER_GAIN_ERROR:
            yield (
                f"layer {name} must do what the float layer does (cosine {MIN_COSINE} or more, gain within "
                f"{MAX_LAYER_GAIN_ERROR} of 1), but at step {check.step_index} it has cosine {check.cosine:.4f} and "
                f"gain {check.gain:.4f}"
            )


def badness(check: LayerCheck) -> float:
    """Return how far a layer is from the float one: 1 - cosine or the gain's error, whichever is larger."""
    distance = max(1.0 - check.cosine, abs(check.gain - 1.0))
    return distance if distance == distance else float("inf")


def inputs_of(inputs: Mapping[str, Tensor], paths: Sequence[str]) -> Tensor | None:
    """Return the input that a layer's members share, None if the denoiser did not call them."""
    return next((inputs[path] for path in paths if path in inputs), None)
