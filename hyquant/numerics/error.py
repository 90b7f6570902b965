"""How far a tensor is from its reference: signal-to-quantization-noise ratio and cosine, in float32."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """Return 10 log10(||reference||^2 / ||reference - actual||^2) in decibels.

    Args:
        reference: Any shape.
        actual: Same shape.

    Returns:
        Decibels, higher is closer; inf if both are equal, -inf if the reference is zero and they differ.
    """
    return sqnr_db_of_parts([(reference, actual)])


def sqnr_db_of_parts(parts: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return `sqnr_db` of a tensor and its reference that are given part by part: (reference, actual)."""
    signal = noise = 0.0
    for reference, actual in parts:
        signal += _norm(reference) ** 2
        noise += _norm(reference.float() - actual.float()) ** 2
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise) of two powers, sums of squares; see `sqnr_db` for zeros."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosine(reference: Tensor, actual: Tensor) -> float:
    """Return the cosine of the angle between two tensors seen as vectors, in [-1, 1]; 0 if one of them is zero."""
    norms = _norm(reference) * _norm(actual)
    return float(torch.dot(reference.flatten().float(), actual.flatten().float())) / norms if norms > 0 else 0.0


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.float()))
