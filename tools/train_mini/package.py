"""Assemble trained parts into the folder that diffusers' HunyuanVideo pipeline loads, and run that pipeline.

Weights are stored in float16; training and rendering are float32. A folder is built beside its place and renamed, so
that a reader never meets half of one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from transformers import CLIPTextModel, LlamaModel

from hyquant.models.mini import MAX_SEQUENCE_LENGTH, PROMPT_TEMPLATE
from tools.train_mini.domain import NUM_FRAMES, SIZE
from tools.train_mini.text import CLIP_LENGTH, build_tokenizer

NUM_STEPS = 20
GUIDANCE_SCALE = 6.0
SCHEDULER_SHIFT = 3.0
BATCH = 8


def build_pipeline(
    denoiser: HunyuanVideoTransformer3DModel, llama: LlamaModel, clip_text: CLIPTextModel, decoder: ModelMixin
) -> HunyuanVideoPipeline:
    """Join the trained parts with their tokenizers and the scheduler."""
    return HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=build_tokenizer(adds_specials=False, max_length=128),
        transformer=denoiser,
        vae=decoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT),
        text_encoder_2=clip_text,
        tokenizer_2=build_tokenizer(adds_specials=True, max_length=CLIP_LENGTH),
    )


def save_pipeline(pipeline: HunyuanVideoPipeline, folder: Path) -> None:
    """Write the pipeline with float16 weights and replace what was in `folder`."""
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(partial)
    pipeline.to(torch.float32)
    for weights in partial.rglob("*.safetensors"):
        weights.chmod(0o644)
    for config in partial.rglob("config.json"):  # diffusers notes there where a part was loaded from
        content = json.loads(config.read_text())
        content.pop("_name_or_path", None)
        config.write_text(json.dumps(content, indent=2) + "\n")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_pipeline(folder: Path) -> HunyuanVideoPipeline:
    """Load a saved pipeline in float32."""
    pipeline = HunyuanVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: HunyuanVideoPipeline, prompts: Sequence[str], *, seed: int, num_steps: int = NUM_STEPS
) -> Tensor:
    """Render one clip per prompt; clip i starts from the noise of seed + i, whatever the batches are.

    Returns:
        [B, T, C, H, W] float32 in [0, 1].
    """
    clips = []
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        video = pipeline(
            prompt=part,
            height=SIZE,
            width=SIZE,
            num_frames=NUM_FRAMES,
            num_inference_steps=num_steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=generators,
            prompt_template=PROMPT_TEMPLATE,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            output_type="pt",
        ).frames
        clips.append(video)
    return torch.cat(clips)
