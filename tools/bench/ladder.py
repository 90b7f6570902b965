"""Whether a measured ladder keeps the right layers in float: rungs against random sets of as many layers, rendered.

    python -m tools.bench.ladder studies/mini.yaml --store mlruns

Prints how bands rank under other prompts, steps and schemes (Spearman's rank correlation with the map that a study
takes), and for each rung the PSNR against the float videos beside that of random exclusion sets of the same size.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from torch import Tensor

from hyquant.config import LayerSelection, QuantConfig, W8A8Dynamic
from hyquant.models import load_model
from hyquant.models.base import VideoModel
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, restore_
from hyquant.sensitivity.bands import patterns_of
from hyquant.sensitivity.ladder import ladder
from hyquant.sensitivity.map import by_band
from metrics.base import Sample
from metrics.hashing import HashingEmbedder
from metrics.psnr_db import psnr_db
from search.prompts import StudyPrompts, load_prompts
from search.sensitivity import ProbeOptions, measure_sensitivity
from search.study import StudyConfig
from search.study_file import load_study
from search.workbench import search_seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--draws", type=int, default=5)
    args = parser.parse_args()
    config = load_study(args.study).model_copy(update={"store": str(args.store)})
    prompts = load_prompts(config.workload, args.study.parent)
    print_ranks(config, prompts)
    print_rungs(config, prompts, num_prompts=args.prompts, num_draws=args.draws)


def print_ranks(config: StudyConfig, prompts: StudyPrompts) -> None:
    own = by_band(measure_sensitivity(config, prompts, ProbeOptions())[0])
    others = prompts.model_copy(update={"calibration": tuple(reversed(prompts.calibration))})
    num_steps = config.workload.settings.num_steps
    for label, options, given in (
        ("one prompt", ProbeOptions(num_prompts=1), prompts),
        ("two other prompts", ProbeOptions(), others),
        ("every step", ProbeOptions(num_ranges=num_steps), prompts),
        ("static ranges", ProbeOptions(scheme="static"), prompts),
        ("weights alone", ProbeOptions(scheme="w8a16"), prompts),
    ):
        found = by_band(measure_sensitivity(config, given, options)[0])
        ranks = [np.argsort(np.argsort([values[band] for band in own])) for values in (own, found)]
        print(f"{label}: rank correlation {np.corrcoef(*ranks)[0, 1]:.3f}", flush=True)
    measure_sensitivity(config, prompts, ProbeOptions())  # which is the study's again


def print_rungs(config: StudyConfig, prompts: StudyPrompts, *, num_prompts: int, num_draws: int) -> None:
    steps = ladder(measure_sensitivity(config, prompts, ProbeOptions())[0])
    model = load_model(config.model.kind, config.model.source, device=config.model.device, dtype=config.model.dtype)
    shown, draw = prompts.search[:num_prompts], random.Random(0)
    floats = videos_of(model, config, shown)
    for rung in range(steps.height + 1):
        excluded = steps.excluded(rung)
        sets = [excluded, *(draw.sample(steps.layers, len(excluded)) for _ in range(num_draws if rung else 0))]
        values = [quality(model, config, shown, floats, patterns_of(layers, steps.layers)) for layers in sets]
        beside = f", random sets {min(values[1:]):.1f} to {max(values[1:]):.1f} dB" if rung else ""
        print(f"rung {rung}, {len(excluded)} layers in float: {values[0]:.1f} dB{beside}", flush=True)


def quality(
    model: VideoModel, config: StudyConfig, prompts: Sequence[str], floats: Sequence[Tensor], exclude: tuple[str, ...]
) -> float:
    """Return the mean PSNR in decibels against the float videos with everything else in dynamic int8."""
    layers = LayerSelection(include=config.space.include, exclude=exclude)
    num_steps = config.workload.settings.num_steps
    plan = build_plan(model.groups(), QuantConfig(linear=W8A8Dynamic(), layers=layers), num_steps=num_steps)
    quantize_(model.denoiser, plan, {}, model.clock)
    try:
        videos = videos_of(model, config, prompts)
    finally:
        restore_(model.denoiser)
    samples = [Sample(*each) for each in zip(prompts, videos, floats, strict=True)]
    return mean(psnr_db(sample, HashingEmbedder()) for sample in samples)  # which this metric does not ask


def videos_of(model: VideoModel, config: StudyConfig, prompts: Sequence[str]) -> list[Tensor]:
    workload = config.workload
    return model.render(prompts, search_seeds(workload.seed, len(prompts)), workload.settings)


if __name__ == "__main__":
    main()
