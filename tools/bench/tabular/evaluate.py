"""Evaluate every config of the tabular benchmark's space, and append each to its table.

    OMP_NUM_THREADS=1 python -m tools.bench.tabular.evaluate studies/mini.yaml

Run it again to go on where it was stopped. Times are processor time of this process on one thread, which a busy machine
changes little, and the float control is timed in turns with each config. Nothing is compiled.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from hyquant.calibration.calibrate import quantize_calibrated_
from hyquant.config import LayerSelection, QuantConfig, digest
from hyquant.devices import resolve_device
from hyquant.distributed import Group
from hyquant.latency import LatencyBench, describe, loop_latency, steps_by_mode
from hyquant.layers import select_layers
from hyquant.models.attentions import attention_blocks
from hyquant.plan import QuantPlan, build_plan
from hyquant.quantize import restore_
from metrics.score import score_samples
from search.calibrated import calibrate_for
from search.locks import HostLock
from search.prepare import prepare_judge, prepare_workbench
from search.prompts import load_prompts
from search.sensitivity import ProbeOptions, measure_sensitivity
from search.stages import Stages
from search.study_file import load_study
from search.workbench import Workbench, split_pairs
from spaces.points import points
from tools.bench.tables import environment
from tools.bench.tabular.domain import base_space, order_of_units, tabular_study
from tools.bench.tabular.table import TABLE, About, Row, append_line, read_table

ROUNDS = 5
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--store", type=Path, default=Path("mlruns"), help="where captured inputs are kept")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    config = tabular_study(load_study(args.study)).model_copy(update={"store": str(args.store)})
    prompts = load_prompts(config.workload, args.study.parent)
    device = resolve_device(config.model.device)
    bench = prepare_workbench(
        config, prompts, group=Group(), device=device, cache=args.store / "cache", lock=HostLock()
    )
    names = [group.name for group in bench.model.groups()]
    layers = select_layers(names, LayerSelection(include=config.space.include), model=bench.model.name)
    if not args.table.exists():
        found, _ = measure_sensitivity(config, prompts, ProbeOptions())
        shape = describe(config.deployment)
        about = About(
            layers=layers,
            order=order_of_units(found),
            prompts=prompts.search,
            environment=environment(),
            latency=f"processor time of one thread, not compiled, at {shape}; median of {ROUNDS} rounds in turns",
        )
        append_line(args.table, about)
    done = {row.digest for row in read_table(args.table).rows}
    prepare_judge(bench, Stages(Group()))
    timer = LatencyBench(bench.model, config.deployment, compile=False)
    for _, point in points(base_space(layers), num_steps=config.workload.settings.num_steps):
        if digest(point) not in done:
            append_line(args.table, evaluated(bench, timer, point))
            done.add(digest(point))
            print(len(done), flush=True)


def evaluated(bench: Workbench, timer: LatencyBench, config: QuantConfig) -> Row:
    """Quantize, render, score and time one config; the denoiser is in float again on return."""
    model, settings = bench.model, bench.config.workload.settings
    blocks = attention_blocks(model.denoiser)
    plan = build_plan(model.groups(), config, num_steps=settings.num_steps, model=model.name, attentions=blocks)
    assert bench.embedder is not None, "the judge is loaded"
    started = time.process_time()
    found = calibrate_for(bench, plan, Stages(bench.group))
    try:
        quantize_calibrated_(model.denoiser, plan, found, model.clock)
        videos, render_s = timed(lambda: model.render(*split_pairs(bench.own_pairs()), settings))
        scores = score_samples(bench.samples(videos), bench.config.metrics, bench.embedder)
        trial_s = time.process_time() - started
        ratio, step_s = loop_ratio(timer, plan)
    finally:
        restore_(model.denoiser)
    return Row(
        digest=digest(config),
        config=config,
        scores={name: tuple(float(f"{value:.9g}") for value in values) for name, values in scores.items()},
        ratio=round(ratio, 5),
        step_s={mode: round(seconds, 6) for mode, seconds in step_s.items()},
        render_s=round(render_s, 4),
        trial_s=round(trial_s, 4),
    )


@torch.inference_mode()
def loop_ratio(timer: LatencyBench, plan: QuantPlan) -> tuple[float, dict[str, float]]:
    """Return the loop's processor time over the float control's, and that of one step by mode, in seconds."""
    steps = timer.prepare(plan, warmup=1).steps
    counts = steps_by_mode(plan, timer.shape.num_steps)
    rounds = [{name: timed(step)[1] for name, step in steps.items()} for _ in range(ROUNDS)]
    ratios = [loop_latency(counts, one) / (timer.shape.num_steps * one["control"]) for one in rounds]
    return median(ratios), {name: median(one[name] for one in rounds) for name in steps}


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return what a function returns, and the processor seconds of this process that it took."""
    started = time.process_time()
    value = work()
    return value, time.process_time() - started


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    main()
