"""A decoder whose pieces are decoded by several ranks: `parallelize_vae_` and its undoing.

Every rank is given the full latents, decodes its pieces, receives all others, and returns the full video, as if it had
decoded alone. Pieces are dealt out by size, largest first, each to the rank with the least so far.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hyquant.distributed import Group
from hyquant.errors import ConfigError

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_hyquant_serial"


def parallelize_vae_(vae: nn.Module, group: Group) -> None:
    """Have the ranks of a group share the work of each `decode`; ranks must call it together, with equal latents.

    The settings of tiling and slicing stay the caller's: what is decoded in one piece is decoded by one rank.

    Args:
        vae: diffusers' `AutoencoderKLHunyuanVideo` or the mini model's `PatchPCACodec`; changed in place.
        group: All ranks; with one nothing is changed.

    Raises:
        ConfigError: If it is another decoder, or is shared already.
    """
    from hyquant.models.vae_pieces import decoder_output, piece_decoder

    if _ATTRIBUTE in vars(vae):
        raise ConfigError("a decoder must be shared once, but it is already; call unparallelize_vae_ first.")
    pieces = piece_decoder(vae)
    if group.world_size == 1:
        return

    @torch.no_grad()
    def decode(z: Tensor, return_dict: bool = True) -> Any:
        todo = pieces.cut(z)
        owners = deal([piece.numel() for piece in todo], group.world_size)
        logger.info("decode pieces=%d ranks=%d", len(todo), group.world_size)
        if len(todo) < group.world_size:
            logger.warning("a decode of %d pieces leaves ranks idle; enable tiling or use smaller tiles", len(todo))
        mine = [index for index, owner in enumerate(owners) if owner == group.rank]
        own = {index: pieces.decode(todo[index]).contiguous() for index in mine}
        decoded = [
            _shared(own.get(index), pieces.shape(piece), like=z, owner=owner)
            for index, (piece, owner) in enumerate(zip(todo, owners, strict=True))
        ]
        return decoder_output(pieces.join(z, decoded), return_dict=return_dict)

    vars(vae)[_ATTRIBUTE] = True
    vars(vae)["decode"] = decode


def unparallelize_vae_(vae: nn.Module) -> None:
    """Undo `parallelize_vae_`; a decoder that is not shared is left as it is."""
    if vars(vae).pop(_ATTRIBUTE, None) is not None:
        del vars(vae)["decode"]


def deal(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """Return which rank each piece goes to: largest first, to the rank that has least, the first of equals.

    Source: Graham, "Bounds on multiprocessing timing anomalies" (1969): at most 4/3 of the best division's maximum.

    Example:
        >>> deal([1, 5, 4, 3], 2)
        [1, 0, 1, 0]
    """
    load, owners = [0] * num_ranks, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = load.index(min(load))
        load[owners[index]] += sizes[index]
    return owners


def _shared(own: Tensor | None, shape: tuple[int, ...], *, like: Tensor, owner: int) -> Tensor:
    """Return a piece on every rank."""
    piece = torch.empty(shape, dtype=like.dtype, device=like.device) if own is None else own
    assert (piece.shape, piece.dtype) == (shape, like.dtype)
    dist.broadcast(piece, src=owner)
    return piece
