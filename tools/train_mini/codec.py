"""Fix the latent space before anything is trained: a causal patch PCA over rendered clips.

The first frame's components are rotated into the best agreement with those of a standing four-frame block, so that
one latent channel means about the same in every latent frame; whitened latents stay whitened under a rotation.

    N blocks   P values per block   Z components
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyquant.models.pca_codec import PatchPCACodec, split_blocks
from tools.train_mini.domain import draw_combinations, render_clips, training_combinations

NUM_CLIPS = 384


def fit_codec(seed: int, latent_channels: int = 8) -> PatchPCACodec:
    """Fit a codec to clips of the training combinations; its weights are exact in float16."""
    generator = torch.Generator().manual_seed(seed)
    codec = PatchPCACodec(latent_channels=latent_channels)
    size, length = codec.spatial_compression_ratio, codec.temporal_compression_ratio
    clips = render_clips(draw_combinations(training_combinations(), NUM_CLIPS, generator), generator)
    first, rest = (b.flatten(0, 3) for b in split_blocks(2 * clips.transpose(1, 2) - 1, size, length))

    basis_rest = principal_components(rest, latent_channels)
    basis_first = principal_components(first, latent_channels)
    standing = first.unflatten(1, (3, 1, size * size)).expand(-1, -1, length, -1).flatten(1)
    rotation = _procrustes(basis_first.encode(first), basis_rest.encode(standing))
    _install_(codec.first_encoder, codec.first_decoder, basis_first, rotation)
    _install_(codec.rest_encoder, codec.rest_decoder, basis_rest, torch.eye(latent_channels))
    return codec.half().float().eval()


class Basis:
    """Whitened principal components: mean [P], directions [Z, P] and standard deviations [Z]."""

    def __init__(self, mean: Tensor, directions: Tensor, std: Tensor) -> None:
        self.mean, self.directions, self.std = mean, directions, std

    def encode(self, blocks: Tensor) -> Tensor:
        """Return [N, Z] components of unit variance."""
        return (blocks - self.mean) @ self.directions.T / self.std


def principal_components(blocks: Tensor, count: int) -> Basis:
    """Return the `count` strongest components of [N, P] blocks."""
    mean = blocks.mean(dim=0)
    covariance = torch.cov((blocks - mean).T.double())
    variance, vectors = torch.linalg.eigh(covariance)
    return Basis(mean, vectors[:, -count:].T.flip(0).float(), variance[-count:].flip(0).sqrt().float())


def to_latents(codec: PatchPCACodec, clips: Tensor) -> Tensor:
    """Encode [B, T, C, H, W] clips in [0, 1] to [B, Z, t, h, w] latents."""
    return codec.encode(2 * clips.transpose(1, 2) - 1).latent_dist.mode()


def to_clips(codec: nn.Module, latents: Tensor) -> Tensor:
    """Decode [B, Z, t, h, w] latents to [B, T, C, H, W] clips in [0, 1]."""
    return (codec.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Return the mean over the batch of each clip's peak signal-to-noise ratio, for values in [0, 1]."""
    mse = (a - b).square().flatten(1).mean(dim=1)
    return float((-10 * mse.clamp_min(1e-10).log10()).mean())


def _procrustes(source: Tensor, target: Tensor) -> Tensor:
    """Return the rotation R that makes source @ R.T closest to target."""
    left, _, right = torch.linalg.svd(target.T @ source)
    return left @ right


def _install_(encoder: nn.Linear, decoder: nn.Linear, basis: Basis, rotation: Tensor) -> None:
    encoder.weight.copy_(rotation @ (basis.directions / basis.std[:, None]))
    encoder.bias.copy_(-encoder.weight @ basis.mean)
    decoder.weight.copy_((basis.directions * basis.std[:, None]).T @ rotation.T)
    decoder.bias.copy_(basis.mean)
