"""Measure the bars: generate clips for 64 prompts, let the judge name what it sees, draw pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoPipeline
from PIL import Image, ImageDraw
from torch import Tensor, nn

from tools.train_mini.domain import FACTORS, Combination, all_combinations
from tools.train_mini.judge import GRID_FRAMES, agreement, classify
from tools.train_mini.package import generate
from tools.train_mini.prompts import NUM_EVALUATED, evaluation_combinations

SEED = 1234
BARS = {"background": 0.95, "colour": 0.95, "motion": 0.90, "shape": 0.75}
_CAPTION_HEIGHT, _COLUMNS = 12, 2


def evaluate_generation(
    pipeline: HunyuanVideoPipeline, judge: nn.Module, *, count: int | None = None
) -> tuple[dict[str, Any], list[Combination], Tensor]:
    """Generate and judge; `count` takes only the first so many of each half.

    Returns:
        Shares right per factor over all clips and over each half, then what was asked for, and the clips.
    """
    everything = evaluation_combinations()
    half = NUM_EVALUATED if count is None else count
    wanted = everything[:half] + everything[NUM_EVALUATED : NUM_EVALUATED + half]
    start = time.monotonic()
    clips = generate(pipeline, [c.caption for c in wanted], seed=SEED)
    seconds = time.monotonic() - start
    judged, cosines = classify(judge, clips)
    own = cosines.gather(1, torch.tensor([all_combinations().index(c) for c in wanted])[:, None])[:, 0]
    report = {
        "all": agreement(judged, wanted) | {"own_cosine": float(own.mean())},
        "training combinations": agreement(judged[:half], wanted[:half]) | {"own_cosine": float(own[:half].mean())},
        "held-out combinations": agreement(judged[half:], wanted[half:]) | {"own_cosine": float(own[half:].mean())},
        "num_clips": len(wanted),
        "seconds": round(seconds, 1),
        "wrong": [{"prompt": w.caption, "judged": j.caption} for w, j in zip(wanted, judged, strict=True) if w != j],
    }
    return report, wanted, clips


def meets_bars(report: dict[str, Any]) -> dict[str, bool]:
    """Say for each factor whether its bar is met."""
    return {factor: report["all"][factor] >= BARS[factor] for factor in FACTORS}


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def contact_sheet(clips: Tensor, captions: list[str], path: Path) -> None:
    """Draw each of [B, T, C, H, W] clips as a row of four frames under its caption, two clips a row."""
    frames, (height, width) = len(GRID_FRAMES), clips.shape[-2:]
    cell_width, cell_height = frames * (width + 2) + 6, height + _CAPTION_HEIGHT + 4
    rows = -(-len(clips) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        left, top = index % _COLUMNS * cell_width, index // _COLUMNS * cell_height
        draw.text((left + 2, top), caption, fill="black")
        for position, frame in enumerate(GRID_FRAMES):
            pixels = (clip[frame].permute(1, 2, 0) * 255).round().byte().numpy()
            sheet.paste(Image.fromarray(pixels), (left + position * (width + 2), top + _CAPTION_HEIGHT))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
