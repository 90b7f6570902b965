"""The pieces that a decoder decodes one by one, so that somebody else may decode some of them.

diffusers' autoencoder of HunyuanVideo cuts long and large latents into overlapping tiles, decodes each, and blends. How
it cuts and blends stays its own affair: its `decode` is run twice with stand-ins for the modules that do the work, once
to note the tiles and once to hand it the decoded ones. So the result is that of the serial decode, bit by bit.

`PatchPCACodec` sees nothing beyond its block, so its latents are cut into bands of rows.

B batch   Z latent channels   C colour channels   t, h, w latent frames, height, width   T, H, W those of the video
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from hyquant.errors import ConfigError
from hyquant.models.pca_codec import PatchPCACodec


class PieceDecoder(Protocol):
    """A decoder in pieces."""

    def cut(self, z: Tensor) -> list[Tensor]:
        """Return what is to be decoded, in order; each [B, Z, t, h, w] of its own size."""
        ...

    def shape(self, piece: Tensor) -> tuple[int, ...]:
        """Return the shape of a decoded piece, [B, C, T, H, W]."""
        ...

    def decode(self, piece: Tensor) -> Tensor:
        """Decode one piece."""
        ...

    def join(self, z: Tensor, decoded: list[Tensor]) -> Tensor:
        """Return the video [B, C, T, H, W] of latents z from its decoded pieces, which are changed."""
        ...


class TileDecoder:
    """Pieces of diffusers' autoencoder: its tiles, of both kinds, in the order in which it decodes them.

    Args:
        vae: The autoencoder; its settings of tiling and slicing are followed as they are when something is decoded.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def cut(self, z: Tensor) -> list[Tensor]:
        """Return the tiles; one if the latents are small enough, or tiling is off."""
        tiles: list[Tensor] = []

        def note(tile: Tensor) -> Tensor:
            tiles.append(tile)
            return torch.empty(self.shape(tile), dtype=tile.dtype, device="meta")

        self._serial_decode(z, note)
        return tiles

    def shape(self, piece: Tensor) -> tuple[int, ...]:
        """Return the shape of a decoded tile: the first latent frame is one frame, each other several."""
        size_B, _, frames, height, width = piece.shape
        time, space = self._vae.temporal_compression_ratio, self._vae.spatial_compression_ratio
        return size_B, self._vae.config.out_channels, (frames - 1) * time + 1, height * space, width * space

    def decode(self, piece: Tensor) -> Tensor:
        """Decode one tile."""
        decoded: Tensor = self._vae.decoder(self._vae.post_quant_conv(piece))
        return decoded

    def join(self, z: Tensor, decoded: list[Tensor]) -> Tensor:
        """Let the autoencoder blend the tiles."""
        tiles = iter(decoded)
        return self._serial_decode(z, lambda tile: next(tiles))

    def _serial_decode(self, z: Tensor, decode_tile: Callable[[Tensor], Tensor]) -> Tensor:
        with _stand_ins(self._vae, {"post_quant_conv": nn.Identity(), "decoder": _Call(decode_tile)}):
            video: Tensor = type(self._vae).decode(self._vae, z, return_dict=False)[0]
        return video


class BandDecoder:
    """Pieces of the patch codec: single rows of latents, each of all frames.

    Args:
        codec: The codec.
    """

    def __init__(self, codec: PatchPCACodec) -> None:
        self._codec = codec

    def cut(self, z: Tensor) -> list[Tensor]:
        """Return the rows."""
        return list(torch.split(z, 1, dim=3))

    def shape(self, piece: Tensor) -> tuple[int, ...]:
        """Return the shape of a decoded row."""
        size_B, _, frames, height, width = piece.shape
        time, space = self._codec.temporal_compression_ratio, self._codec.spatial_compression_ratio
        return size_B, self._codec.config.in_channels, (frames - 1) * time + 1, height * space, width * space

    def decode(self, piece: Tensor) -> Tensor:
        """Decode one row."""
        video: Tensor = type(self._codec).decode(self._codec, piece, return_dict=False)[0]
        return video

    def join(self, z: Tensor, decoded: list[Tensor]) -> Tensor:
        """Put the rows one under another."""
        return torch.cat(decoded, dim=3)


def piece_decoder(vae: nn.Module) -> PieceDecoder:
    """Return how a decoder decodes in pieces.

    Raises:
        ConfigError: If it is of a class whose pieces are not known.
    """
    if type(vae) is AutoencoderKLHunyuanVideo:
        return TileDecoder(vae)
    if isinstance(vae, PatchPCACodec):
        return BandDecoder(vae)
    raise ConfigError(
        "a decoder that ranks share must be an AutoencoderKLHunyuanVideo or a PatchPCACodec, whose pieces can be "
        f"decoded apart, but got {type(vae).__name__}; decode on one rank."
    )


def enable_tiling_(vae: nn.Module) -> None:
    """Have a decoder work in tiles, which bounds its memory, where it can; clips that fit one tile are not cut."""
    if isinstance(vae, AutoencoderKLHunyuanVideo):
        vae.enable_tiling()


def decoder_output(video: Tensor, *, return_dict: bool) -> DecoderOutput | tuple[Tensor]:
    """Return a video in the form that diffusers' decoders give it."""
    return DecoderOutput(sample=video) if return_dict else (video,)


class _Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


@contextmanager
def _stand_ins(module: nn.Module, others: dict[str, nn.Module]) -> Iterator[None]:
    """Have other submodules in a module's place while the context lasts."""
    own = {name: getattr(module, name) for name in others}
    try:
        for name, other in others.items():
            setattr(module, name, other)
        yield
    finally:
        for name, kept in own.items():
            setattr(module, name, kept)
