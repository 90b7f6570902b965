"""What one rank keeps warm between trials: model, calibration statistics, float videos, judge.

A trial then pays for quantization, rendering, scores and latency and for nothing else. Prompts are cut over the ranks;
statistics are merged and known to every rank, videos are gathered on rank 0, which alone holds the judge.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor

from hyquant.attention.stats import HeadStats
from hyquant.calibration.capture import capture_records, reference_clips
from hyquant.calibration.observe import observe
from hyquant.calibration.packing import pack_stats, unpack_stats
from hyquant.calibration.records import StoredRecords
from hyquant.calibration.sequential import needs_sequential_stats
from hyquant.calibration.shared import open_store
from hyquant.calibration.stats import GroupStats
from hyquant.calibration.store import Entry, Store
from hyquant.config import digest
from hyquant.devices.base import Device
from hyquant.distributed import Group, merge_stats, shard
from hyquant.latency import LatencyBench
from hyquant.models import load_model
from hyquant.models.base import Record, VideoModel
from hyquant.models.names import LayerGroup
from hyquant.observers import OBSERVERS
from hyquant.plan import QuantPlan
from hyquant.profile import DenoiserProfile
from hyquant.quantize import needs_histograms, smoothing_multipliers
from metrics.base import Sample
from metrics.embedders import Embedder, load_embedder
from metrics.registry import find_metric
from metrics.score import score_samples
from search.locks import HostLock
from search.metric_names import has_drop
from search.noise_floor import NoiseFloor
from search.prompts import StudyPrompts
from search.result import MetricResult
from search.scoring import metric_results
from search.study import StudyConfig
from spaces.strategy import parts_of

logger = logging.getLogger(__name__)

CALIBRATION_SEED_OFFSET = 1_000_000
"""Calibration and search draw different noise, as they use different prompts."""


@dataclass(frozen=True)
class PatientRecords:
    """Records that step aside for measurements elsewhere after each one; iterate them inside `lock.computing`."""

    records: StoredRecords
    lock: HostLock

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        for record in self.records:
            yield record
            self.lock.let_measurements_pass()


@dataclass
class Workbench:
    """One rank's warm state.

    Attributes:
        calibration: This rank's (prompt, seed) pairs to calibrate on.
        pairs: All (prompt, seed) pairs to render in a trial, whichever rank renders them.
        stats: Statistics over the calibration prompts of all ranks; equal on all ranks.
        scales: Searched smoothing scales by their key in the cache; see `search.scales`.
        head_stats: Statistics of q, k and v by their key in the cache; see `search.attention`.
        references: Float videos of all search prompts on rank 0; none elsewhere.
        float_traces: Latents of this rank's float videos by prompt and seed, [N, E] each; see `hyquant.latents`.
        latency_bench: Times quantizations at the deployment shape on rank 0; None elsewhere.
        embedder: The judge on rank 0; None elsewhere.
        float_results: Metrics of the float videos that need no reference, on rank 0.
        floor: The noise floor of the metrics that need a reference; None if there are none.
        is_judge_ready: Whether float videos and judge are there.
        profile: Where the time of the float denoiser goes, on rank 0; None elsewhere, or if nothing is timed.
    """

    config: StudyConfig
    prompts: StudyPrompts
    group: Group
    device: Device
    model: VideoModel
    cache: Store
    lock: HostLock
    calibration: list[tuple[str, int]]
    pairs: list[tuple[str, int]]
    stats: dict[str, GroupStats] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    head_stats: dict[str, dict[str, HeadStats]] = field(default_factory=dict)
    references: list[Tensor] = field(default_factory=list)
    float_traces: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    latency_bench: LatencyBench | None = None
    embedder: Embedder | None = None
    float_results: dict[str, MetricResult] = field(default_factory=dict)
    floor: NoiseFloor | None = None
    is_judge_ready: bool = False
    profile: DenoiserProfile | None = None

    def records(self) -> "PatientRecords":
        """Return this rank's captured denoiser inputs, cached if they are there; call it inside `lock.computing`.

        The denoiser must be in float and must not be observed. Records are read when they are iterated. Measurements
        elsewhere may pass between two prompts, and later, while records are iterated, between two of them.
        """
        prompts, seeds = split_pairs(self.calibration)
        settings, step_aside = self.config.workload.settings, self.lock.let_measurements_pass
        records = capture_records(self.model, prompts, seeds, settings, self.cache, on_prompt=step_aside)
        return PatientRecords(records, self.lock)

    def observe(
        self, groups: Sequence[LayerGroup], mul: Mapping[str, Tensor] | None = None, *, histograms: bool = False
    ) -> dict[str, GroupStats]:
        """Return statistics over this rank's records, none if it has no prompt; measurements may pass between two
        records.

        Args:
            groups: What to watch.
            mul: What inputs are multiplied by, by group name.
            histograms: Whether to count values too.
        """
        if not self.calibration:
            return {}
        with self.lock.computing():
            records = self.records()  # captured before the denoiser is watched, or capturing would be observed too
            return observe(self.model.denoiser, groups, records, self.model.clock, mul=mul, histograms=histograms)

    @property
    def has_first_record(self) -> bool:
        """Say whether the first record of all ranks is this rank's."""
        first = (self.prompts.calibration[0], calibration_seeds(self.config.workload.seed, 1)[0])
        return self.calibration[:1] == [first]

    @property
    def device_index(self) -> int:
        """Return which device of its kind the model is on."""
        return self.model.device.index or 0

    def has_stats(self, *, histograms: bool) -> bool:
        """Say whether there are statistics, and histograms among them if those are asked for."""
        return bool(self.stats) and not (histograms and any(group.histogram is None for group in self.stats.values()))

    def own_pairs(self, start: int = 0, end: int | None = None) -> list[tuple[str, int]]:
        """Return this rank's share of some of the pairs, of all by default."""
        return shard(self.pairs[start:end], self.group.rank, self.group.world_size)

    def samples(self, videos: Sequence[Tensor], start: int = 0) -> list[Sample]:
        """Put the videos of successive pairs, from `start` on, together with their prompts and float videos."""
        end = start + len(videos)
        parts = zip(self.pairs[start:end], videos, self.references[start:end], strict=True)
        return [Sample(prompt=prompt, video=video, reference=reference) for (prompt, _), video, reference in parts]


