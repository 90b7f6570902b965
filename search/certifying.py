"""Certify an export: render held-out prompts in float and with the exported files, score both, and judge the margins.

The float clips are rendered first and kept in the store by content; then the files are loaded as they lie on the
disk, and each batch of the candidate's clips is scored as it is rendered, so that no more than one batch is in
memory.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor

from hyquant.calibration.capture import cache_key, reference_videos
from hyquant.calibration.store import Store
from hyquant.config import digest
from hyquant.devices.runtime import runtime_versions
from hyquant.errors import ConfigError, ExportError
from hyquant.export import load_quantized, model_info, read_manifest
from hyquant.export.manifest import ExportManifest
from hyquant.export.reader import require_same_denoiser
from hyquant.latency import describe_device, kernels_of
from hyquant.models import load_model
from hyquant.models.base import RenderSettings, VideoModel
from hyquant.quantize import restore_
from hyquant.software import software_versions
from metrics.base import Sample
from metrics.embedders import Embedder, load_embedder
from metrics.registry import find_metric
from metrics.score import score_samples
from search.certificate import Certificate, Pair, Software, export_digests
from search.certified_clips import CERTIFIED, about_clip
from search.clip_space import require_room, require_writable, writing_to
from search.errors import SearchError
from search.judging import Scores, judged
from search.locks import HostLock, at_work
from search.margins import CertificateConfig
from search.study import JudgeConfig, StudyConfig

logger = logging.getLogger(__name__)

HELDOUT_SEED_OFFSET = 2_000_000
"""Certificates draw noise of their own, as they use prompts of their own."""

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A float model, the export to be judged and what is rendered with both.

    Attributes:
        model: The float model; in float before and after.
        export: Folder of the export.
        pairs: Held-out prompts and seeds.
        settings: Clip and steps.
        judge: Embeds videos and prompts.
        clips: Where clips are kept by content: float ones to be scored against, both to be compared with later ones.
        lock: Lets measurements elsewhere on the host pass between denoising steps.
        software: What clips in the store were rendered with; None for this process's own.
    """

    model: VideoModel
    export: Path
    pairs: tuple[Pair, ...]
    settings: RenderSettings
    judge: Embedder
    clips: Store
    lock: HostLock = field(default_factory=HostLock)
    software: Mapping[str, str] | None = None

    def batches(self) -> Iterator[tuple[list[str], list[int]]]:
        """Yield prompts and seeds of one batch after the other."""
        for start in range(0, len(self.pairs), self.settings.batch_size):
            pairs = self.pairs[start : start + self.settings.batch_size]
            yield [pair.prompt for pair in pairs], [pair.seed for pair in pairs]


def certify_export(
    config: StudyConfig,
    certificate: CertificateConfig,
    heldout: Sequence[str],
    export: Path,
    *,
    on_progress: OnProgress = lambda _: None,
) -> Certificate:
    """Render, score and judge an export by a study's margins; nothing is written but clips in the store's cache.

    Those of the float model are shared with trials, those of the candidate are for `search.repeating`.

    Args:
        config: The study: model, judge, workload and store.
        certificate: Its section `certificate`.
        heldout: The prompts that section names.
        export: Folder of the export.
        on_progress: Told what is being done, one line at a time.

    Raises:
        HyquantError: If the folder is no intact export of the study's model.
        ConfigError: If the export has another number of steps than the study renders.
        MetricError: If the weights of a metric are missing.
        SearchError: If the export's folder is read-only, the store has no room, or the float clips cannot be scored.
    """
    settings = certificate.settings or config.workload.settings
    names = [margin.metric for margin in certificate.margins]
    require_weights(names)
    _require_steps(export, settings)
    require_writable(export)
    files = export_digests(export)
    manifest = read_manifest(export)
    _require_intact(export, manifest, files)
    model = load_model(config.model.kind, config.model.source, device=config.model.device, dtype=config.model.dtype)
    require_same_denoiser(model.denoiser, manifest)  # before hours of float clips
    subject = Subject(
        model=model,
        export=export,
        pairs=heldout_pairs(heldout, certificate.seeds_per_prompt, config.workload.seed),
        settings=settings,
        judge=load_judge(config.judge, model),
        clips=ClipStore(Path(config.store) / "cache"),
    )
    require_room(subject.clips.root, settings, num_missing_clips(subject))
    with at_work(Path(config.store), "certify"):
        scores = score_pairs(subject, names, on_progress)
    return judged(
        Certificate(
            verdict="INCONCLUSIVE",
            new_prompts=None,
            metrics=(),
            alpha=certificate.alpha,
            study=config.name,
            created=now(),
            pairs=subject.pairs,
            prompts_digest=digest(list(heldout)),
            settings=settings,
            judge=config.judge,
            model=model_info(model),
            config=manifest.config,
            software=software_of(model, scores),
            files=files,
        ),
        certificate.margins,
        scores,
    )


def heldout_pairs(prompts: Sequence[str], seeds_per_prompt: int, seed: int) -> tuple[Pair, ...]:
    """Return every prompt with its seeds, prompt by prompt; no two pairs share a seed."""
    first = seed + HELDOUT_SEED_OFFSET
    return tuple(
        Pair(prompt=prompt, seed=first + index * seeds_per_prompt + repeat)
        for index, prompt in enumerate(prompts)
        for repeat in range(seeds_per_prompt)
    )


def _require_intact(export: Path, manifest: ExportManifest, digests: Mapping[str, str]) -> None:
    """Refuse files that are not what their manifest says, before anything is rendered.

    Raises:
        ExportError: If one differs.
    """
    for name, info in manifest.files.items():
        if digests[name] != info.sha256:
            raise ExportError(
                f"{export} must be intact, but {name} has other bytes than its manifest says; copy it again"
            )


