"""The sensitivity map of a study's model: measured probe by probe, kept in the study's store.

    STORE/sensitivity/SUBJECT.json    a finished map under the digest of its subject; several studies may share it
    STORE/sensitivity/SUBJECT.jsonl   probes of a map that is not finished
    STORE/sensitivity/STUDY.study     which map is a study's, and what of the study it holds for

A study whose space has `exclusions: ladder` takes the ladder of its map when it is created, and keeps it: it is part of
what is stored of the study.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError

from hyquant.calibration.capture import capture_records
from hyquant.calibration.store import write_atomically
from hyquant.config import FrozenModel, LayerSelection, LinearScheme, QuantConfig, digest
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from hyquant.layers import select_layers
from hyquant.plan import QuantPlan, build_plan
from hyquant.quantize import needs_stats
from hyquant.sensitivity.bands import bands_of, place_of
from hyquant.sensitivity.cost import probe_cost
from hyquant.sensitivity.files import Journal, load_map, save_map
from hyquant.sensitivity.ladder import ladder
from hyquant.sensitivity.map import SensitivityMap, Subject, rows_of, step_ranges
from hyquant.sensitivity.probe import Prober
from search.errors import SearchError
from search.locks import FileLock, HostLock
from search.prepare import calibrate
from search.prompts import StudyPrompts
from search.stages import Stages
from search.study import StudyConfig
from search.workbench import Workbench, build_workbench, calibration_seeds
from spaces.space import LADDER, with_ladder
from spaces.strategy import LINEAR_KINDS, SchemeName

OnProbe = Callable[[int, int], None]
"""Told how many probes are done, and of how many."""


@dataclass(frozen=True)
class ProbeOptions:
    """How a map is measured.

    Attributes:
        scheme: What a band is quantized to.
        num_ranges: Into how many ranges the steps are cut; the middle step of each is probed.
        num_prompts: How many of the study's calibration prompts are used.
        width: How many adjacent blocks are probed together.
    """

    scheme: SchemeName = "dynamic"
    num_ranges: int = 3
    num_prompts: int = 2
    width: int = 1


class MapOfStudy(FrozenModel):
    """Which map is a study's: the digest of its subject, and that of the study's `probed_part`."""

    subject: str
    part: str


def measure_sensitivity(
    config: StudyConfig, prompts: StudyPrompts, options: ProbeOptions, *, on_probe: OnProbe = lambda done, total: None
) -> tuple[SensitivityMap, Path]:
    """Return the map of a study's model and the path of its file; what was measured before is not measured again.

    Raises:
        HyquantError: If the model cannot be loaded, or a layer cannot be quantized so.
        SearchError: If there are fewer prompts than asked for, or the store cannot be written.
        TrialFailed: If the scheme stores ranges and the model cannot be calibrated.
    """
    if not 1 <= options.num_prompts <= len(prompts.calibration):
        raise SearchError(
            f"probes take 1 to {len(prompts.calibration)} calibration prompts of the study, but got "
            f"{options.num_prompts}; ask for fewer"
        )
    bench = build_workbench(
        config,
        prompts,
        group=Group(),
        device=resolve_device(config.model.device),
        cache=Path(config.store) / "cache",
        lock=HostLock(),
        shared=config.shared,
    )
    subject = _subject(bench, options)
    path = _folder(config) / f"{digest(subject)}.json"
    try:
        with FileLock(Path(config.store) / "locks" / f"sensitivity-{path.stem}.lock").held():
            found = load_map(path) or _finished(bench, subject, path, on_probe)
        about = MapOfStudy(subject=digest(subject), part=digest(probed_part(config, prompts)))
        write_atomically(_pointer(config), about.model_dump_json().encode() + b"\n")
    except OSError as error:
        raise SearchError(f"store {config.store} must be a writable folder, but: {error}; free or move it") from error
    return found, path


def with_measured_ladder(config: StudyConfig, prompts: StudyPrompts) -> StudyConfig:
    """Return a study with the ladder of its map in its space; one that wants none, or has one, as it is.

    Raises:
        SearchError: If no map was measured, or it was measured on something else.
        ConfigError: If a switch or a preset of the space does not fit the ladder.
    """
    if config.space.exclusions != LADDER or config.space.ladder is not None:
        return config
    found = map_of_study(config, prompts)
    return config.model_copy(update={"space": with_ladder(config.space, ladder(found))})


def probed_part(config: StudyConfig, prompts: StudyPrompts) -> JsonValue:
    """Return what of a study decides about its map, as JSON."""
    workload = config.workload
    return {
        "model": config.model.model_dump(mode="json", exclude={"device"}),
        "include": list(config.space.include),
        "prompts": list(prompts.calibration),
        "seed": workload.seed,
        "settings": workload.settings.model_dump(mode="json", exclude={"batch_size"}),
    }


def map_of_study(config: StudyConfig, prompts: StudyPrompts) -> SensitivityMap:
    """Return the stored map of a study.

    Raises:
        SearchError: If no map was measured, or it was measured on something else.
    """
    way_out = "run hyq-search sensitivity first"
    try:
        about = MapOfStudy.model_validate_json(_pointer(config).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise SearchError(
            f"study {config.name} has `exclusions: ladder`, but no sensitivity map of it is in store {config.store}; "
            f"{way_out}"
        ) from error
    if about.part != digest(probed_part(config, prompts)):
        raise SearchError(
            f"the sensitivity map of study {config.name} must be of its model, prompts, seed, settings and layers, but "
            f"one of them has changed since it was measured; {way_out}"
        )
    found = load_map(_folder(config) / f"{about.subject}.json")
    if found is None:
        raise SearchError(f"the sensitivity map {about.subject} of study {config.name} is damaged; {way_out}")
    return found


def _subject(bench: Workbench, options: ProbeOptions) -> Subject:
    model, workload = bench.model, bench.config.workload
    names = [group.name for group in model.groups()]
    included = select_layers(names, LayerSelection(include=bench.config.space.include), model=model.name)
    scheme: LinearScheme = TypeAdapter(LinearScheme).validate_python({"kind": LINEAR_KINDS[options.scheme]})
    prompts, seeds = _prompts_and_seeds(bench, options.num_prompts)
    settings = workload.settings.model_dump(mode="json", exclude={"batch_size"})
    drawn: dict[str, JsonValue] = {"prompts": list(prompts), "seeds": list(seeds), "settings": settings}
    if needs_stats(_plan(bench, scheme)):
        everything = _prompts_and_seeds(bench, len(bench.prompts.calibration))
        drawn["calibrated_on"] = [list(part) for part in everything]
    return Subject(
        model=model.fingerprint(),
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        scheme=scheme,
        prompts=digest(drawn),
        num_prompts=len(prompts),
        num_steps=workload.settings.num_steps,
        ranges=step_ranges(workload.settings.num_steps, options.num_ranges),
        bands=bands_of(included, width=options.width),
    )


def _finished(bench: Workbench, subject: Subject, path: Path, on_probe: OnProbe) -> SensitivityMap:
    """Measure what an earlier run has left, and write the map in place of its journal."""
    journal = Journal(path.with_suffix(".jsonl"))
    found = _measured(bench, subject, journal, on_probe)
    save_map(path, found)
    journal.delete()
    return found


def _measured(bench: Workbench, subject: Subject, journal: Journal, on_probe: OnProbe) -> SensitivityMap:
    model, started = bench.model, time.perf_counter()
    groups = model.groups()
    plan = _plan(bench, subject.scheme)
    if needs_stats(plan):
        calibrate(bench, Stages(bench.group), plan)
    prober = Prober(
        model.denoiser,
        groups,
        subject.bands,
        model.clock,
        scheme=subject.scheme,
        num_steps=subject.num_steps,
        stats=bench.stats,
    )
    steps = {step for part in subject.ranges for step in part.probed}
    prompts, seeds = _prompts_and_seeds(bench, subject.num_prompts)
    step_aside = bench.lock.let_measurements_pass
    with bench.lock.computing():
        settings = bench.config.workload.settings
        captured = capture_records(model, prompts, seeds, settings, bench.cache, on_prompt=step_aside)
        records = [record for record in captured if record.step_index in steps]
        total = len(records) * len(subject.bands)
        known = {one.key for one in journal.measured}
        on_probe(len(known), total)
        for measurement in prober.measure(records, known=known):
            journal.add(measurement)
            on_probe(len(journal.measured), total)
            step_aside()
    stacks = {place.stack for band in subject.bands if (place := place_of(band.layers[0])) is not None}
    places = [place for group in groups if (place := place_of(group.name)) is not None and place.stack in stacks]
    blocks = list(dict.fromkeys(place.block for place in places))
    return SensitivityMap(
        subject=subject,
        rows=rows_of(subject, journal.measured),
        keeps_blocks=bool(prober.keeps_blocks),
        cost=probe_cost(blocks, subject.bands, num_records=len(records)),
        seconds=time.perf_counter() - started,
    )


def _plan(bench: Workbench, scheme: LinearScheme) -> QuantPlan:
    """Return the plan that quantizes everything the study may quantize."""
    return build_plan(
        bench.model.groups(),
        QuantConfig(linear=scheme, layers=LayerSelection(include=bench.config.space.include)),
        num_steps=bench.config.workload.settings.num_steps,
        model=bench.model.name,
    )


def _prompts_and_seeds(bench: Workbench, count: int) -> tuple[Sequence[str], list[int]]:
    return bench.prompts.calibration[:count], calibration_seeds(bench.config.workload.seed, count)


def _folder(config: StudyConfig) -> Path:
    return Path(config.store) / "sensitivity"


def _pointer(config: StudyConfig) -> Path:
    return _folder(config) / f"{config.name}.study"
