"""Statistics of q, k and v of a study: gathered once per statistic and ratios, then kept in memory and in the store.

They depend on the model, the calibration prompts and the shares that int8 attention keeps, and not on which blocks a
config selects: every block is observed in one float pass.
"""

from pydantic import JsonValue

from hyquant.attention.observe import observe_attention
from hyquant.attention.stats import (
    HeadStats,
    Ratios,
    merge_head_stats,
    pack_head_stats,
    ratios_of,
    unpack_head_stats,
)
from hyquant.config import FA3Int8, digest
from hyquant.models.attentions import attention_blocks
from hyquant.plan import QuantPlan
from hyquant.quantize import needs_attention_stats
from search.stages import Stages
from search.workbench import Workbench, stats_key


def prepare_attention(bench: Workbench, plan: QuantPlan, stages: Stages) -> dict[str, HeadStats] | None:
    """Return the statistics of q, k and v that a plan needs by block name, None if it needs none. Collective.

    The denoiser must be in float.

    Raises:
        TrialFailed: On every rank, if one rank cannot observe.
    """
    config = plan.config.attention
    if not isinstance(config, FA3Int8) or not needs_attention_stats(plan):
        return None
    key = _key(bench, ratios_of(config))
    is_there = stages.run("calibrate", lambda: _load(bench, key))
    if not all(bench.group.all_gather(is_there)):
        own = stages.run("calibrate", lambda: _observe_shard(bench, config))
        with stages.timed("calibrate"):
            bench.head_stats[key] = merge_head_stats(own, bench.group)
        stages.run("calibrate", lambda: _store(bench, key))
    return bench.head_stats[key]


def _load(bench: Workbench, key: str) -> bool:
    """Read what the store has into memory, and say whether the statistics are there."""
    entry = None if key in bench.head_stats else bench.cache.get(key)
    if entry is not None:
        bench.head_stats[key] = unpack_head_stats(entry.tensors)
    return key in bench.head_stats


def _observe_shard(bench: Workbench, config: FA3Int8) -> dict[str, HeadStats]:
    """Return statistics over this rank's records, none if it has no prompt. No collective call."""
    if not bench.calibration:
        return {}
    denoiser = bench.model.denoiser
    with bench.lock.computing():
        records = bench.records()  # captured before the denoiser is watched, or capturing would be observed too
        blocks = attention_blocks(denoiser)
        return observe_attention(denoiser, blocks, records, bench.model.clock, config)


def _store(bench: Workbench, key: str) -> None:
    if bench.group.rank == 0:
        bench.cache.keep(key, pack_head_stats(bench.head_stats[key]), {"blocks": list(bench.head_stats[key])})


def _key(bench: Workbench, ratios: Ratios) -> str:
    identity: dict[str, JsonValue] = {"stats": stats_key(bench), "ratios": list(ratios)}
    return f"attention-{digest(identity, length=32)}"
