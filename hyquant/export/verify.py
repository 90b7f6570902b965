"""`verify_export`: is this folder what it says, what will its target run, and does it do what the float model does?"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from torch import nn

from hyquant.calibration.capture import capture_in_memory
from hyquant.clock import StepClock
from hyquant.config import DeployDtype, FrozenModel, Target
from hyquant.errors import ExportError, HyquantError
from hyquant.export.checks import read_checked
from hyquant.export.compare import (
    ForwardCheck,
    LayerCheck,
    call,
    call_with_inputs,
    compare_layer,
    forward_problems,
    gain,
    inputs_of,
    layer_problems,
    rounded,
)
from hyquant.export.engine import EngineView, Ignored, engine_modules, engine_view, planned_modules
from hyquant.export.files import read_description
from hyquant.export.foreign import check_foreign, find_pairs, table_rows
from hyquant.export.layout import layer_names
from hyquant.export.manifest import ExportManifest, find_manifest, model_info, read_manifest
from hyquant.export.names import MANIFEST_NAME
from hyquant.export.reader import load_quantized
from hyquant.models.base import Record, RenderSettings, VideoModel
from hyquant.models.fingerprint import are_same_weights
from hyquant.modules.swap import swapped
from hyquant.numerics.error import cosine
from hyquant.quantize import restore_
from hyquant.targets import misread_problem

__all__ = ["ForwardCheck", "Ignored", "LayerCheck", "VerifyReport", "verify_export"]

logger = logging.getLogger(__name__)

PROBE_PROMPT = "a red square moving left on a black background"
"""In the small vocabulary of the shipped mini model, and plain English for every other."""

_FOREIGN_STEPS = 4
"""Steps of the compared run of an export that does not say how many it is for."""


class VerifyReport(FrozenModel):
    """The verdict over an export.

    Attributes:
        ok: Whether there are no problems; what the target ignores is told apart from them.
        problems: What is wrong, one sentence each.
        target: What is meant to execute it.
        replaced: Number of Linears that the target will replace.
        ignored: What the target will leave in float without a message.
        layers: Number of quantized layers, by the manifest or the description.
        layer_counts: Layers by what happened to them.
        size_bytes: Size of all files.
        forward: Denoiser calls that were compared; empty without a model.
        layer_checks: Layers that were compared one by one on the float denoiser's inputs; those that scales are folded
            into have other inputs and are left out.
    """

    ok: bool
    problems: tuple[str, ...]
    target: Target = "hyquant"
    replaced: int = 0
    ignored: tuple[Ignored, ...] = ()
    layers: int = 0
    layer_counts: dict[str, int] = Field(default_factory=dict)
    size_bytes: int = 0
    forward: tuple[ForwardCheck, ...] = ()
    layer_checks: tuple[LayerCheck, ...] = ()


@dataclass(frozen=True)
class _Subject:
    """What an export is compared with: a float denoiser, its clock, and calls of it."""

    denoiser: nn.Module
    clock: StepClock
    records: Sequence[Record]


def verify_export(
    export_dir: str | Path,
    model: VideoModel | None = None,
    *,
    target: Target | None = None,
    prompt: str = PROBE_PROMPT,
    denoiser: nn.Module | None = None,
    records: Sequence[Record] = (),
) -> VerifyReport:
    """Check an export: files, description, tensors, what its target does with it, and, with a model, what it computes.

    A bad export gives a report with problems, not an exception. A folder without a manifest is judged as msModelSlim's:
    by its description alone. A denoiser that belongs to no `VideoModel` is checked on records of its calls instead.

    Args:
        export_dir: The folder.
        model: The model it was made from; it is in float afterwards.
        target: What is meant to execute it; None for what the manifest says, hyquant without one.
        prompt: What the compared calls denoise; the model must know its words.
        denoiser: In place of a model, the denoiser it was made from; it is in float afterwards.
        records: Calls of that denoiser; those of the first, the first static and the last step are compared.

    Raises:
        ExportError: If the folder is no export at all.
    """
    folder = Path(export_dir)
    if not (folder / MANIFEST_NAME).is_file() and find_pairs(folder):
        return _foreign_report(folder, model, target or "hyquant", prompt, denoiser, records)
    find_manifest(folder)
    try:
        manifest = read_manifest(folder)
    except ExportError as error:
        return VerifyReport(ok=False, problems=(str(error),))
    target = target or manifest.target
    tensors, problems = read_checked(folder, manifest)
    view = EngineView(replaced={}, attentions={}, ignored=())
    forward: list[ForwardCheck] = []
    layers: list[LayerCheck] = []
    if not problems:
        float_denoiser = model.denoiser if model is not None else denoiser
        if float_denoiser is not None:
            restore_(float_denoiser)
        view = _view(folder, manifest, target, float_denoiser, list(tensors))
        problems.extend(_count_problems(view, manifest))
        try:
            subject = _subject(manifest, model, prompt, denoiser, records)
            if subject is not None:
                forward, layers = _compare(folder, manifest, subject)
        except HyquantError as error:
            problems.append(str(error))
    problems.extend((*forward_problems(forward), *layer_problems(layers)))
    problems.extend(filter(None, [misread_problem(manifest.plan, target)]))
    logger.info("verify folder=%s problems=%d ignored=%d", folder, len(problems), len(view.ignored))
    return VerifyReport(
        ok=not problems,
        problems=tuple(problems),
        target=target,
        replaced=len(view.replaced),
        ignored=view.ignored,
        layers=len(manifest.plan.quantized),
        layer_counts=manifest.layer_counts,
        size_bytes=sum(info.size_bytes for info in manifest.files.values()),
        forward=tuple(forward),
        layer_checks=tuple(layers),
    )


def _view(
    folder: Path, manifest: ExportManifest, target: Target, denoiser: nn.Module | None, keys: Sequence[str]
) -> EngineView:
    """Return what the target does with the description; a MindIE model has the original names whatever ours has."""
    layout = "original" if target.startswith("mindie-sd") else manifest.layout
    modules = (
        planned_modules(manifest.plan, keys, layout=manifest.layout, target=target)
        if denoiser is None
        else engine_modules(denoiser, layout)
    )
    return engine_view(read_description(folder / manifest.names[0].description), modules, target)


def _count_problems(view: EngineView, manifest: ExportManifest) -> list[str]:
    """Check that every planned layer is replaced, or known to be ignored."""
    known = view.replaced.keys() | {entry.name for entry in view.ignored}
    missing = sorted(layer_names(manifest.plan, manifest.layout).keys() - known)
    if not missing:
        return []
    return [
        f"the engine must replace the {len(manifest.plan.quantized)} planned layers, but finds no entry for "
        f"{missing[0]} ({len(missing)} in all); export again"
    ]


def _subject(
    manifest: ExportManifest,
    model: VideoModel | None,
    prompt: str,
    denoiser: nn.Module | None,
    records: Sequence[Record],
) -> _Subject | None:
    """Return what to compare with, None if nothing was given.

    Stored ranges belong to a step, so inputs that are not that step's would be clamped in a perfect export too: a
    model's own calls are captured.
    """
    if model is None:
        return None if denoiser is None else _Subject(denoiser, StepClock(manifest.num_steps), records)
    expected, given = manifest.model, model_info(model)
    if not are_same_weights(given.fingerprint, expected.fingerprint):
        raise ExportError(
            f"the export was made from {expected.kind} {expected.source} in {expected.dtype} with fingerprint "
            f"{expected.fingerprint}, but the model is {given.kind} {given.source} in {given.dtype} with "
            f"{given.fingerprint}; load the model it was made from"
        )
    return _captured(model, prompt, manifest.num_steps)


def _captured(model: VideoModel, prompt: str, num_steps: int) -> _Subject:
    clip = RenderSettings(height=64, width=64, num_frames=5, num_steps=num_steps)
    return _Subject(model.denoiser, model.clock, capture_in_memory(model, [prompt], [0], clip))


def _compare(folder: Path, manifest: ExportManifest, subject: _Subject) -> tuple[list[ForwardCheck], list[LayerCheck]]:
    """Run the float and the loaded denoiser, and each of their layers, at the first, first static and last step."""
    denoiser, clock = subject.denoiser, subject.clock
    restore_(denoiser)
    steps = {0, manifest.num_steps - 1, *(manifest.static_steps or (0,))[:1]}
    dtype: DeployDtype = manifest.config.deploy_dtype
    chosen = [rounded(record, dtype) for record in subject.records if record.step_index in steps]
    if not chosen:
        raise ExportError(f"calls must be compared at steps {sorted(steps)}, but no record is of them; capture a run")
    own = [layer for layer in manifest.plan.quantized if not layer.folded]
    firsts = [layer.modules[0] for layer in own]
    calls = [call_with_inputs(denoiser, record, clock, firsts) for record in chosen]
    load_quantized(denoiser, folder, clock)
    forward: list[ForwardCheck] = []
    layers: list[LayerCheck] = []
    try:
        state = swapped(denoiser)
        assert state is not None
        for record, (reference, inputs) in zip(chosen, calls, strict=True):
            output = call(denoiser, record, clock)
            forward.append(
                ForwardCheck(
                    step_index=record.step_index, cosine=cosine(reference, output), gain=gain(output, reference)
                )
            )
            for layer in own:
                x = inputs_of(inputs, layer.modules)
                if x is not None:
                    floats, quantized = (
                        [table[path] for path in layer.modules] for table in (state.floats, state.quantized)
                    )
                    device = next(denoiser.parameters()).device
                    layers.append(compare_layer(layer.name, record.step_index, floats, quantized, x.to(device)))
    finally:
        restore_(denoiser)
    return forward, layers


def _foreign_report(
    folder: Path,
    model: VideoModel | None,
    target: Target,
    prompt: str,
    denoiser: nn.Module | None,
    records: Sequence[Record],
) -> VerifyReport:
    """Judge a folder of msModelSlim's, which has no manifest."""
    subject = None
    if model is not None:
        restore_(model.denoiser)
        subject = _captured(model, prompt, table_rows(folder) or _FOREIGN_STEPS)
    elif denoiser is not None:
        restore_(denoiser)
        subject = _Subject(denoiser, StepClock(), records)
    calls = [] if subject is None else [rounded(record, "bfloat16") for record in subject.records]
    found = check_foreign(folder, target, None if subject is None else subject.denoiser, calls)
    problems = (*found.problems, *layer_problems(found.layer_checks))
    logger.info("verify folder=%s problems=%d ignored=%d", folder, len(problems), len(found.view.ignored))
    return VerifyReport(
        ok=not problems,
        problems=problems,
        target=target,
        replaced=len(found.view.replaced),
        ignored=found.view.ignored,
        layers=sum(found.layer_counts.values()),
        layer_counts=found.layer_counts,
        size_bytes=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        layer_checks=found.layer_checks,
    )