def require_weights(names: Sequence[str]) -> None:
    """Look for the published weights that metrics read, before anything is rendered.

    Raises:
        MetricError: If some are missing.
    """
    for name in names:
        find_metric(name).find_weights()


def num_missing_clips(subject: Subject) -> int:
    """Return how many clips of both models are still to be kept."""
    return sum(
        not subject.clips.holds(key_of(subject, pair.prompt, pair.seed))
        for pair in subject.pairs
        for key_of in (float_key, candidate_key)
    )


def load_judge(judge: JudgeConfig, model: VideoModel) -> Embedder:
    """Load a study's judge beside a model."""
    return load_embedder(judge.model, judge.pretrained, view=judge.view, device=model.device)


def score_pairs(subject: Subject, names: Sequence[str], on_progress: OnProgress) -> Scores:
    """Render and score all pairs; the model is in float again afterwards.

    Raises:
        HyquantError: If the export cannot be loaded into the model.
        SearchError: If a float clip has no finite score, or clips cannot be kept.
    """
    with writing_to(subject.clips.root):
        return _scores(subject, names, on_progress)


def _scores(subject: Subject, names: Sequence[str], on_progress: OnProgress) -> Scores:
    float_values = _score_floats(subject, names, on_progress)
    model, values = subject.model, {name: list[float]() for name in names}
    load_quantized(model.denoiser, subject.export, model.clock)
    try:
        kernels = kernels_of(model.denoiser)
        for number, (prompts, seeds) in enumerate(subject.batches()):
            on_progress(f"quantized clips from {number * subject.settings.batch_size + 1} of {len(subject.pairs)}")
            with subject.lock.computing():
                videos = model.render(prompts, seeds, subject.settings, on_step=subject.lock.let_measurements_pass)
                floats = [_float_clip(subject, *pair) for pair in zip(prompts, seeds, strict=True)]
                for prompt, seed, video in zip(prompts, seeds, videos, strict=True):
                    about = about_clip(prompt, float_key(subject, prompt, seed))
                    subject.clips.put(candidate_key(subject, prompt, seed), {"video": video}, about)
                samples = [Sample(*parts) for parts in zip(prompts, videos, floats, strict=True)]
                for name, scored in score_samples(samples, names, subject.judge).items():
                    values[name] += scored
    finally:
        restore_(model.denoiser)
    logger.info("certified export=%s pairs=%d kernels=%s", subject.export, len(subject.pairs), kernels)
    return Scores(values=values, float_values=float_values, kernels=kernels)


def software_of(model: VideoModel, scores: Scores) -> Software:
    """Describe what renders and judges here."""
    packages = {**software_versions(), **runtime_versions(model.device)}
    return Software(packages=packages, device=describe_device(model.device), kernels=scores.kernels)


def now() -> str:
    """Return the present day and time in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _score_floats(subject: Subject, names: Sequence[str], on_progress: OnProgress) -> dict[str, list[float]]:
    """Render the float clips that the store lacks, and score each against itself."""
    values = {name: list[float]() for name in names}
    restore_(subject.model.denoiser)
    for number, (prompts, seeds) in enumerate(subject.batches()):
        on_progress(f"float clips from {number * subject.settings.batch_size + 1} of {len(subject.pairs)}")
        with subject.lock.computing():
            videos = reference_videos(
                subject.model,
                prompts,
                seeds,
                subject.settings,
                subject.clips,
                on_step=subject.lock.let_measurements_pass,
            )
            samples = [Sample(prompt, video, video) for prompt, video in zip(prompts, videos, strict=True)]
            for name, scored in score_samples(samples, names, subject.judge).items():
                values[name] += scored
    for name, scored in values.items():
        if lost := sum(not math.isfinite(value) for value in scored):
            raise SearchError(
                f"float clips must have finite scores, but {name} has none for {lost} of {len(scored)}; take that "
                "metric out of the margins or look at the float model"
            )
    return values


def float_key(subject: Subject, prompt: str, seed: int) -> str:
    """Return the key of a float clip in a store, which trials use too."""
    return cache_key("video", subject.model, prompt, seed, subject.settings, software=subject.software)


class ClipStore(Store):
    """A store whose clips are needed again: a disk that does not take one is an error."""

    def keep(self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, JsonValue]) -> None:
        """Write an entry."""
        self.put(key, tensors, meta)


def candidate_key(subject: Subject, prompt: str, seed: int) -> str:
    """Return the key of a candidate's clip in a store: it depends on the bytes of the export."""
    weights = read_manifest(subject.export).model_dump(mode="json", include={"files"})
    return f"{CERTIFIED}{digest([float_key(subject, prompt, seed), weights], length=32)}"


def _float_clip(subject: Subject, prompt: str, seed: int) -> Tensor:
    """Return a float clip from the store; it cannot be rendered now, because the denoiser is quantized."""
    entry = subject.clips.get(float_key(subject, prompt, seed))
    if entry is None:
        raise SearchError(
            f"float clips must stay in {subject.clips.root} while an export is certified, but that of {prompt!r} is "
            "gone; certify again"
        )
    return entry.tensors["video"]


def _require_steps(export: Path, settings: RenderSettings) -> None:
    num_steps = read_manifest(export).num_steps
    if num_steps != settings.num_steps:
        raise ConfigError(
            f"an export is certified at its own number of steps, but it was made for {num_steps} and the study renders "
            f"{settings.num_steps}; correct certificate.settings"
        )
