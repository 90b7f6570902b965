"""Train the judge: a mini CLIP of open_clip's own architecture that says which caption fits a video.

It sees a video as one picture, four of its frames tiled two by two, because single frames cannot show motion. It
shares no weights and no training signal with the generator's text encoders.

Every step classifies clips among captions that include all those of the same colour and background, which differ only
in shape and motion: in-batch negatives alone hardly ever ask for these two. Clips are disturbed as a generator
disturbs them (codec round trip, resizing, noise), so that the judge looks at the content and not at the rendering.

    B batch   K candidate captions   E embedding
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hyquant.models.pca_codec import PatchPCACodec
from tools.train_mini.codec import to_clips, to_latents
from tools.train_mini.domain import (
    BACKGROUNDS,
    COLOURS,
    FACTORS,
    Combination,
    all_combinations,
    held_out_combinations,
    render_clips,
    training_combinations,
)
from tools.train_mini.runs import (
    LossLog,
    WeightAverage,
    learning_rate_share,
    load_checkpoint,
    save_atomically,
    step_generator,
)
from tools.train_mini.text import build_tokenizer, vocabulary

GRID_FRAMES = (0, 4, 8, 12)
CONTEXT_LENGTH = 16
NUM_STEPS = 1300
BATCH, NUM_BLOCKS, NUM_OTHERS = 48, 4, 56
LEARNING_RATE = 1e-3
POSITION_STD = 0.5
PIXEL_MEAN = PIXEL_STD = 0.5


def judge_config() -> dict[str, Any]:
    """Return what open_clip calls the model and preprocess configuration."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": 128, "layers": 4, "width": 128, "head_width": 32, "patch_size": 16},
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": len(vocabulary()),
                "hf_tokenizer_name": "mini_judge",
                "width": 96,
                "heads": 4,
                "layers": 3,
            },
        },
        "preprocess_cfg": {
            "mean": [PIXEL_MEAN] * 3,
            "std": [PIXEL_STD] * 3,
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }


def build_judge(seed: int) -> nn.Module:
    """Build the untrained judge with open_clip's classes.

    Positions start about as loud as contents. With open_clip's quieter start the vision tower stays for a thousand
    steps with what single patches show, which gives away the axis of a motion but not its direction.
    """
    torch.manual_seed(seed)
    judge = open_clip.CLIP(**judge_config()["model_cfg"])
    nn.init.normal_(judge.visual.positional_embedding, std=POSITION_STD)
    return judge


def grid(clips: Tensor) -> Tensor:
    """Tile four frames of [B, T, C, H, W] clips into [B, C, 2H, 2W] pictures, row by row."""
    frames = clips[:, list(GRID_FRAMES)]
    rows = [torch.cat([frames[:, i], frames[:, i + 1]], dim=-1) for i in (0, 2)]
    return torch.cat(rows, dim=-2)


def normalize(pictures: Tensor) -> Tensor:
    """Bring pictures in [0, 1] to the range that the judge was trained on."""
    return (pictures - PIXEL_MEAN) / PIXEL_STD


