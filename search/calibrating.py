"""What a study's captured inputs say about a configuration, as a file that `hyq-search quantize-checkpoint` reads."""

from pathlib import Path

from hyquant.calibration.file import CalibrationInfo, save_calibrated
from hyquant.config import QuantConfig
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from hyquant.errors import CalibrationError
from hyquant.file_modes import make_folder
from hyquant.models.attentions import attention_blocks
from hyquant.models.fingerprint import denoiser_part
from hyquant.needs import needs_attention_stats, needs_stats
from hyquant.plan import build_plan
from search.calibrated import calibrate_for
from search.errors import SearchError
from search.locks import HostLock, at_work
from search.prompts import StudyPrompts
from search.stages import Stages
from search.study import StudyConfig
from search.workbench import build_workbench


def write_statistics(
    config: StudyConfig, prompts: StudyPrompts, point: QuantConfig, out: Path, *, overwrite: bool = False
) -> CalibrationInfo:
    """Calibrate a study's model for one config as a trial does, and save what was found.

    Statistics come from the store's cache, and are measured again if they are not there.

    Args:
        config: The study.
        prompts: Its prompts; those for calibration are used.
        point: What to calibrate for.
        out: The file to make.
        overwrite: Replace a file that is there.

    Raises:
        HyquantError: If the model cannot be loaded, or the config needs no statistics.
        SearchError: If the file is there already or cannot be written.
        TrialFailed: If the model cannot be calibrated.
    """
    if out.exists() and not overwrite:
        raise SearchError(f"{out} exists already; give another path, or --overwrite")
    bench = build_workbench(
        config,
        prompts,
        group=Group(),
        device=resolve_device(config.model.device),
        cache=Path(config.store) / "cache",
        lock=HostLock(),
        shared=config.shared,
    )
    model, num_steps = bench.model, config.workload.settings.num_steps
    plan = build_plan(
        model.groups(),
        point,
        num_steps=num_steps,
        model=model.name,
        target=config.target,
        attentions=attention_blocks(model.denoiser),
    )
    if not (needs_stats(plan) or needs_attention_stats(plan)):
        raise CalibrationError("a config is calibrated for ranges or scales that it stores, but this one stores none")
    with at_work(Path(config.store), "calibrate"):
        found = calibrate_for(bench, plan, Stages(bench.group))
    info = CalibrationInfo(
        config=point,
        num_steps=num_steps,
        denoiser=denoiser_part(model.fingerprint()),
        dtype=str(model.dtype).removeprefix("torch."),
    )
    try:
        make_folder(out.parent)
        save_calibrated(out, found, info)
    except OSError as error:
        raise SearchError(f"{out} cannot be written: {error}; check the folder and its rights") from error
    return info