def build_workbench(
    config: StudyConfig,
    prompts: StudyPrompts,
    *,
    group: Group,
    device: Device,
    cache: Path,
    lock: HostLock,
    shared: str | Path | None = None,
) -> Workbench:
    """Load the model, and cut calibration and search prompts over the ranks. No collective call.

    `shared` is a folder of all hosts that the cache fetches from and gives to; None for none.
    """
    model_config, seed = config.model, config.workload.seed
    model = load_model(model_config.kind, model_config.source, device=model_config.device, dtype=model_config.dtype)
    is_first = group.rank == 0
    latency_bench = LatencyBench(model, config.deployment, compile=config.latency.compile) if is_first else None
    calibration = list(zip(prompts.calibration, calibration_seeds(seed, len(prompts.calibration)), strict=True))
    pairs = list(zip(prompts.search, search_seeds(seed, len(prompts.search)), strict=True))
    return Workbench(
        config=config,
        prompts=prompts,
        group=group,
        device=device,
        model=model,
        cache=open_store(cache, shared),
        lock=lock,
        calibration=shard(calibration, group.rank, group.world_size),
        pairs=pairs,
        latency_bench=latency_bench,
    )


def calibration_seeds(seed: int, count: int) -> list[int]:
    """Return the seed of each calibration prompt."""
    return [seed + CALIBRATION_SEED_OFFSET + index for index in range(count)]


def search_seeds(seed: int, count: int) -> list[int]:
    """Return the seed of each search prompt; every trial and the float video of a prompt use the same."""
    return [seed + index for index in range(count)]


def wants_histograms(bench: Workbench, plan: QuantPlan) -> bool:
    """Say whether the shared statistics need histograms, for this plan or some other point of the study's space."""
    space = bench.config.space
    stores_ranges = any(parts_of(strategy).stores_ranges for strategy in space.strategies)
    counts_values = any(OBSERVERS[act_method].needs_histogram for act_method in space.act_methods)
    cuts_values = any(percentile != "none" for percentile in space.percentiles)
    takes_them = needs_histograms(plan) and not needs_sequential_stats(plan)
    return takes_them or (stores_ranges and (counts_values or cuts_values))


def stored_stats(bench: Workbench, *, histograms: bool) -> dict[str, GroupStats] | None:
    """Return the statistics of this model and these prompts from the cache, if they are there."""
    entry = bench.cache.get(stats_key(bench, histograms=histograms))
    return None if entry is None else unpack_stats(entry)


