"""From a trial to weights: calibrate and quantize as the trial did, save, and check what was saved."""

from dataclasses import dataclass
from pathlib import Path

from hyquant.calibration.calibrate import quantize_calibrated_
from hyquant.config import QuantConfig
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from hyquant.export import ExportManifest, VerifyReport, model_info, save_quantized, verify_export
from hyquant.export.manifest import Layout
from hyquant.models.attentions import attention_blocks
from hyquant.plan import build_plan
from hyquant.quantize import restore_
from search.calibrated import calibrate_for
from search.errors import SearchError
from search.locks import HostLock
from search.overview import Overview, TrialRow
from search.picks import PICK_NAMES
from search.prompts import StudyPrompts
from search.stages import Stages
from search.study import StudyConfig
from search.workbench import (
    build_workbench,
)


@dataclass(frozen=True)
class Exported:
    """A written export and the verdict over it."""

    folder: Path
    manifest: ExportManifest
    report: VerifyReport


def find_pick(overview: Overview, pick: str) -> TrialRow:
    """Return the trial a user asks for by "safe", "balanced", "fast" or its number.

    Raises:
        SearchError: If there is no such trial, or it has no config.
    """
    name = overview.config.name
    if pick in PICK_NAMES:
        row = overview.picked(pick)
        if row is None:
            raise SearchError(f"pick {pick} needs a complete trial, but study {name} offers none; run it further")
    elif pick.isdecimal():
        row = overview.row(int(pick))
        if row is None:
            raise SearchError(
                f"--pick must be a trial of study {name}, but it has no trial {pick}; see hyq-search front"
            )
    else:
        raise SearchError(f"--pick must be {', '.join(PICK_NAMES)} or a trial's number, but got {pick!r}")
    if row.config is None:
        raise SearchError(f"trial {row.number} must have a config to be exported, but is {row.state}; choose another")
    return row


def export_config(
    config: StudyConfig,
    prompts: StudyPrompts,
    point: QuantConfig,
    out: Path,
    *,
    layout: Layout = "original",
    overwrite: bool = False,
) -> Exported:
    """Quantize a study's model by one config, save it, and verify what was saved.

    Statistics come from the store's cache, and are measured again if they are not there.

    Args:
        config: The study.
        prompts: Its prompts; those for calibration are used.
        point: What to do to the model.
        out: The folder to make.
        layout: Whose layer names to write.
        overwrite: Replace an export that is there already.

    Raises:
        HyquantError: If the model cannot be loaded or quantized, or the folder cannot be written.
        TrialFailed: If it cannot be calibrated.
    """
    device = resolve_device(config.model.device)
    cache = Path(config.store) / "cache"
    bench = build_workbench(config, prompts, group=Group(), device=device, cache=cache, lock=HostLock())
    model = bench.model
    num_steps = config.workload.settings.num_steps
    plan = build_plan(
        model.groups(),
        point,
        num_steps=num_steps,
        model=model.name,
        target=config.target,
        attentions=attention_blocks(model.denoiser),
    )
    found = calibrate_for(bench, plan, Stages(bench.group))
    quantize_calibrated_(model.denoiser, plan, found, model.clock)
    try:
        info = model_info(model)
        manifest = save_quantized(
            model.denoiser, plan, out, model=info, layout=layout, target=config.target, overwrite=overwrite
        )
    finally:
        restore_(model.denoiser)
    return Exported(folder=out, manifest=manifest, report=verify_export(out, model))
