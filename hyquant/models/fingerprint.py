"""Digests of weights: what tells one set of weights from another in caches and exports.

A model's fingerprint is `DENOISER-REST`: the digest of the denoiser, a dash, and the digest of everything else that
shapes a video (text encoders, decoder, scheduler, prompt template). An export can so be checked against a denoiser
alone.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from hyquant.config import digest

_LENGTH = 16


class TensorsDigest:
    """A digest of tensors that are given piece by piece, in the order of their names; see `tensors_digest`.

    Args:
        config: The configuration they come with.
    """

    def __init__(self, config: JsonValue) -> None:
        self._state = hashlib.sha256(digest(config, length=64).encode())

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Go on with the next tensor."""
        self._state.update(f"{name}:{dtype}:{shape};".encode())

    def add(self, piece: Tensor) -> None:
        """Take the next elements of the tensor: contiguous, on the CPU, in its dtype."""
        self._state.update(piece.reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Return 16 hex digits."""
        return self._state.hexdigest()[:_LENGTH]


def tensors_digest(tensors: Mapping[str, Tensor], config: JsonValue) -> str:
    """Return 16 hex digits of the SHA-256 over a configuration and tensors: names, dtypes, shapes and bytes."""
    state = TensorsDigest(config)
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        state.begin(name, tensor.dtype, tuple(tensor.shape))
        state.add(tensor)
    return state.hexdigest()


def denoiser_digest(denoiser: nn.Module) -> str:
    """Return the digest of a float denoiser's weights and configuration: the first half of a model's fingerprint.

    A configuration counts if the module has a mapping of that name, as those of diffusers do.
    """
    return denoiser_digest_later(denoiser)()


def denoiser_digest_later(denoiser: nn.Module) -> Callable[[], str]:
    """Return what computes `denoiser_digest` of the tensors a denoiser has now; they must not change meanwhile."""
    config = getattr(denoiser, "config", None)
    tensors = {name: tensor for name, tensor in denoiser.state_dict().items() if isinstance(tensor, Tensor)}
    return partial(tensors_digest, tensors, plain_config(config if isinstance(config, Mapping) else {}))


def denoiser_part(fingerprint: str) -> str:
    """Return the part of a model's fingerprint that belongs to its denoiser."""
    return fingerprint.partition("-")[0]


def are_same_weights(one: str, other: str) -> bool:
    """Return whether two fingerprints can be of one model; if either is a denoiser's alone, only denoisers count."""
    if "-" in one and "-" in other:
        return one == other
    return denoiser_part(one) == denoiser_part(other)


def plain_config(config: Mapping[str, object]) -> JsonValue:
    """Return a configuration as JSON, without the entries that are private to the library that wrote it."""
    return {key: _plain(value) for key, value in sorted(config.items()) if not key.startswith("_")}


def _plain(value: object) -> JsonValue:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value)
