"""Render a rank's prompts as they are quantized, and compare their latents with the float model's on the way."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hyquant.calibration.capture import cache_key
from hyquant.latents import LatentTrace, relative_l2
from search.errors import SearchError
from search.workbench import Workbench, split_pairs


@dataclass(frozen=True)
class Rendered:
    """What a rank rendered, prompt by prompt.

    Attributes:
        videos: float32 [T, C, H, W] in [0, 1] each.
        latent_l2: [N] each: relative L2 error of the latents after every step.
    """

    videos: list[Tensor]
    latent_l2: list[Tensor]


def render_compared(bench: Workbench, pairs: Sequence[tuple[str, int]]) -> Rendered:
    """Render prompts with their seeds; the float videos must have been made. No collective call."""
    prompts, seeds = split_pairs(pairs)
    settings = bench.config.workload.settings
    trace = LatentTrace(settings.num_steps)
    with bench.lock.computing():
        videos = bench.model.render(
            prompts, seeds, settings, on_step=bench.lock.let_measurements_pass, on_latents=trace
        )
    references = [_float_trace(bench, prompt, seed) for prompt, seed in pairs]
    errors = [relative_l2(own, reference) for own, reference in zip(trace.traces, references, strict=True)]
    return Rendered(videos, errors)


def _float_trace(bench: Workbench, prompt: str, seed: int) -> Tensor:
    """Return the float model's latents, [N, E], from memory or from the cache."""
    if (prompt, seed) not in bench.float_traces:
        entry = bench.cache.get(cache_key("video", bench.model, prompt, seed, bench.config.workload.settings))
        if entry is None:
            raise SearchError(
                f"float clips must stay in {bench.cache.root} while a study runs, but that of {prompt!r} is gone; run "
                "again"
            )
        bench.float_traces[prompt, seed] = entry.tensors["latents"]
    return bench.float_traces[prompt, seed]
