"""From a trial to weights: calibrate and quantize as the trial did, save, and check what was saved."""

from dataclasses import dataclass
from pathlib import Path

from hyquant.calibration.calibrate import quantize_calibrated_
from hyquant.config import QuantConfig
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from hyquant.export import (
    ExportManifest,
    FileNames,
    VerifyReport,
    default_names,
    model_info,
    require_writable,
    save_quantized,
    verify_export,
)
from hyquant.export.layout import model_quant_type
from hyquant.export.manifest import Layout
from hyquant.export.names import for_ranks
from hyquant.models.attentions import attention_blocks
from hyquant.plan import build_plan
from hyquant.quantize import restore_
from search.calibrated import calibrate_for
from search.errors import SearchError
from search.locks import HostLock, at_work
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


@dataclass(frozen=True)
class ExportShape:
    """How an export is laid out in its folder.

    Attributes:
        layout: Whose layer names to write.
        num_ranks: How many copies to write, one per rank; None for one pair of files without a rank in its name.
        part_size_bytes: Most bytes of one tensor file; None for a single file.
    """

    layout: Layout = "original"
    num_ranks: int | None = None
    part_size_bytes: int | None = None

    def names(self, quant_type: str) -> tuple[FileNames, ...]:
        """Return the file names for a type of the description."""
        return for_ranks(default_names(quant_type), self.num_ranks)


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
                f"a pick must be a trial of study {name}, but it has no trial {pick}; see hyq-search front"
            )
    else:
        raise SearchError(f"a pick must be {', '.join(PICK_NAMES)} or a trial's number, but got {pick!r}")
    if row.config is None:
        raise SearchError(f"trial {row.number} must have a config to be picked, but is {row.state}; choose another")
    return row


def export_config(
    config: StudyConfig,
    prompts: StudyPrompts,
    point: QuantConfig,
    out: Path,
    *,
    shape: ExportShape = ExportShape(),
    overwrite: bool = False,
) -> Exported:
    """Quantize a study's model by one config, save it, and verify what was saved.

    Statistics come from the store's cache, and are measured again if they are not there.

    Args:
        config: The study.
        prompts: Its prompts; those for calibration are used.
        point: What to do to the model.
        out: The folder to make.
        shape: How it is laid out in the folder.
        overwrite: Replace an export that is there already.

    Raises:
        HyquantError: If the model cannot be loaded or quantized, or the folder cannot be written.
        TrialFailed: If it cannot be calibrated.
    """
    device = resolve_device(config.model.device)
    cache = Path(config.store) / "cache"
    bench = build_workbench(
        config, prompts, group=Group(), device=device, cache=cache, lock=HostLock(), shared=config.shared
    )
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
    names = shape.names(model_quant_type(plan))
    require_writable(
        plan,
        out,
        layout=shape.layout,
        target=config.target,
        overwrite=overwrite,
        names=names,
        part_size_bytes=shape.part_size_bytes,
    )
    with at_work(Path(config.store), "export"):
        found = calibrate_for(bench, plan, Stages(bench.group))
    quantize_calibrated_(model.denoiser, plan, found, model.clock)
    try:
        info = model_info(model)
        manifest = save_quantized(
            model.denoiser,
            plan,
            out,
            model=info,
            layout=shape.layout,
            target=config.target,
            overwrite=overwrite,
            names=names,
            part_size_bytes=shape.part_size_bytes,
        )
    finally:
        restore_(model.denoiser)
    return Exported(folder=out, manifest=manifest, report=verify_export(out, model))
