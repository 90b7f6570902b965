"""Attention over the tokens of all ranks, while each rank has the queries of its own strip.

Ulysses (U ranks): heads are exchanged for tokens, so that a rank has U strips but 1/U of the heads; heads do not mix in
attention, so each rank attends for its heads, by the block's own attention, and the exchange is undone.

Ring (R Ulysses groups): keys and values travel from group to group; attention over each group's is put together by its
log-sum-exp.

Text is the same on all ranks: each takes its share of the heads from its own copy. In a ring, text queries look at the
keys that their rank has, and the parts are gathered; they are summed in the order of the ring everywhere, so that text
stays equal on all ranks bit by bit.

Source: Jacobs et al., arXiv:2309.14509 (Ulysses); Liu et al., arXiv:2310.01889 (ring); Fang and Zhao, arXiv:2405.07719
(both at once).

B batch   S tokens   s tokens of one rank   L text tokens   A heads   D head dim   U, R as above
"""

import torch
from torch import Tensor

from hyquant.models.attentions import OwnAttention
from hyquant.parallel.exchange import (
    all_gathered,
    all_heads,
    heads_for_tokens,
    own_heads,
    passed_on,
    tokens_for_heads,
)
from hyquant.parallel.mesh import Mesh
from hyquant.parallel.softmax import Partial, joined_queries, merged, of_queries, partial_attention
from hyquant.parallel.strips import Strips


class SpanningAttention:
    """An `Attend` over all ranks; the same for every block.

    Args:
        strips: How the tokens are cut.
    """

    def __init__(self, strips: Strips) -> None:
        self.strips = strips

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, own: OwnAttention) -> Tensor:
        """Attend from a strip of video and all text to the video of all ranks and all text.

        Args:
            q: [B, s + L, A, D], the strip followed by the text.
            k: As q.
            v: As q.
            valid: [B, s + L] bool, False for padded text; None for none.
            own: What attends over tokens that are all here.

        Returns:
            [B, s + L, A, D].
        """
        mesh, num_video = self.strips.mesh, self.strips.length
        video = tokens_for_heads([x[:, :num_video] for x in (q, k, v)], mesh)  # each B (U s) A/U D
        text = [own_heads(x[:, num_video:], mesh) for x in (q, k, v)]  # each B L A/U D
        text_valid = None if valid is None else valid[:, num_video:]
        if mesh.ring == 1:
            video_out, text_out = self._attend_here(video, text, text_valid, own)
        else:
            video_out, text_out = self._attend_around(video, text, text_valid)
        return torch.cat((heads_for_tokens(video_out, mesh), all_heads(text_out, mesh)), dim=1)

    def _attend_here(
        self, video: list[Tensor], text: list[Tensor], text_valid: Tensor | None, own: OwnAttention
    ) -> tuple[Tensor, Tensor]:
        num_keys = self.strips.num_keys(0)
        k, v = (torch.cat((x[:, :num_keys], y), dim=1) for x, y in zip(video[1:], text[1:], strict=True))
        valid = None if text_valid is None else torch.nn.functional.pad(text_valid, (num_keys, 0), value=True)
        out = own(torch.cat((video[0], text[0]), dim=1), k, v, valid)
        num_video = video[0].shape[1]
        return out[:, :num_video], out[:, num_video:]

    def _attend_around(
        self, video: list[Tensor], text: list[Tensor], text_valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mesh, num_video = self.strips.mesh, video[0].shape[1]
        q, travelling = torch.cat((video[0], text[0]), dim=1), torch.stack(video[1:])
        arrived = passed_on(travelling, mesh)
        at_text = partial_attention(q, text[1], text[2], text_valid)
        at_own = self._attend_over(q, travelling, mesh.ring_rank)
        video_queries, text_queries = slice(num_video), slice(num_video, None)
        video_part = merged([of_queries(at_text, video_queries), of_queries(at_own, video_queries)])
        for distance in range(1, mesh.ring):
            travelling = arrived()
            if distance < mesh.ring - 1:
                arrived = passed_on(travelling, mesh)
            origin = (mesh.ring_rank - distance) % mesh.ring
            video_part = merged([video_part, self._attend_over(video[0], travelling, origin)])
        text_parts = _gathered(of_queries(at_own, text_queries), mesh)
        text_part = merged([of_queries(at_text, text_queries), *text_parts])
        both = joined_queries([video_part, text_part]).out.to(q.dtype)
        return both[:, video_queries], both[:, text_queries]

    def _attend_over(self, q: Tensor, keys_and_values: Tensor, ring_rank: int) -> Partial:
        k, v = keys_and_values[:, :, : self.strips.num_keys(ring_rank)]
        return partial_attention(q, k, v)


def _gathered(part: Partial, mesh: Mesh) -> list[Partial]:
    """Return the parts of all ranks of the ring, in order."""
    both = torch.cat((part.out, part.lse.to(part.out.dtype)), dim=3)
    return [
        Partial(other[..., :-1], other[..., -1:])
        for other in all_gathered(both[None], 0, mesh.ring_group, mesh.ring).unbind()
    ]
