"""The strips of tokens that ranks work on.

S tokens are cut, in order, into one strip per rank, of s = ceil(S / P) tokens each; rank r has tokens r s to (r + 1) s.
Where the tokens do not suffice, copies of the last one fill the strips up. A copy is a query like others, so that it
stays what the last token is and brings no value that was not there; it is never a key, so nothing sees it; and it is
dropped when the strips are joined. So any number of tokens is divided exactly.
"""

import torch
from torch import Tensor
from torch import distributed as dist

from hyquant.parallel.exchange import all_gathered
from hyquant.parallel.mesh import Mesh


class Strips:
    """Cuts and joins tokens; knows from the last cut how many there are.

    Attributes:
        mesh: The ranks.
        num_tokens: S, of the denoiser call in progress.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.num_tokens = 0

    @property
    def length(self) -> int:
        """Return s, the number of tokens of one strip."""
        return -(-self.num_tokens // self.mesh.size)

    def num_keys(self, ring_rank: int) -> int:
        """Return how many of the tokens of one Ulysses group, U s of them, are no copies."""
        length = self.mesh.ulysses * self.length
        return min(max(self.num_tokens - ring_rank * length, 0), length)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's strip of a tensor whose dimension `dim` is all tokens."""
        self.num_tokens = x.shape[dim]
        first = self.mesh.rank * self.length
        wanted = torch.arange(first, first + self.length, device=x.device).clamp(max=self.num_tokens - 1)
        return x.index_select(dim, wanted)

    def join(self, x: Tensor, dim: int) -> Tensor:
        """Return the strips of all ranks as one tensor, on every rank."""
        return all_gathered(x, dim, dist.group.WORLD, self.mesh.size).narrow(dim, 0, self.num_tokens)
