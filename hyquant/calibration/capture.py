"""Captured records and float reference videos, taken from a store where it has them.

Both depend on weights, prompt, seed, settings and software only, never on a quantization, so every trial of every
study on the same weights shares them. Each prompt is an entry of its own: ranks and studies may cut the prompts as
they like, and what was interrupted goes on with the next prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from pydantic import JsonValue
from torch import Tensor

from hyquant.calibration.records import INDEX, StoredRecords, are_intact, write_records
from hyquant.calibration.store import Store, mark_used
from hyquant.config import digest
from hyquant.latents import LatentTrace
from hyquant.models.base import Record, RenderSettings, VideoModel
from hyquant.software import software_versions


class Clip(NamedTuple):
    """What the float model renders of one prompt: the video, and its latents after every step, [N, E] float32."""

    video: Tensor
    latents: Tensor


def capture_records(
    model: VideoModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: RenderSettings,
    store: Store,
    *,
    on_prompt: Callable[[], None] | None = None,
) -> StoredRecords:
    """Return the float denoiser's inputs at every step of every prompt, capturing those that the store lacks.

    All capturing is done on return; the records are read from the store when they are iterated. The denoiser must be in
    float, because what it is quantized to would change the later steps' inputs, and must not be observed.

    Args:
        model: The model.
        prompts: What to render.
        seeds: One per prompt.
        settings: Clip and sampling.
        store: Where records are kept; prompts that are there intact are not captured again.
        on_prompt: Called after each prompt.

    Raises:
        ConfigError: If a prompt cannot be rendered with these settings.
    """
    folders = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        key = cache_key("records", model, prompt, seed, settings)
        folder = store.folder(key)
        mark_used(folder / INDEX)  # before it is judged: who tidies up leaves alone what was used a moment ago
        if not are_intact(folder):
            store.fetch_folder(key, are_intact)
            if not are_intact(folder):
                write_records(folder, partial(model.capture, [prompt], [seed], settings))
        store.give_folder(key, are_intact)
        folders.append(folder)
        if on_prompt is not None:
            on_prompt()
    return StoredRecords(folders)


def capture_in_memory(
    model: VideoModel, prompts: Sequence[str], seeds: Sequence[int], settings: RenderSettings
) -> list[Record]:
    """Return the denoiser's inputs at every step of every prompt, all in memory and without a store: for small clips.

    Raises:
        ConfigError: If a prompt cannot be rendered with these settings.
    """
    records: list[Record] = []
    model.capture(prompts, seeds, settings, records.append)
    return records


def reference_videos(
    model: VideoModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: RenderSettings,
    store: Store,
    *,
    on_step: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Return the float denoiser's videos, float32 [T, C, H, W] in [0, 1], as `reference_clips` has them."""
    return [clip.video for clip in reference_clips(model, prompts, seeds, settings, store, on_step=on_step)]


def reference_clips(
    model: VideoModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: RenderSettings,
    store: Store,
    *,
    on_step: Callable[[], None] | None = None,
) -> list[Clip]:
    """Return the float denoiser's videos with their latents by step, rendering those that the store lacks.

    The denoiser must be in float. `on_step` is called after every denoising step.

    Raises:
        ConfigError: If a prompt cannot be rendered with these settings.
    """
    keys = [cache_key("video", model, prompt, seed, settings) for prompt, seed in zip(prompts, seeds, strict=True)]
    found = {key: store.get(key) for key in keys}
    clips = {key: Clip(**entry.tensors) for key, entry in found.items() if entry is not None}
    missing = {key: (prompt, seed) for key, prompt, seed in zip(keys, prompts, seeds, strict=True) if key not in clips}
    trace = LatentTrace(settings.num_steps)
    rendered = model.render(
        [prompt for prompt, _ in missing.values()],
        [seed for _, seed in missing.values()],
        settings,
        on_step=on_step,
        on_latents=trace,
    )
    for (key, (prompt, seed)), *parts in zip(missing.items(), rendered, trace.traces, strict=True):
        clips[key] = Clip(*parts)
        store.keep(key, clips[key]._asdict(), {"prompt": prompt, "seed": seed})
    return [clips[key] for key in keys]


def rendering_software(model: VideoModel) -> dict[str, str]:
    """Return what besides weights and inputs decides about the bits of a video: versions, and the kind of device."""
    versions = software_versions()
    return {"torch": versions["torch"], "diffusers": versions["diffusers"], "device": model.device.type}


def cache_key(
    what: str,
    model: VideoModel,
    prompt: str,
    seed: int,
    settings: RenderSettings,
    *,
    software: Mapping[str, str] | None = None,
) -> str:
    """Return the name of what one prompt gives, "records" or "video": the digest of all that it depends on.

    That is the model's fingerprint (weights of denoiser, text encoders and decoder, scheduler, prompt template), its
    kind and dtype, the prompt, the seed, the settings but for the batch size, which changes roundings only, and the
    software: that of this process, or what is given to find what another one left.
    """
    identity: dict[str, JsonValue] = {
        "model": model.fingerprint(),
        "kind": model.kind,
        "dtype": str(model.dtype),
        "prompt": prompt,
        "seed": seed,
        "settings": settings.model_dump(mode="json", exclude={"batch_size"}),
        "software": dict(rendering_software(model) if software is None else software),
    }
    return f"{what}-{digest(identity, length=32)}"
