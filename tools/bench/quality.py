"""Score the presets of a study, without measuring latency: what each technique costs in likeness to the float videos.

    python -m tools.bench.quality studies/mini.yaml --preset static --preset m4

Every recipe is evaluated as a trial evaluates it, on one rank, with the study's prompts. Each line is one recipe:
clip_reference and PSNR against the float videos, mean and standard deviation over the prompts.
"""

import argparse
from pathlib import Path

import torch
from optuna.trial import FixedTrial

from hyquant.devices import resolve_device
from hyquant.distributed import Group
from search.locks import HostLock
from search.objective import run_trial
from search.prepare import prepare_workbench
from search.prompts import load_prompts
from search.readable import readable
from search.stages import Stages
from search.study import Objective
from search.study_file import load_study
from spaces.suggest import preset_params, suggest


def main() -> None:
    """Print one line per preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--preset", action="append", help="default: every preset of the study's space")
    parser.add_argument("--cache", type=Path, default=Path("mlruns/cache"), help="where captured inputs are kept")
    args = parser.parse_args()
    only_quality = (Objective(metric="clip_reference", direction="maximize"),)
    config = load_study(args.study).model_copy(update={"objectives": only_quality})
    prompts = load_prompts(config.workload, args.study.parent)
    device = resolve_device(config.model.device)
    bench = prepare_workbench(
        config, prompts, group=Group(), device=device, cache=args.cache, lock=HostLock(args.cache / "locks")
    )
    bench.latency_bench = None
    for name in args.preset or [preset.name for preset in config.space.presets]:
        trial = FixedTrial(preset_params(config.space, name))
        point = suggest(trial, config.space, num_steps=config.workload.settings.num_steps)
        measurement = run_trial(bench, point, Stages(Group()))
        assert measurement is not None, "rank 0 measures"
        scores = measurement.result.metrics
        clip, psnr = scores["clip_reference"], scores["psnr_db"]
        print(
            f"{name:18} clip_reference {readable(clip.mean)} +- {clip.std:.1e}   "
            f"psnr_db {psnr.mean:5.1f} +- {psnr.std:.1f}   {measurement.result.weight_bytes / 1e6:.1f} MB",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
