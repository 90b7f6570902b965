"""Time the presets of a study at its deployment shape, on every kernel asked for, without rendering or scoring.

    python -m tools.bench.recipes studies/mini.yaml --kernel cpu --kernel reference

Every recipe is measured as a trial measures it: float control and candidate in turns, both compiled. Each line is one
recipe on one kernel: loop latency of the candidate and of float, their ratio, and how far ratios of rounds scatter.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

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
    parser.add_argument("--eager", action="store_true", help="compile neither side")
    parser.add_argument("--cache", type=Path, default=Path("mlruns/cache"), help="where captured inputs are kept")
    args = parser.parse_args()
    config = load_study(args.study)
    shape = config.deployment if args.shape is None else _parse_shape(args.shape, config.deployment.num_steps)
    model = load_model(config.model.kind, config.model.source, device=config.model.device, dtype=config.model.dtype)
    prompt = load_prompts(config.workload, args.study.parent).calibration[0]
    records = capture_records(model, [prompt], [0], config.workload.settings, Store(args.cache))
    bench = LatencyBench(model, shape, compile=not args.eager)
    for name, recipe in _recipes(config, args.preset):
        num_steps, blocks = config.workload.settings.num_steps, attention_blocks(model.denoiser)
        plan = build_plan(model.groups(), recipe, num_steps=num_steps, model=model.name, attentions=blocks)
        found = calibrate(model.denoiser, plan, records, model.clock)
        quantize_calibrated_(model.denoiser, plan, found, model.clock)
        for kernel in args.kernel or [kernel.name for kernel in candidates(model.device)]:
            _use_kernel(model.denoiser, kernel)
            report = bench.measure(bench.prepare(plan, warmup=2), rounds=args.rounds)
            print(
                f"{name:16} {kernel:10} {report.loop_latency_s:7.3f} s  float {report.control_loop_latency_s:7.3f} s"
                f"  ratio {report.ratio:.3f} +- {report.ratio_mad:.3f}  ({report.shape}; {report.device})",
                flush=True,
            )
        restore_(model.denoiser)


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
