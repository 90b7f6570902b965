"""Train the denoiser: flow matching on the fixed latents, first of still pictures, then of clips of full length.

Binding words to shapes, colours, backgrounds and places is learnt at the final picture size on first frames alone
(one latent frame), where a sample costs less than a third; the second part of the training shows all thirteen frames.

    x = (1 - sigma) * clean + sigma * noise;   the network predicts noise - clean at timestep 1000 * sigma

    B batch   Z latent channels   t, h, w latent frames, height, width

Source: rectified flow with a shifted logit-normal sigma, Esser et al. (arXiv:2403.03206), sections 2 and 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from hyquant.models.pca_codec import PatchPCACodec
from tools.train_mini.codec import to_latents
from tools.train_mini.domain import (
    Combination,
    draw_combinations,
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
from tools.train_mini.text import TextConditioning

NO_CAPTION = ""
GATE_BIAS = 0.2


@dataclass(frozen=True)
class Phase:
    """A stretch of training on clips of one length."""

    num_steps: int
    num_frames: int
    batch_size: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of the training but the seed."""

    phases: tuple[Phase, ...] = (Phase(600, 1, 32), Phase(1200, 13, 8))
    learning_rate: float = 1e-3
    average_decay: float = 0.998
    caption_drop: float = 0.05
    sigma_shift: float = 2.5
    sigma_spread: float = 1.2

    @property
    def num_steps(self) -> int:
        """Return the length of the whole training."""
        return sum(phase.num_steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """Return the phase that a step belongs to."""
        for phase in self.phases:
            if step < phase.num_steps:
                return phase
            step -= phase.num_steps
        return self.phases[-1]


def continuation(num_steps: int) -> Recipe:
    """Return the recipe of a warm restart on full clips."""
    return Recipe(phases=(Phase(num_steps, 13, 8),), learning_rate=6e-4)


@dataclass(frozen=True)
class Batch:
    """One flow-matching problem: noisy latents, their timesteps, the text, and the velocity to predict."""

    noisy: Tensor  # [B, Z, t, h, w]
    sigma: Tensor  # [B]
    guidance: Tensor  # [B]
    tokens: Tensor  # [B, 16, 128]
    mask: Tensor  # [B, 16]
    pooled: Tensor  # [B, 96]
    velocity: Tensor  # [B, Z, t, h, w]


def build_denoiser(seed: int, latent_channels: int = 8) -> HunyuanVideoTransformer3DModel:
    """Build the untrained network; every adaLN starts as the identity with its gates slightly open."""
    torch.manual_seed(seed)
    denoiser = HunyuanVideoTransformer3DModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_attention_heads=4,
        attention_head_dim=64,
        num_layers=1,
        num_single_layers=4,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        qk_norm="rms_norm",
        guidance_embeds=True,
        text_embed_dim=128,
        pooled_projection_dim=96,
        rope_axes_dim=(16, 24, 24),
    )
    for block in denoiser.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            _start_closed_(norm.linear, chunks=6, gates=(2, 5))
    for block in denoiser.single_transformer_blocks:
        _start_closed_(block.norm.linear, chunks=3, gates=(2,))
    for block in denoiser.context_embedder.token_refiner.refiner_blocks:
        _start_closed_(block.norm_out.linear, chunks=2, gates=(0, 1))
    _start_closed_(denoiser.norm_out.linear, chunks=2, gates=())
    _start_closed_(denoiser.proj_out, chunks=1, gates=())
    return denoiser


def _start_closed_(linear: nn.Linear, *, chunks: int, gates: tuple[int, ...]) -> None:
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
        for gate in gates:
            linear.bias.chunk(chunks)[gate].fill_(GATE_BIAS)


