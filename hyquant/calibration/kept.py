"""Inputs of layers that one pass over the records keeps for the next, so that there need not be a next."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

KEPT_BYTES = 2**28
"""What is kept at most: the inputs of a few records of a mini model, not those of HunyuanVideo."""


class KeptInputs:
    """The inputs of some layer groups, call by call, as long as they fit.

    Args:
        names: The groups.
        limit_bytes: How much is kept; beyond it everything is dropped.
    """

    def __init__(self, names: Collection[str], limit_bytes: int = KEPT_BYTES) -> None:
        self._room = limit_bytes
        self._inputs: dict[str, list[Tensor]] | None = {name: [] for name in names}

    def note(self, name: str, x: Tensor) -> None:
        """Keep the input of one call, [..., C] in any float dtype."""
        if self._inputs is None or name not in self._inputs:
            return
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32, copy=True)
        self._room -= rows.numel() * rows.element_size()
        if self._room < 0:
            self._inputs = None
        else:
            self._inputs[name].append(rows)

    def taken(self) -> Mapping[str, list[Tensor]] | None:
        """Return the inputs, [M, C] float32 per call, and keep none; None if they did not all fit."""
        found, self._inputs = self._inputs, None
        return found
