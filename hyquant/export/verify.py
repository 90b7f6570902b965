"""`verify_export`: is this folder what it says, and does it do what the float model does?"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from hyquant.calibration.calls import output_tensor, replay
from hyquant.calibration.capture import capture_in_memory
from hyquant.clock import StepClock
from hyquant.config import FrozenModel
from hyquant.errors import ExportError, HyquantError
from hyquant.export.checks import read_checked
from hyquant.export.manifest import ExportManifest, find_manifest, model_info, read_manifest
from hyquant.export.reader import load_quantized
from hyquant.models.base import Record, RenderSettings, VideoModel
from hyquant.numerics.error import cosine
from hyquant.quantize import restore_

logger = logging.getLogger(__name__)

MIN_COSINE = 0.9
MAX_GAIN_ERROR = 0.1
"""Far beyond what any useful 8-bit quantization does to one denoiser call: what fails here is broken, not coarse."""

PROBE_PROMPT = "a red square moving left on a black background"
"""In the small vocabulary of the shipped mini model, and plain English for every other."""


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


class VerifyReport(FrozenModel):
    """The verdict over an export.

    Attributes:
        ok: Whether there are no problems.
        problems: What is wrong, one sentence each.
        layers: Number of quantized layers, by the manifest.
        layer_counts: Layers by what happened to them.
        size_bytes: Size of all files the manifest lists.
        forward: Denoiser calls that were compared; empty without a model.
    """

    ok: bool
    problems: tuple[str, ...]
    layers: int = 0
    layer_counts: dict[str, int] = Field(default_factory=dict)
    size_bytes: int = 0
    forward: tuple[ForwardCheck, ...] = ()


def verify_export(
    export_dir: str | Path,
    model: VideoModel | None = None,
    *,
    prompt: str = PROBE_PROMPT,
    denoiser: nn.Module | None = None,
    records: Sequence[Record] = (),
) -> VerifyReport:
    """Check an export: files, description, tensors, layer counts and, with a model, calls in every step mode.

    A bad export gives a report with problems, not an exception. A denoiser that belongs to no `VideoModel` is checked
    on records of its calls instead.

    Args:
        export_dir: The folder.
        model: The model it was made from; it is in float afterwards.
        prompt: What the compared calls denoise; the model must know its words.
        denoiser: In place of a model, the denoiser it was made from; it is in float afterwards.
        records: Calls of that denoiser; those of the first, the first static and the last step are compared.

    Raises:
        ExportError: If the folder is no export at all.
    """
    folder = Path(export_dir)
    find_manifest(folder)
    try:
        manifest = read_manifest(folder)
    except ExportError as error:
        return VerifyReport(ok=False, problems=(str(error),))
    _, problems = read_checked(folder, manifest)
    forward: tuple[ForwardCheck, ...] = ()
    if not problems:
        try:
            if model is not None:
                forward = _compare_model(folder, manifest, model, prompt)
            elif denoiser is not None:
                forward = _compare(folder, manifest, denoiser, records, StepClock(manifest.num_steps))
        except HyquantError as error:
            problems.append(str(error))
    problems.extend(_forward_problems(forward))
    logger.info("verify folder=%s problems=%d", folder, len(problems))
    return VerifyReport(
        ok=not problems,
        problems=tuple(problems),
        layers=len(manifest.plan.quantized),
        layer_counts=manifest.layer_counts,
        size_bytes=sum(info.size_bytes for info in manifest.files.values()),
        forward=forward,
    )


def _compare_model(folder: Path, manifest: ExportManifest, model: VideoModel, prompt: str) -> tuple[ForwardCheck, ...]:
    """Run the float and the loaded denoiser on the float model's own inputs.

    Stored ranges belong to a step, so inputs that are not that step's would be clamped in a perfect export too.
    """
    expected, given = manifest.model, model_info(model)
    if given.fingerprint != expected.fingerprint:
        raise ExportError(
            f"the export was made from {expected.kind} {expected.source} in {expected.dtype} with fingerprint "
            f"{expected.fingerprint}, but the model is {given.kind} {given.source} in {given.dtype} with "
            f"{given.fingerprint}; load the model it was made from"
        )
    clip = RenderSettings(height=64, width=64, num_frames=5, num_steps=manifest.num_steps)
    restore_(model.denoiser)
    return _compare(folder, manifest, model.denoiser, capture_in_memory(model, [prompt], [0], clip), model.clock)


def _compare(
    folder: Path, manifest: ExportManifest, denoiser: nn.Module, records: Sequence[Record], clock: StepClock
) -> tuple[ForwardCheck, ...]:
    """Run the float and the loaded denoiser on records of the first, the first static and the last step."""
    restore_(denoiser)
    steps = {0, manifest.num_steps - 1, *(manifest.static_steps or (0,))[:1]}
    chosen = [record for record in records if record.step_index in steps]
    if not chosen:
        raise ExportError(f"calls must be compared at steps {sorted(steps)}, but no record is of them; capture a run")
    references = [_call(denoiser, record, clock) for record in chosen]
    load_quantized(denoiser, folder, clock)
    try:
        outputs = [_call(denoiser, record, clock) for record in chosen]
    finally:
        restore_(denoiser)
    return tuple(
        ForwardCheck(step_index=record.step_index, cosine=cosine(reference, output), gain=_gain(output, reference))
        for record, reference, output in zip(chosen, references, outputs, strict=True)
    )


def _forward_problems(checks: tuple[ForwardCheck, ...]) -> Iterator[str]:
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


@torch.no_grad()
def _call(denoiser: nn.Module, record: Record, clock: StepClock) -> Tensor:
    clock.set(record.step_index)
    output = replay(denoiser, record, next(denoiser.parameters()).device)
    return output_tensor(output).double().flatten()


def _gain(output: Tensor, reference: Tensor) -> float:
    return float(output @ reference / (reference @ reference))
