"""Command line of the mini model's training: `python -m tools.train_mini [STAGE ...]`."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.modeling_utils import ModelMixin
from transformers import CLIPTextModel, LlamaModel

from hyquant.models.mini import OUTLIERS, WEIGHTS
from hyquant.models.mini.outliers import apply_outliers_, load_outliers
from hyquant.models.pca_codec import PatchPCACodec
from tools.train_mini import codec as codecs
from tools.train_mini import denoiser as denoisers
from tools.train_mini import evaluate, judge, outliers, package, prompts, text, vae
from tools.train_mini.domain import all_combinations

JUDGE = Path("metrics/mini_judge")
PICTURES = Path("docs/images")
NUM_PICTURED = 16


@dataclass(frozen=True)
class Options:
    """What the command line chose."""

    folder: Path
    seed: int
    compiles: bool
    extra_steps: int


def train_text(options: Options) -> None:
    """Train both text encoders."""
    text.train_llama(options.seed).half().save_pretrained(options.folder / "text/text_encoder")
    text.train_clip_text(options.seed).half().save_pretrained(options.folder / "text/text_encoder_2")


def fit_codec(options: Options) -> None:
    """Fit the PCA codec."""
    codecs.fit_codec(options.seed).save_pretrained(options.folder / "codec")


def train_judge(options: Options) -> None:
    """Train the judge, save it for open_clip and measure it."""
    codec = _load_codec(options)
    trained = judge.train_judge(options.folder / "judge", codec, seed=options.seed, compiles=options.compiles)
    judge.save_judge(trained, JUDGE)
    report = judge.evaluate_judge(judge.load_judge(JUDGE), codec)
    evaluate.write_report(report, options.folder / "judge/report.json")
    print(json.dumps(report, indent=1))


def train_denoiser(options: Options) -> None:
    """Train the denoiser; with --extra-steps, continue on full clips from its averaged weights."""
    codec, conditioning = _load_codec(options), _load_conditioning(options)
    recipe, folder = denoisers.Recipe(), options.folder / "denoiser"
    denoisers.train_denoiser(folder, codec, conditioning, recipe, seed=options.seed, compiles=options.compiles)
    if options.extra_steps:
        denoisers.train_denoiser(
            options.folder / "denoiser_extra",
            codec,
            conditioning,
            denoisers.continuation(options.extra_steps),
            seed=options.seed + 1,
            compiles=options.compiles,
            starts_from=folder / "checkpoint.pt",
        )


def train_vae(options: Options) -> None:
    """Train the autoencoder and measure it."""
    codec = _load_codec(options)
    trained = vae.train_vae(options.folder / "vae", codec, seed=options.seed)
    report = vae.evaluate_vae(trained, codec)
    evaluate.write_report(report, options.folder / "vae/report.json")
    trained.save_pretrained(options.folder / "vae/model")
    print(json.dumps(report, indent=1))


def build_package(options: Options) -> None:
    """Write the weights folder and the prompt files that the package ships."""
    llama, clip_text = _load_text(options)
    pipeline = package.build_pipeline(_load_denoiser(options), llama, clip_text, _choose_decoder(options))
    package.save_pipeline(pipeline, WEIGHTS)
    prompts.write_prompts()


def make_outliers(options: Options) -> None:
    """Choose the outlier channels of the packaged model, and measure W8A8 with and without them."""
    chosen = prompts.choose_prompts()
    calibration = [c.caption for c in chosen["calibration"]][:8]
    pipeline = package.load_pipeline(WEIGHTS)
    ranges = outliers.record_ranges(pipeline, calibration, options.seed)
    factors = outliers.choose_outliers(ranges, outliers.CHANNELS_PER_SITE, outliers.FACTOR)
    outliers.save_outliers(factors, OUTLIERS)
    measured = [c.caption for c in chosen["search"]][:8]
    report = {"natural": outliers.measure_w8a8(pipeline, calibration, measured, options.seed)}
    apply_outliers_(pipeline.transformer, load_outliers(OUTLIERS))
    report["outliers"] = outliers.measure_w8a8(pipeline, calibration, measured, options.seed)
    evaluate.write_report(report, options.folder / "outliers/report.json")
    print(json.dumps(report, indent=1))


def evaluate_package(options: Options) -> None:
    """Measure the bars on 64 generated clips and draw the contact sheet."""
    report, wanted, clips = evaluate.evaluate_generation(package.load_pipeline(WEIGHTS), judge.load_judge(JUDGE))
    report["meets_bars"] = evaluate.meets_bars(report)
    evaluate.write_report(report, options.folder / "evaluation/report.json")
    half, each = len(wanted) // 2, NUM_PICTURED // 2
    shown = [*range(each), *range(half, half + each)]
    evaluate.contact_sheet(clips[shown], [wanted[i].caption for i in shown], PICTURES / "mini_generated.png")
    print(json.dumps(report, indent=1))


STAGES = {
    "text": train_text,
    "codec": fit_codec,
    "judge": train_judge,
    "denoiser": train_denoiser,
    "vae": train_vae,
    "package": build_package,
    "outliers": make_outliers,
    "evaluate": evaluate_package,
}


def _load_codec(options: Options) -> PatchPCACodec:
    codec: PatchPCACodec = PatchPCACodec.from_pretrained(options.folder / "codec")
    return codec.float().eval()


def _load_text(options: Options) -> tuple[LlamaModel, CLIPTextModel]:
    folder = options.folder / "text"
    llama = LlamaModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    clip_text = CLIPTextModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32)
    return llama.eval(), clip_text.eval()


def _load_conditioning(options: Options) -> text.TextConditioning:
    captions = [c.caption for c in all_combinations()]
    return text.TextConditioning(*_load_text(options), [*captions, denoisers.NO_CAPTION])


def _load_denoiser(options: Options) -> HunyuanVideoTransformer3DModel:
    paths = [options.folder / name / "checkpoint.pt" for name in ("denoiser_extra", "denoiser")]
    return denoisers.load_denoiser(next(path for path in paths if path.exists()))


def _choose_decoder(options: Options) -> ModelMixin:
    """Return the autoencoder if it was trained and is good enough, else the PCA codec."""
    report = options.folder / "vae/report.json"
    if report.exists() and json.loads(report.read_text())["autoencoder_db"] >= vae.SHIPPING_BAR_DB:
        trained: ModelMixin = vae.AutoencoderKLHunyuanVideo.from_pretrained(options.folder / "vae/model")
        return trained
    return _load_codec(options)


def main() -> None:
    """Run the stages that were asked for, in their order."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_mini", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--folder", type=Path, default=Path("build/train_mini"), help="checkpoints, logs and reports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile the networks for training")
    parser.add_argument("--extra-steps", type=int, default=0, help="continue the denoiser by so many steps")
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - set(STAGES)
    if unknown:
        parser.error(f"a stage must be one of {', '.join(STAGES)}, but got {', '.join(sorted(unknown))}")
    options = Options(arguments.folder, arguments.seed, not arguments.eager, arguments.extra_steps)
    for name, run in STAGES.items():
        if not arguments.stages or name in arguments.stages:
            run(options)


if __name__ == "__main__":
    main()
