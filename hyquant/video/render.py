"""Videos of a run, and the records of the float denoiser that are taken while they are rendered."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from pydantic import JsonValue

from hyquant.calibration.calls import capture_calls
from hyquant.calibration.records import StoredRecords
from hyquant.distributed import run_together
from hyquant.errors import CalibrationError
from hyquant.models.base import RecordSink
from hyquant.models.hunyuan_video import HunyuanVideo
from hyquant.video.dump import Dump, share_of
from hyquant.video.prompts import Job
from hyquant.video.ranks import Run
from hyquant.video.saving import save_video


def render_videos(run: Run, model: HunyuanVideo, jobs: Sequence[Job], paths: Sequence[Path], *, label: str) -> None:
    """Render and save all videos. Collective.

    Raises:
        ConfigError: If the ranks cannot share this model.
        ExportError: If a video cannot be saved.
    """
    with run.shared(model):
        _render(run, model, jobs, paths)
    run.say("rendered", model=label, videos=len(jobs), steps=run.arguments.infer_steps)


def float_pass(run: Run, model: HunyuanVideo, jobs: Sequence[Job], paths: Sequence[Path], dump: Dump) -> StoredRecords:
    """Return this rank's share of the float denoiser's records, and save the float videos if they are asked for.

    Records of an earlier run are used if every rank has its share of the same ones. Collective.

    Raises:
        ConfigError: If the ranks cannot share this model.
        CalibrationError: If records cannot be written, or there are fewer than ranks.
        ExportError: If a video cannot be saved.
    """
    group, num_steps, saves = run.group, run.arguments.infer_steps, run.arguments.do_save_video
    if len(jobs) * num_steps < group.world_size:
        raise CalibrationError(
            f"every rank must have a record to calibrate with, but {len(jobs)} videos of {num_steps} steps are fewer "
            f"than {group.world_size} ranks; give more prompts or steps"
        )
    identity = _identity(run, model, jobs)
    problems = [problem for problem in group.all_gather(dump.problem(identity)) if problem is not None]
    if not problems:
        records = run_together(group, dump.read)
        run.say("calibration records reused", folder=dump.note.parent, share=len(records))
        if saves:
            render_videos(run, model, jobs, paths, label="float")
        return records

    def capture(sink: RecordSink) -> None:
        share = share_of(sink, group)
        if saves:
            _render(run, model, jobs, paths, sink=share)
        else:
            model.capture([job.prompt for job in jobs], [job.seed for job in jobs], run.settings, share)

    run_together(group, dump.prepare)
    with run.shared(model):
        run_together(group, lambda: dump.write(identity, capture))
    records = run_together(group, dump.read)
    run.say(
        f"calibration records captured, because those before are {problems[0]}:",
        folder=dump.note.parent,
        share=len(records),
        steps=num_steps,
        videos=len(jobs) if saves else 0,
    )
    return records


def _render(
    run: Run, model: HunyuanVideo, jobs: Sequence[Job], paths: Sequence[Path], *, sink: RecordSink | None = None
) -> None:
    """Render every job and save it from rank 0; the denoiser's calls go to `sink`."""
    for job, path in zip(jobs, paths, strict=True):
        with nullcontext() if sink is None else capture_calls(model.denoiser, model.clock, sink=sink):
            (video,) = model.render([job.prompt], [job.seed], run.settings)
        run.on_rank_0(partial(save_video, path, video))


def _identity(run: Run, model: HunyuanVideo, jobs: Sequence[Job]) -> dict[str, JsonValue]:
    """Return everything that calibration records depend on."""
    settings = run.settings.model_dump(mode="json", exclude={"batch_size"})
    return {
        "model": model.fingerprint(),
        "dtype": str(model.dtype),
        "num_ranks": run.group.world_size,
        "prompts": [job.prompt for job in jobs],
        "seeds": [job.seed for job in jobs],
        **settings,
    }