def observe_shard(bench: Workbench, *, histograms: bool) -> dict[str, GroupStats]:
    """Return statistics over this rank's records: one float pass. No collective call."""
    return bench.observe(bench.model.groups(), histograms=histograms)


def merge_shards(bench: Workbench, own: dict[str, GroupStats], *, histograms: bool) -> None:
    """Set the statistics of all ranks, and store them. Collective."""
    bench.stats = merge_stats(own, bench.group)
    if bench.group.rank == 0:
        entry: Entry = pack_stats(bench.stats)
        bench.cache.keep(stats_key(bench, histograms=histograms), entry.tensors, entry.meta)


def observe_smoothed_shard(
    bench: Workbench, plan: QuantPlan, *, scales: Mapping[str, Tensor] | None = None
) -> dict[str, GroupStats]:
    """Return statistics of the inputs a plan has smoothed, over this rank's records. No collective call."""
    multipliers = smoothing_multipliers(bench.model.denoiser, plan, bench.stats, scales=scales)
    smoothed = {layer.name for layer in plan.smoothed}
    groups = [group for group in bench.model.groups() if group.name in smoothed]
    return bench.observe(groups, multipliers, histograms=needs_histograms(plan))


def capture_shard(bench: Workbench) -> PatientRecords:
    """Return this rank's records, to be iterated in `run_pass`. The denoiser must be in float. No collective call."""
    with bench.lock.computing():
        return bench.records()


def run_pass(bench: Workbench, own_pass: Callable[[], dict[str, GroupStats]]) -> dict[str, GroupStats]:
    """Return what a pass over this rank's records observes, nothing if it has no prompt. No collective call."""
    if not bench.calibration:
        return {}
    with bench.lock.computing():
        return own_pass()


def render_references(bench: Workbench) -> list[Tensor]:
    """Return the float videos of this rank's search prompts, from the cache if they are there. No collective call."""
    settings = bench.config.workload.settings
    videos: list[Tensor] = []
    with bench.lock.computing():
        own = bench.own_pairs()
        for start in range(0, len(own), settings.batch_size):
            prompts, seeds = split_pairs(own[start : start + settings.batch_size])
            clips = reference_clips(bench.model, prompts, seeds, settings, bench.cache)
            videos += [clip.video for clip in clips]
            for prompt, seed, clip in zip(prompts, seeds, clips, strict=True):
                bench.float_traces[prompt, seed] = clip.latents
            bench.lock.let_measurements_pass()
    return videos


def gather_videos(bench: Workbench, own: Sequence[Tensor]) -> list[Tensor]:
    """Return the videos of all search prompts in their order on rank 0, none elsewhere. Collective."""
    parts = bench.group.gather_tensors({f"{index:06d}": video for index, video in enumerate(own)})
    return [part[name] for part in parts or () for name in sorted(part)]


def load_judge(bench: Workbench) -> None:
    """Load the judge and score the float videos, on rank 0. No collective call."""
    if bench.group.rank == 0:
        judge = bench.config.judge
        if bench.embedder is None:
            bench.embedder = load_embedder(judge.model, judge.pretrained, view=judge.view, device=bench.model.device)
        names = [name for name in bench.config.metrics if has_drop(find_metric(name))]
        scores = score_samples(bench.samples(bench.references), names, bench.embedder)
        bench.float_results = metric_results(scores, {}, prompts=[prompt for prompt, _ in bench.pairs])


def stats_key(bench: Workbench, *, histograms: bool = False) -> str:
    """Return the key of this model's and these prompts' statistics in the cache."""
    workload = bench.config.workload
    seeds = calibration_seeds(workload.seed, len(bench.prompts.calibration))
    identity: dict[str, JsonValue] = {
        "model": bench.model.fingerprint(),
        "device": str(bench.model.device.type),
        "prompts": list(bench.prompts.calibration),
        "seeds": list(seeds),
        "settings": workload.settings.model_dump(mode="json", exclude={"batch_size"}),
        "histograms": histograms,
    }
    return f"stats-{digest(identity, length=32)}"


def split_pairs(pairs: Sequence[tuple[str, int]]) -> tuple[list[str], list[int]]:
    """Return the prompts and the seeds of pairs."""
    return [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
