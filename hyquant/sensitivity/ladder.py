"""From a sensitivity map to a ladder: nested exclusion sets, each with more of the most sensitive layers than the last.

Rung 0 excludes nothing. Rung n excludes the s_n most sensitive bands, s = 1, 2, 3, 4, 6, 8, 11, 16, 23, ... (powers of
the square root of 2, rounded): near the bottom a rung is one band, where one band decides; higher up it is many. The
last rung leaves at least a tenth of the bands quantized.
"""

from collections.abc import Sequence
from itertools import pairwise

from pydantic import model_validator

from hyquant.config import FrozenModel, digest
from hyquant.sensitivity.bands import patterns_of
from hyquant.sensitivity.map import SensitivityMap, by_band

_LARGEST_SHARE = 0.9


class Ladder(FrozenModel):
    """Nested exclusion sets.

    Attributes:
        source: Digest of the map's subject.
        layers: Canonical names of all layers that the map covers, in model order.
        rungs: What each rung excludes besides all rungs before it, the most sensitive first; rung 0 is left out.
    """

    source: str
    layers: tuple[str, ...]
    rungs: tuple[tuple[str, ...], ...]

    @property
    def height(self) -> int:
        """Return the number of the last rung."""
        return len(self.rungs)

    def excluded(self, rung: int) -> tuple[str, ...]:
        """Return the canonical names that a rung leaves in float."""
        return tuple(name for added in self.rungs[:rung] for name in added)

    def patterns(self, rung: int) -> tuple[str, ...]:
        """Return the exclude patterns of a rung."""
        return patterns_of(self.excluded(rung), self.layers)

    @model_validator(mode="after")
    def _names_each_layer_once(self) -> "Ladder":
        names = self.excluded(self.height)
        if len(set(names)) < len(names) or not set(names) <= set(self.layers) or not all(self.rungs):
            raise ValueError("the rungs of a ladder must add layers of the map, each once; measure the map again")
        return self


def ladder(found: SensitivityMap) -> Ladder:
    """Order a map's bands by sensitivity into nested exclusion sets; of equal ones the model's first comes first."""
    sensitivity = by_band(found)
    bands = sorted(found.subject.bands, key=lambda band: -sensitivity[band.block, band.kind])
    sizes = rung_sizes(len(bands))
    return Ladder(
        source=digest(found.subject),
        layers=tuple(name for band in found.subject.bands for name in band.layers),
        rungs=tuple(
            tuple(name for band in bands[start:stop] for name in band.layers) for start, stop in pairwise([0, *sizes])
        ),
    )


def rung_sizes(num_bands: int) -> Sequence[int]:
    """Return how many bands each rung excludes."""
    sizes = sorted({round(2 ** (exponent / 2)) for exponent in range(2 * num_bands.bit_length() + 1)})
    return [size for size in sizes if size <= _LARGEST_SHARE * num_bands]
