"""Fit a small `AutoencoderKLHunyuanVideo` to the fixed latents: encoder and decoder are two independent regressions.

The decoder learns to draw the clip from its PCA latents, the encoder learns to give those latents, so that the
denoiser does not depend on the outcome. It ships only if its reconstruction of held-out clips reaches
`SHIPPING_BAR_DB`; otherwise the PCA codec does, under its own name.

The convolutions of few channels are slow on a CPU. Computing each as three planar ones, one per temporal tap, is the
same function but was slower still (1.2 against 0.9 core seconds per step on AVX-512), so that it is not done.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import nn
from torch.nn import functional as F

from hyquant.models.pca_codec import PatchPCACodec
from tools.train_mini.codec import psnr_db, to_clips, to_latents
from tools.train_mini.domain import draw_combinations, held_out_combinations, render_clips, training_combinations
from tools.train_mini.runs import LossLog, learning_rate_share, load_checkpoint, save_atomically, step_generator

SHIPPING_BAR_DB = 26.0
NUM_STEPS, BATCH, NUM_FRAMES = 6000, 2, 5
LEARNING_RATE = 2e-3


def build_vae(seed: int, latent_channels: int = 8) -> AutoencoderKLHunyuanVideo:
    """Build the untrained autoencoder: 4x4 pixels and 4 frames per latent, as the codec."""
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=latent_channels,
        block_out_channels=(16, 32, 64),
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


def train_vae(
    folder: Path, codec: PatchPCACodec, *, seed: int, num_steps: int = NUM_STEPS
) -> AutoencoderKLHunyuanVideo:
    """Train, or resume training, both halves in `folder`."""
    vae = build_vae(seed, codec.config.latent_channels)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    state = load_checkpoint(folder / "checkpoint.pt")
    start = 0
    if state is not None:
        vae.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    pool, log = training_combinations(), LossLog(folder / "losses.csv")
    pixel_errors, latent_errors = [], []

    for step in range(start, num_steps):
        generator = step_generator(seed + 2, step)
        clips = render_clips(draw_combinations(pool, BATCH, generator), generator, NUM_FRAMES)
        latents, video = to_latents(codec, clips), 2 * clips.transpose(1, 2) - 1
        drawn = vae.decode(latents, return_dict=False)[0]
        encoded = vae.encode(video).latent_dist.mean
        pixel_error, latent_error = F.mse_loss(drawn, video), F.mse_loss(encoded, latents)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * learning_rate_share(step, num_steps)
        optimizer.zero_grad(set_to_none=True)
        (pixel_error + 0.1 * latent_error).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        pixel_errors.append(pixel_error.item() / 4)  # of values in [0, 1]
        latent_errors.append(latent_error.item())
        done = step + 1
        if done % 50 == 0:
            mean = torch.tensor(pixel_errors).mean()
            log.write(done, {"psnr_db": float(-10 * mean.log10()), "latent_mse": sum(latent_errors) / 50})
            pixel_errors.clear()
            latent_errors.clear()
        if done % 200 == 0 or done == num_steps:
            weights = {"weights": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            save_atomically(weights, folder / "checkpoint.pt")
    return vae.eval()


@torch.no_grad()
def evaluate_vae(vae: AutoencoderKLHunyuanVideo, codec: PatchPCACodec, seed: int = 78) -> dict[str, float]:
    """Return the PSNR on clips of all held-out combinations: PCA, decoder alone, encoder and decoder."""
    clips = render_clips(held_out_combinations(), torch.Generator().manual_seed(seed))
    latents = to_latents(codec, clips)
    encoded = torch.cat([vae.encode(2 * c.transpose(1, 2) - 1).latent_dist.mean for c in clips.split(8)])
    return {
        "pca_db": psnr_db(to_clips(codec, latents), clips),
        "decoder_db": psnr_db(torch.cat([to_clips(vae, z) for z in latents.split(8)]), clips),
        "autoencoder_db": psnr_db(torch.cat([to_clips(vae, z) for z in encoded.split(8)]), clips),
    }
