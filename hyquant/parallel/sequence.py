"""Sequence parallelism of a denoiser: `parallelize_` and its undoing.

Every rank is given the full inputs and returns the full outputs, so whatever surrounds the denoiser (pipeline, clock,
recording of its calls) stays as it is. The whole weights are on every rank; it is activations and work that are shared.
Ranks must call the denoiser together, with equal inputs; no gradients flow.
"""

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hyquant.distributed import Group
from hyquant.errors import ConfigError
from hyquant.models.attentions import attention_blocks, put_back_attentions_, replace_attentions_
from hyquant.parallel.attention import SpanningAttention
from hyquant.parallel.mesh import Mesh, build_mesh
from hyquant.parallel.strips import Strips

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_hyquant_parallelized"


@dataclass(frozen=True)
class _Parallelized:
    mesh: Mesh
    handles: list[RemovableHandle]


def parallelize_(denoiser: nn.Module, *, ulysses: int, ring: int, group: Group) -> None:
    """Have the ranks of a group share the tokens of each denoiser call; collective.

    Quantized denoisers take part, and may be quantized or restored before or after. With one rank nothing is changed.

    Args:
        denoiser: diffusers' `HunyuanVideoTransformer3DModel`, the same on every rank; changed in place.
        ulysses: Ranks that exchange heads for tokens; must divide the number of heads.
        ring: Ranks around which keys and values travel; `ulysses * ring` are all ranks of the group.
        group: All ranks.

    Raises:
        ConfigError: If the degrees do not fit group, heads or device, ranks disagree, or the denoiser cannot be
            shared: another class, an attention back end that a ring cannot use, or attention in float8.
    """
    _require_degrees(denoiser, ulysses, ring, group)
    if group.world_size == 1:
        return
    found = group.all_gather([ulysses, ring])
    if any(other != [ulysses, ring] for other in found):
        raise ConfigError(
            f"all ranks must be given the same degrees, but (ulysses, ring) are {found} by rank; give all the same."
        )
    from hyquant.models.sequence import cut_tokens_

    mesh = build_mesh(group.rank, ulysses=ulysses, ring=ring)
    strips = Strips(mesh)
    try:
        replace_attentions_(denoiser, SpanningAttention(strips))
    except ConfigError:
        mesh.close()
        raise
    setattr(denoiser, _ATTRIBUTE, _Parallelized(mesh, cut_tokens_(denoiser, strips.cut, strips.join)))
    logger.info("parallelized ulysses=%d ring=%d", ulysses, ring)


def unparallelize_(denoiser: nn.Module) -> None:
    """Undo `parallelize_`: every hook and attention is what it was. A denoiser of one rank is left as it is."""
    state: _Parallelized | None = vars(denoiser).get(_ATTRIBUTE)
    if state is None:
        return
    for handle in state.handles:
        handle.remove()
    put_back_attentions_(denoiser)
    state.mesh.close()
    delattr(denoiser, _ATTRIBUTE)


def require_ring_on(device_type: str) -> None:
    """Check that a ring can run on a kind of device.

    Raises:
        ConfigError: If attention there does not tell its log-sum-exp.
    """
    if device_type == "npu":
        raise ConfigError(
            "a ring needs an attention that returns its log-sum-exp, but that of an NPU does not; use ring 1 and "
            "Ulysses over all ranks."
        )


def _require_degrees(denoiser: nn.Module, ulysses: int, ring: int, group: Group) -> None:
    from hyquant.models.sequence import require_cuttable

    if ulysses < 1 or ring < 1 or ulysses * ring != group.world_size:
        raise ConfigError(
            f"ulysses times ring must be the number of ranks, but {ulysses} x {ring} is not {group.world_size}; start "
            f"{max(ulysses * ring, 1)} ranks or choose other degrees."
        )
    if group.world_size == 1:
        return
    if _ATTRIBUTE in vars(denoiser):
        raise ConfigError("a denoiser must be parallelized once, but it is already; call unparallelize_ first.")
    require_cuttable(denoiser)
    blocks = attention_blocks(denoiser)
    for heads in {block.heads for block in blocks}:
        if heads % ulysses:
            fitting = [degree for degree in range(1, heads + 1) if heads % degree == 0]
            raise ConfigError(
                f"the Ulysses degree must divide the {heads} heads, but is {ulysses}; choose one of {fitting} and let "
                "the ring make up the rest."
            )
    if ring > 1:
        _require_ring(denoiser, [block.module for block in blocks])


def _require_ring(denoiser: nn.Module, paths: list[str]) -> None:
    require_ring_on(next(denoiser.parameters()).device.type)
    for path in paths:
        block: Any = denoiser.get_submodule(path)
        if block.attn.processor._attention_backend is not None:
            raise ConfigError(
                f"a ring attends by its own means, because it needs the log-sum-exp, but {path} has the attention back "
                f"end {block.attn.processor._attention_backend}; reset it or use ring 1."
            )
