"""A whole run on all ranks: load, float pass, quantize, save, render.

Ranks share the work of every denoiser call and of decoding, and every rank sees whole inputs and outputs. For
calibration each works alone on its share of the records; what they find is merged, so all end with one model.
"""

from collections.abc import Sequence
from pathlib import Path

from hyquant.distributed import Group, run_together
from hyquant.models.base import GuidedSettings
from hyquant.models.hunyuan_video import HunyuanVideo
from hyquant.video.arguments import Arguments, Quantization
from hyquant.video.dump import Dump
from hyquant.video.loading import load_video_model
from hyquant.video.prompts import Job
from hyquant.video.ranks import Run
from hyquant.video.render import float_pass, render_videos
from hyquant.video.saving import require_savable
from hyquant.video.weights import plan_weights, quantize_weights_, require_folder, save_weights

FLOAT = "float"


def sample(arguments: Arguments, group: Group) -> list[Path]:
    """Do everything that was asked for, and return the files and folders that were written, on every rank. Collective.

    Raises:
        HyquantError: On every rank, if something cannot be done on one.
    """
    run = Run(arguments, group)
    jobs = run.jobs()
    quantization = arguments.quantization
    floats = _videos(arguments, jobs, FLOAT)
    quantized = [] if quantization is None else _videos(arguments, jobs, quantization.label)
    run.on_rank_0(lambda: _require_room(arguments, [*floats, *quantized]))
    model = run_together(group, lambda: _load(run, jobs))
    weights = sum(parameter.numel() for parameter in model.denoiser.parameters())
    run.say("loaded", weights=weights, dtype=model.dtype, device=model.device, ranks=group.world_size)
    if quantization is None:
        render_videos(run, model, jobs, floats, label=FLOAT)
        return floats
    written = _quantized(run, model, jobs, floats, quantization)
    if not arguments.do_save_video:
        return written
    render_videos(run, model, jobs, quantized, label=quantization.label)
    return [*written, *floats, *quantized]


def _quantized(
    run: Run, model: HunyuanVideo, jobs: Sequence[Job], floats: Sequence[Path], quantization: Quantization
) -> list[Path]:
    """Quantize the denoiser, and return the files of calibration records and weights."""
    num_ranks = run.group.world_size
    plan = run_together(run.group, lambda: plan_weights(run, model, quantization))
    run.say(
        "planned", layers=len(plan.quantized), smoothed=len(plan.smoothed), attentions=len(plan.quantized_attentions)
    )
    dumps = [Dump(quantization.quant_dump_calib_folder, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    records = float_pass(run, model, jobs, floats, dumps[run.group.rank])
    quantize_weights_(run, model, plan, records)
    files = save_weights(run, model, plan, quantization)
    return [path for dump in dumps for path in (dump.note, dump.records)] + files


def _require_room(arguments: Arguments, videos: Sequence[Path]) -> None:
    """Check that what will be written may be, before anything is loaded."""
    if arguments.quantization is not None:
        require_folder(arguments.quantization, overwrite=arguments.overwrite)
    if arguments.do_save_video:
        require_savable(videos, overwrite=arguments.overwrite)


def _videos(arguments: Arguments, jobs: Sequence[Job], label: str) -> list[Path]:
    return [arguments.save_path / job.file_name(label) for job in jobs]


def _load(run: Run, jobs: Sequence[Job]) -> HunyuanVideo:
    """Load the model and embed all prompts, so that a word it does not know is found here."""
    model = load_video_model(run.arguments, num_ranks=run.group.world_size)
    model.embed([job.prompt for job in jobs])
    if isinstance(run.settings, GuidedSettings):
        model.embed([run.settings.negative_prompt])
    return model
