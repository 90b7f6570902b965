"""How ranks are arranged: rings across, Ulysses groups of neighbours along.

Rank r of U x R ranks has place r % U in the Ulysses group r // U, and is in a ring with all ranks of the same place.
Ranks of one Ulysses group are neighbours, because they exchange the most.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import distributed as dist

from hyquant.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """The place of this process among U x R ranks.

    Attributes:
        rank: This process.
        ulysses, ring: Sizes U and R of the two kinds of groups.
        ulysses_group, ring_group: torch's process groups this process is in; None if they have one member.
    """

    rank: int
    ulysses: int
    ring: int
    ulysses_group: dist.ProcessGroup | None = None
    ring_group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return self.ulysses * self.ring

    @property
    def ulysses_rank(self) -> int:
        """Return the place in the Ulysses group."""
        return self.rank % self.ulysses

    @property
    def ring_rank(self) -> int:
        """Return the place in the ring, which is the number of the Ulysses group."""
        return self.rank // self.ulysses

    def ring_neighbour(self, offset: int) -> int:
        """Return the rank that is `offset` places further in the ring."""
        return (self.ring_rank + offset) % self.ring * self.ulysses + self.ulysses_rank

    def close(self) -> None:
        """Release the groups that were made for this mesh."""
        for group in (self.ulysses_group, self.ring_group):
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ConfigError(
            "a denoiser on several ranks cannot be copied, because its hooks and process groups would not be; call "
            "unparallelize_ first."
        )


def build_mesh(rank: int, *, ulysses: int, ring: int) -> Mesh:
    """Make the process groups of U x R ranks; collective over all of them, which are all of torch's default group."""
    along = [[group * ulysses + place for place in range(ulysses)] for group in range(ring)]
    across = [[group * ulysses + place for group in range(ring)] for place in range(ulysses)]
    return Mesh(rank, ulysses, ring, _own_group(along, rank), _own_group(across, rank))


def _own_group(members: list[list[int]], rank: int) -> Any:
    """Return the group this rank is in; torch wants every rank to take part in making every group."""
    if len(members[0]) == 1:
        return None
    if len(members) == 1:
        return dist.group.WORLD
    groups = [dist.new_group(ranks) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)