def train_judge(
    folder: Path, codec: PatchPCACodec, *, seed: int, num_steps: int = NUM_STEPS, compiles: bool = True
) -> nn.Module:
    """Train, or resume training, in `folder`, and return the judge with averaged weights."""
    judge = build_judge(seed)
    heads = nn.Linear(judge_config()["model_cfg"]["embed_dim"], sum(map(len, FACTORS.values())))
    average = WeightAverage(judge, 0.995)
    optimizer = torch.optim.AdamW(
        [*judge.parameters(), *heads.parameters()], lr=LEARNING_RATE, weight_decay=0.05, fused=True
    )
    state = load_checkpoint(folder / "checkpoint.pt")
    start = 0
    if state is not None:
        judge.load_state_dict(state["weights"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, start = state["average"], state["step"]
    forward = torch.compile(judge, dynamic=False) if compiles else judge
    tokens = dict(zip(all_combinations(), _tokenize_all(), strict=True))
    losses, hits, log = [], [], LossLog(folder / "losses.csv")

    for step in range(start, num_steps):
        generator = step_generator(seed + 1, step)
        candidates, picks = _draw_candidates(generator)
        pictures = _draw_pictures([candidates[i] for i in picks], codec, generator)
        images, texts, logit_scale, *_ = forward(normalize(pictures), torch.stack([tokens[c] for c in candidates]))
        logits = logit_scale * images @ texts.T
        factors = torch.tensor([c.indices for c in candidates])
        loss = F.cross_entropy(logits, picks)
        loss_of_heads = factor_loss(heads(images), factors[picks]) + factor_loss(heads(texts), factors)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * learning_rate_share(step, num_steps)
        optimizer.zero_grad(set_to_none=True)
        (loss + loss_of_heads).backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            judge.logit_scale.clamp_(0, 3.5)
        average.update(step)
        losses.append(loss.item())
        hits.append(float((logits.argmax(dim=1) == picks).float().mean()))
        done = step + 1
        if done % 50 == 0:
            log.write(done, {"loss": sum(losses) / len(losses), "top1": sum(hits) / len(hits)})
            losses.clear()
            hits.clear()
        if done % 100 == 0 or done == num_steps:
            networks = {"weights": judge.state_dict(), "average": average.weights, "heads": heads.state_dict()}
            save_atomically(networks | {"optimizer": optimizer.state_dict(), "step": done}, folder / "checkpoint.pt")
    average.copy_to(judge)
    return judge.eval()


def factor_loss(logits: Tensor, factors: Tensor) -> Tensor:
    """Return the mean cross-entropy of one shared linear head that reads the four factors from either tower.

    Without it, towers that confuse two directions of motion give each other no reason to part them: the gradient of
    either is proportional to what the other tells apart already. The head is thrown away after training.

    Args:
        logits: [B, 19], the classes of all factors side by side, for unit vectors; sharpened here.
        factors: [B, 4] indices.
    """
    parts = (10 * logits).split([len(values) for values in FACTORS.values()], dim=1)
    return torch.stack([F.cross_entropy(part, factors[:, i]) for i, part in enumerate(parts)]).mean()


def load_trained(checkpoint: Path) -> nn.Module:
    """Return the averaged judge of a training that may still be running."""
    judge = build_judge(0)
    state = load_checkpoint(checkpoint)
    if state is None:
        raise FileNotFoundError(f"{checkpoint} must hold a judge checkpoint, but there is none; train it first")
    with torch.no_grad():
        for parameter, weight in zip(judge.parameters(), state["average"], strict=True):
            parameter.copy_(weight)
    return judge.eval()


def save_judge(judge: nn.Module, folder: Path) -> None:
    """Write the folder that open_clip reads as `local-dir:FOLDER`: config, float16 weights, tokenizer."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "open_clip_config.json").write_text(json.dumps(judge_config(), indent=2) + "\n")
    weights = {name: value.detach().half().contiguous() for name, value in judge.state_dict().items()}
    save_file(weights, partial / "open_clip_model.safetensors")
    (partial / "open_clip_model.safetensors").chmod(0o644)
    build_tokenizer(adds_specials=True, max_length=CONTEXT_LENGTH).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_judge(folder: Path) -> nn.Module:
    """Load a saved judge through open_clip, as any other open_clip model."""
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval()


@torch.no_grad()
def classify(judge: nn.Module, clips: Tensor) -> tuple[list[Combination], Tensor]:
    """Return the best of all 480 combinations for each of [B, T, C, H, W] clips, and all [B, 480] cosines."""
    texts = judge.encode_text(_tokenize_all(), normalize=True)
    cosines = judge.encode_image(normalize(grid(clips)), normalize=True) @ texts.T
    everything = all_combinations()
    return [everything[int(i)] for i in cosines.argmax(dim=1)], cosines


def agreement(judged: Sequence[Combination], wanted: Sequence[Combination]) -> dict[str, float]:
    """Return the share of clips judged right: as a whole, `top1`, and factor by factor."""
    pairs = list(zip(judged, wanted, strict=True))
    shares = {"top1": sum(a == b for a, b in pairs) / len(pairs)}
    for factor in FACTORS:
        shares[factor] = sum(getattr(a, factor) == getattr(b, factor) for a, b in pairs) / len(pairs)
    return shares


@torch.no_grad()
def evaluate_judge(
    judge: nn.Module, codec: nn.Module, *, seed: int = 77, repeats: int = 4
) -> dict[str, dict[str, float]]:
    """Measure the judge on clips of the held-out combinations, fresh and through the codec."""
    wanted = held_out_combinations() * repeats
    clips = render_clips(wanted, torch.Generator().manual_seed(seed))
    coded = torch.cat([to_clips(codec, to_latents(codec, part)) for part in clips.split(48)])
    own = torch.tensor([all_combinations().index(c) for c in wanted])
    results = {}
    for name, videos in (("held-out", clips), ("held-out through the codec", coded)):
        judged, cosines = classify(judge, videos)
        results[name] = agreement(judged, wanted) | {"own_cosine": float(cosines.gather(1, own[:, None]).mean())}
    return results


def _tokenize_all() -> Tensor:
    tokenizer = build_tokenizer(adds_specials=True, max_length=CONTEXT_LENGTH)
    captions = [c.caption for c in all_combinations()]
    ids = tokenizer(captions, padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt")["input_ids"]
    assert isinstance(ids, Tensor)
    return ids


def _draw_candidates(generator: torch.Generator) -> tuple[list[Combination], Tensor]:
    """Return K combinations to choose among and the [B] indices of those to be rendered."""
    pool = training_combinations()
    pairs = torch.randperm(len(COLOURS) * len(BACKGROUNDS), generator=generator)[:NUM_BLOCKS].tolist()
    blocks = {(pair % len(COLOURS), pair // len(COLOURS)) for pair in pairs}
    candidates = [c for c in pool if (c.colour, c.background) in blocks]
    chosen = set(candidates)
    others = [c for c in pool if c not in chosen]
    order = torch.randperm(len(others), generator=generator)
    # captions per block vary by a few: fill up to a constant number, so that a compiled graph is reused
    num_candidates = NUM_BLOCKS * 20 + NUM_OTHERS
    candidates += [others[int(i)] for i in order[: num_candidates - len(candidates)]]
    return candidates, torch.randint(num_candidates, (BATCH,), generator=generator)


def _draw_pictures(combinations: list[Combination], codec: PatchPCACodec, generator: torch.Generator) -> Tensor:
    """Render [B, C, 2H, 2W] grids: half of the clips pass through the codec, a few are softened, noisy or shaded."""
    clips = render_clips(combinations, generator)
    num_coded = len(clips) // 2  # combinations come in random order
    coded = to_clips(codec, to_latents(codec, clips[:num_coded]))
    pictures = torch.cat([grid(coded), grid(clips[num_coded:])])
    kind = torch.rand(2, len(pictures), generator=generator)
    soft = kind[0] < 0.2
    if soft.any():
        small = F.interpolate(pictures[soft], scale_factor=0.5, mode="bilinear", antialias=True)
        pictures[soft] = F.interpolate(small, scale_factor=2, mode="bilinear")
    strength = (0.16 * (kind[1] - 0.5).clamp_min(0))[:, None, None, None]
    shade = 0.06 * (torch.rand(len(pictures), 3, 1, 1, generator=generator) - 0.5)
    return (pictures + shade + strength * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)
