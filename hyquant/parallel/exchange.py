"""What ranks send each other while they denoise; on the device's own back end, nothing passes through the host.

Only operations that gloo, nccl and hccl share are used. None of them is differentiable here.

B batch   S tokens   s tokens of one rank   A heads   D head dim   U ranks of a Ulysses group
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributed as dist

from hyquant.parallel.mesh import Mesh


def all_gathered(x: Tensor, dim: int, group: dist.ProcessGroup | None, size: int) -> Tensor:
    """Return the tensors of all ranks of a group, equal in shape, one after another along a dimension."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim=dim)


def tokens_for_heads(tensors: list[Tensor], mesh: Mesh) -> list[Tensor]:
    """Give away heads for tokens: from [B, s, A, D] to [B, U s, A / U, D], the Ulysses group's tokens in rank order."""
    if mesh.ulysses == 1:
        return tensors
    parts = torch.stack([torch.unflatten(x, 2, (mesh.ulysses, -1)) for x in tensors])  # n B s U a D
    given = _all_to_all(parts.movedim(3, 0), mesh)  # U n B s a D
    return list(given.movedim(0, 2).flatten(2, 3).unbind())


def heads_for_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """Undo `tokens_for_heads`: from [B, U s, A / U, D] to [B, s, A, D]."""
    if mesh.ulysses == 1:
        return x
    given = _all_to_all(torch.unflatten(x, 1, (mesh.ulysses, -1)).movedim(1, 0), mesh)  # U B s a D
    return given.movedim(0, 2).flatten(2, 3)


def own_heads(x: Tensor, mesh: Mesh) -> Tensor:
    """Return this rank's share of the heads of [B, S, A, D], which all ranks have: [B, S, A / U, D]."""
    return x.chunk(mesh.ulysses, dim=2)[mesh.ulysses_rank]


def all_heads(x: Tensor, mesh: Mesh) -> Tensor:
    """Undo `own_heads`."""
    return x if mesh.ulysses == 1 else all_gathered(x, 2, mesh.ulysses_group, mesh.ulysses)


def passed_on(x: Tensor, mesh: Mesh) -> Callable[[], Tensor]:
    """Start to send a tensor to the next rank of the ring; calling the result waits for the one before's."""
    x = x.contiguous()
    arriving = torch.empty_like(x)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, mesh.ring_neighbour(1), mesh.ring_group),
            dist.P2POp(dist.irecv, arriving, mesh.ring_neighbour(-1), mesh.ring_group),
        ]
    )

    def arrived() -> Tensor:
        for work in works:
            work.wait()
        return arriving

    return arrived


def _all_to_all(x: Tensor, mesh: Mesh) -> Tensor:
    """Send entry u of the first dimension to rank u of the Ulysses group; entry u of the result is from rank u."""
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=mesh.ulysses_group)
    return received
