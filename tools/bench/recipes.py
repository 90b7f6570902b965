"""Time the presets of a study at its deployment shape, on every kernel asked for, without rendering or scoring.

    python -m tools.bench.recipes studies/mini.yaml --kernel vnni --kernel int_mm

Every recipe is measured as a trial measures it: float control and candidate in turns, both compiled, and then both
eager. Each row is one recipe on one kernel: float's time over the recipe's with both compiled and with both eager, how
far compiled rounds scatter, and what compiling alone does for float, which is no gain of int8.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FixedTrial
from torch import nn

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.calibration.capture import capture_records
from hyquant.calibration.store import Store
from hyquant.config import QuantConfig
from hyquant.kernels import KERNELS
from hyquant.kernels.selection import candidates, forced_kernel
from hyquant.latency import LatencyBench
from hyquant.latency_report import LatencyReport
from hyquant.models import load_model
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import DeploymentShape
from hyquant.modules.linear import FusedLinear
from hyquant.plan import build_plan
from hyquant.quantize import restore_
from search.prompts import load_prompts
from search.study import StudyConfig
from search.study_file import load_study
from spaces.suggest import preset_params, suggest
from tools.bench.tables import markdown, write_json


def main() -> None:
    """Print one line per preset and kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--kernel", action="append", choices=sorted(KERNELS), help="default: every native one of this device"
    )
    parser.add_argument("--preset", action="append", help="default: every preset of the study's space")
    parser.add_argument("--shape", help="HEIGHTxWIDTHxFRAMES[xBATCH] instead of the study's deployment shape")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cache", type=Path, default=Path("mlruns/cache"), help="where captured inputs are kept")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = load_study(args.study)
    shape = config.deployment if args.shape is None else _parse_shape(args.shape, config.deployment.num_steps)
    model = load_model(config.model.kind, config.model.source, device=config.model.device, dtype=config.model.dtype)
    prompt = load_prompts(config.workload, args.study.parent).calibration[0]
    records = capture_records(model, [prompt], [0], config.workload.settings, Store(args.cache))
    compiled, eager = (LatencyBench(model, shape, compile=compile) for compile in (True, False))
    rows: list[dict[str, Any]] = []
    for name, recipe in _recipes(config, args.preset):
        num_steps, blocks = config.workload.settings.num_steps, attention_blocks(model.denoiser)
        plan = build_plan(model.groups(), recipe, num_steps=num_steps, model=model.name, attentions=blocks)
        found = calibrate(model.denoiser, plan, records, model.clock)
        quantize_calibrated_(model.denoiser, plan, found, model.clock)
        for kernel in args.kernel or [kernel.name for kernel in candidates(model.device)]:
            _use_kernel(model.denoiser, kernel)
            reports = [bench.measure(bench.prepare(plan, warmup=2), rounds=args.rounds) for bench in (compiled, eager)]
            rows.append(_row(name, kernel, *reports))
            print(rows[-1], file=sys.stderr, flush=True)
        restore_(model.denoiser)
    print(markdown(rows))
    if args.json:
        write_json(args.json, rows, shape=reports[0].shape, rounds=args.rounds)


def _row(name: str, kernel: str, compiled: LatencyReport, eager: LatencyReport) -> dict[str, Any]:
    return {
        "recipe": name,
        "kernel": kernel,
        "label": compiled.kind,
        "speed-up, compiled": round(1 / compiled.ratio, 2),
        "ratio": f"{compiled.ratio:.3f} +- {compiled.ratio_mad:.3f}",
        "speed-up, eager": round(1 / eager.ratio, 2),
        "float compiled vs eager": round(eager.control_loop_latency_s / compiled.control_loop_latency_s, 2),
        "loop s": round(compiled.loop_latency_s, 3),
        "float loop s": round(compiled.control_loop_latency_s, 3),
        "float eager loop s": round(eager.control_loop_latency_s, 3),
    }


def _recipes(config: StudyConfig, names: list[str] | None) -> Iterator[tuple[str, QuantConfig]]:
    for name in names or [preset.name for preset in config.space.presets]:
        trial = FixedTrial(preset_params(config.space, name))
        yield name, suggest(trial, config.space, num_steps=config.workload.settings.num_steps)


def _use_kernel(denoiser: nn.Module, name: str) -> None:
    for module in denoiser.modules():
        if isinstance(module, FusedLinear):
            module.use_kernel(forced_kernel(name, module.weight.device))


def _parse_shape(text: str, num_steps: int) -> DeploymentShape:
    height, width, num_frames, *batch = (int(part) for part in text.split("x"))
    return DeploymentShape(
        height=height, width=width, num_frames=num_frames, num_steps=num_steps, batch_size=batch[0] if batch else 1
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
