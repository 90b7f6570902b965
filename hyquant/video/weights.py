"""Quantized weights of a run: planned before anything is rendered, then calibrated, quantized and saved."""

import logging
from pathlib import Path

import torch

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.calibration.records import StoredRecords
from hyquant.distributed import Group
from hyquant.export.folder import check_target
from hyquant.export.layout import model_quant_type
from hyquant.export.manifest import model_info
from hyquant.export.names import MANIFEST_NAME, FileNames, default_names, for_ranks
from hyquant.export.writer import is_export_file, require_writable, save_quantized
from hyquant.models.attentions import attention_blocks
from hyquant.models.hunyuan_video import HunyuanVideo
from hyquant.plan import QuantPlan, build_plan
from hyquant.video.arguments import Quantization
from hyquant.video.ranks import Run
from hyquant.video.recipe import quant_config

logger = logging.getLogger(__name__)


def require_folder(quantization: Quantization, *, overwrite: bool) -> None:
    """Check that the weights' folder may be made or replaced, before a model is loaded for it.

    Raises:
        ExportError: If not.
    """
    folder = quantization.quant_weight_save_folder
    check_target(folder, mark=MANIFEST_NAME, overwrite=overwrite, is_ours=is_export_file)


def plan_weights(run: Run, model: HunyuanVideo, quantization: Quantization) -> QuantPlan:
    """Decide what happens to every layer, and check on rank 0 that the result can be saved. No collective call.

    Raises:
        ConfigError: If the target cannot execute it.
        LayerMatchError: If the model lacks the layers.
        ExportError: If it cannot be saved.
    """
    num_steps = run.arguments.infer_steps
    plan = build_plan(
        model.groups(),
        quant_config(
            quantization,
            num_steps=num_steps,
            deploy_dtype="float16" if model.dtype == torch.float16 else "bfloat16",
        ),
        num_steps=num_steps,
        model=model.name,
        target=quantization.target,
        attentions=attention_blocks(model.denoiser),
    )
    if run.group.rank > 0:
        return plan
    require_writable(
        plan,
        quantization.quant_weight_save_folder,
        target=quantization.target,
        overwrite=run.arguments.overwrite,
        names=names_of(plan, run.group),
    )
    if quantization.timestep_sep is not None and quantization.timestep_sep >= num_steps:
        logger.warning(
            "--timestep-sep %d lies beyond the %d steps, so every step is dynamic", quantization.timestep_sep, num_steps
        )
    return plan


def quantize_weights_(run: Run, model: HunyuanVideo, plan: QuantPlan, records: StoredRecords) -> None:
    """Calibrate on the records of all ranks and quantize the denoiser; all ranks end with the same one. Collective.

    Raises:
        CalibrationError: If activations are not finite.
    """
    found = calibrate(model.denoiser, plan, records, model.clock, group=run.group)
    run.say("calibrated", layers=len(found.stats), attentions=len(found.attention_stats or {}))
    report = quantize_calibrated_(model.denoiser, plan, found, model.clock)
    run.say(
        "quantized",
        layers=len(report.layers),
        attentions=len(report.attentions),
        float_bytes=report.float_bytes,
        weight_bytes=report.weight_bytes,
        worst_weight_sqnr_db=f"{min(layer.weight_sqnr_db for layer in report.layers):.1f}",
    )


def save_weights(run: Run, model: HunyuanVideo, plan: QuantPlan, quantization: Quantization) -> list[Path]:
    """Write the weights from rank 0, a pair of files for every rank, and return the files. Collective.

    Raises:
        ExportError: As `save_quantized`.
    """
    folder, names = quantization.quant_weight_save_folder, names_of(plan, run.group)

    def save() -> None:
        save_quantized(
            model.denoiser,
            plan,
            folder,
            model=model_info(model),
            target=quantization.target,
            overwrite=run.arguments.overwrite,
            names=names,
        )

    run.on_rank_0(save)
    run.say("saved", folder=folder, type=model_quant_type(plan), pairs=len(names))
    return [folder / name for pair in names for name in (pair.weights, pair.description)] + [folder / MANIFEST_NAME]


def names_of(plan: QuantPlan, group: Group) -> tuple[FileNames, ...]:
    """Return the files of the weights: one pair for one rank, else a pair with the number of each."""
    return for_ranks(default_names(model_quant_type(plan)), None if group.world_size == 1 else group.world_size)
