"""A linear video codec behind the interface that diffusers' HunyuanVideo pipeline expects of its autoencoder.

`PatchPCACodec` maps every 4x4x4 block of pixels to a few whitened principal components, and back. It is causal like
the autoencoder it stands in for: the first frame is a block of its own, so 1 + 4k frames become 1 + k latent frames.
It is no VAE, has no receptive field beyond its block, and shows slight block artefacts; it is exact, tiny and fast
instead.

    B batch   C colour channels   T frames   H, W height, width
    Z latent channels   t, h, w latent frames, height, width
    P values of one block, in the order (channel, frame, row, column)
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class PatchPCACodec(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Encode video blocks as principal components; see the module's docstring.

    Args:
        latent_channels: Components kept per block.
        spatial_compression_ratio: Block height and width in pixels.
        temporal_compression_ratio: Block length in frames, but for the first frame.
        scaling_factor: What the pipeline divides latents by before decoding; components are whitened, so 1.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 8,
        spatial_compression_ratio: int = 4,
        temporal_compression_ratio: int = 4,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.spatial_compression_ratio = spatial_compression_ratio
        self.temporal_compression_ratio = temporal_compression_ratio
        first = in_channels * spatial_compression_ratio**2
        rest = first * temporal_compression_ratio
        self.first_encoder, self.first_decoder = nn.Linear(first, latent_channels), nn.Linear(latent_channels, first)
        self.rest_encoder, self.rest_decoder = nn.Linear(rest, latent_channels), nn.Linear(latent_channels, rest)
        self.requires_grad_(False)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode [B, C, 1 + 4t, H, W] video in [-1, 1]; the returned distribution is a single point."""
        first, rest = split_blocks(x, self.spatial_compression_ratio, self.temporal_compression_ratio)
        latents_BthwZ = torch.cat([self.first_encoder(first), self.rest_encoder(rest)], dim=1)
        mean_BZthw = latents_BthwZ.movedim(-1, 1)
        point = DiagonalGaussianDistribution(mean_BZthw.repeat(1, 2, 1, 1, 1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=point) if return_dict else (point,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode [B, Z, t, h, w] latents to [B, C, 1 + 4(t-1), H, W] video, nominally in [-1, 1]."""
        z_BthwZ = z.movedim(1, -1)
        first, rest = self.first_decoder(z_BthwZ[:, :1]), self.rest_decoder(z_BthwZ[:, 1:])
        video = join_blocks(first, rest, self.spatial_compression_ratio, self.temporal_compression_ratio)
        return DecoderOutput(sample=video) if return_dict else (video,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode [B, C, T, H, W] video."""
        (point,) = self.encode(sample, return_dict=False)
        return self.decode(point.mode(), return_dict=return_dict)


def split_blocks(video: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Cut [B, C, 1 + length*k, H, W] video into [B, 1, h, w, P] first-frame blocks and [B, k, h, w, P] others.

    Raises:
        ValueError: If the frames or the picture do not divide into blocks.
    """
    frames, height, width = video.shape[2:]
    if (frames - 1) % length or height % size or width % size:
        raise ValueError(
            f"frames must be 1 + a multiple of {length}, height and width multiples of {size}, "
            f"but got {frames} frames of {height}x{width}; crop or pad the video"
        )

    def blocks(part: Tensor, depth: int) -> Tensor:
        for dim, part_size in ((4, size), (3, size), (2, depth)):
            part = torch.unflatten(part, dim, (-1, part_size))
        return part.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # B C t d h s w s -> B t h w (C d s s)

    return blocks(video[:, :, :1], 1), blocks(video[:, :, 1:], length)


def join_blocks(first: Tensor, rest: Tensor, size: int, length: int) -> Tensor:
    """Undo `split_blocks`."""

    def pixels(blocks: Tensor, depth: int) -> Tensor:
        blocks = torch.unflatten(blocks, 4, (-1, depth, size, size))
        return blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)

    return torch.cat([pixels(first, 1), pixels(rest, length)], dim=2)