def draw_sigma(batch: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Draw [B] noise levels, logit-normal, shifted, and stratified over the batch."""
    quantile = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    logit = recipe.sigma_spread * torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4))
    sigma = torch.sigmoid(logit)
    return recipe.sigma_shift * sigma / (1 + (recipe.sigma_shift - 1) * sigma)


def make_batch(
    combinations: list[Combination],
    num_frames: int,
    codec: PatchPCACodec,
    text: TextConditioning,
    recipe: Recipe,
    generator: torch.Generator,
) -> Batch:
    """Render clips, encode them and add noise."""
    size = len(combinations)
    clean = to_latents(codec, render_clips(combinations, generator, num_frames))
    noise = torch.randn(clean.shape, generator=generator)
    sigma = draw_sigma(size, recipe, generator)
    dropped = torch.rand(size, generator=generator) < recipe.caption_drop
    captions = [NO_CAPTION if drop else c.caption for c, drop in zip(combinations, dropped.tolist(), strict=True)]
    level = sigma[:, None, None, None, None]
    return Batch(
        noisy=(1 - level) * clean + level * noise,
        sigma=sigma,
        guidance=1000 + 8000 * torch.rand(size, generator=generator),
        velocity=noise - clean,
        **dict(zip(("tokens", "mask", "pooled"), text(captions), strict=True)),
    )


def flow_loss(denoiser: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error of the predicted velocity."""
    (predicted,) = denoiser(
        hidden_states=batch.noisy,
        timestep=1000 * batch.sigma,
        encoder_hidden_states=batch.tokens,
        encoder_attention_mask=batch.mask,
        pooled_projections=batch.pooled,
        guidance=batch.guidance,
        return_dict=False,
    )
    return F.mse_loss(predicted, batch.velocity)


def training_batches(
    start: int, recipe: Recipe, seed: int, codec: PatchPCACodec, text: TextConditioning
) -> Iterator[tuple[int, Batch]]:
    """Yield every step that is left with its batch."""
    pool = training_combinations()
    for step in range(start, recipe.num_steps):
        generator, phase = step_generator(seed, step), recipe.phase_at(step)
        combinations = draw_combinations(pool, phase.batch_size, generator)
        yield step, make_batch(combinations, phase.num_frames, codec, text, recipe, generator)


def train_denoiser(
    folder: Path,
    codec: PatchPCACodec,
    text: TextConditioning,
    recipe: Recipe,
    *,
    seed: int,
    compiles: bool = True,
    checkpoint_every: int = 200,
    starts_from: Path | None = None,
) -> HunyuanVideoTransformer3DModel:
    """Train, or resume training, in `folder`, and return the network with averaged weights.

    `folder` receives `checkpoint.pt`, rewritten as the training goes, and `losses.csv`. `starts_from` is a checkpoint
    of an earlier training whose averaged weights are the initial ones (a warm restart).
    """
    denoiser = build_denoiser(seed, codec.config.latent_channels)
    if starts_from is not None:
        _load_average_(denoiser, starts_from)
    average = WeightAverage(denoiser, recipe.average_decay)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    state = load_checkpoint(folder / "checkpoint.pt")
    start = 0
    if state is not None:
        denoiser.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights = state["average"]
        start = state["step"]
    forward = torch.compile(denoiser, dynamic=False) if compiles else denoiser
    losses, log = [], LossLog(folder / "losses.csv")

    for step, batch in training_batches(start, recipe, seed, codec, text):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * learning_rate_share(step, recipe.num_steps)
        loss = flow_loss(forward, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        losses.append(loss.item())
        done = step + 1
        if done % 50 == 0:
            log.write(done, {"loss": sum(losses) / len(losses)})
            losses.clear()
        if done % checkpoint_every == 0 or done == recipe.num_steps:
            save_atomically(
                {
                    "weights": denoiser.state_dict(),
                    "average": average.weights,
                    "optimizer": optimizer.state_dict(),
                    "step": done,
                },
                folder / "checkpoint.pt",
            )
    average.copy_to(denoiser)
    return denoiser.eval()


@torch.no_grad()
def validation_loss(
    denoiser: nn.Module, codec: PatchPCACodec, text: TextConditioning, recipe: Recipe, num_frames: int = 13
) -> float:
    """Return the loss on all held-out combinations with fixed noise."""
    generator = torch.Generator().manual_seed(9)
    batch = make_batch(held_out_combinations(), num_frames, codec, text, recipe, generator)
    return float(flow_loss(denoiser, batch))


def load_denoiser(checkpoint: Path, latent_channels: int = 8) -> HunyuanVideoTransformer3DModel:
    """Return the averaged network of a training that may still be running."""
    denoiser = build_denoiser(0, latent_channels)
    _load_average_(denoiser, checkpoint)
    return denoiser.eval()


def _load_average_(denoiser: nn.Module, checkpoint: Path) -> None:
    state = load_checkpoint(checkpoint)
    if state is None:
        raise FileNotFoundError(f"{checkpoint} must hold a denoiser checkpoint, but there is none; train it first")
    with torch.no_grad():
        for parameter, weight in zip(denoiser.parameters(), state["average"], strict=True):
            parameter.copy_(weight)
