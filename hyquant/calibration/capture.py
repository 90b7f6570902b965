"""Captured records and float reference videos, taken from a store where it has them.

Both depend on weights, prompt, seed and settings only, never on a quantization, so every trial of every study on the
same weights shares them. Each prompt is an entry of its own: ranks and studies may cut the prompts as they like.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from hyquant.calibration.packing import pack_records, unpack_records
from hyquant.calibration.store import Entry, Store
from hyquant.config import digest
from hyquant.models.base import Record, RenderSettings, VideoModel


def capture_records(
    model: VideoModel, prompts: Sequence[str], seeds: Sequence[int], settings: RenderSettings, store: Store
) -> list[Record]:
    """Return the float denoiser's inputs at every step of every prompt, capturing those that the store lacks.

    The denoiser must be in float: what it is quantized to would change the later steps' inputs.

    Raises:
        ConfigError: If a prompt cannot be rendered with these settings.
    """
    records: list[Record] = []
    for prompt_index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):

        def build(prompt: str = prompt, seed: int = seed) -> Entry:
            return pack_records(model.capture([prompt], [seed], settings))

        entry = store.get_or_build(_key("records", model, prompt, seed, settings), build)
        records.extend(replace(record, prompt_index=prompt_index) for record in unpack_records(entry))
    return records


def reference_videos(
    model: VideoModel, prompts: Sequence[str], seeds: Sequence[int], settings: RenderSettings, store: Store
) -> list[Tensor]:
    """Return the float denoiser's videos, float32 [T, C, H, W] in [0, 1], rendering those that the store lacks.

    The denoiser must be in float.

    Raises:
        ConfigError: If a prompt cannot be rendered with these settings.
    """
    keys = [_key("video", model, prompt, seed, settings) for prompt, seed in zip(prompts, seeds, strict=True)]
    found = {key: store.get(key) for key in keys}
    videos = {key: entry.tensors["video"] for key, entry in found.items() if entry is not None}
    missing = {key: (prompt, seed) for key, prompt, seed in zip(keys, prompts, seeds, strict=True) if key not in videos}
    rendered = model.render(
        [prompt for prompt, _ in missing.values()], [seed for _, seed in missing.values()], settings
    )
    for (key, (prompt, seed)), video in zip(missing.items(), rendered, strict=True):
        store.put(key, {"video": video}, {"prompt": prompt, "seed": seed})
        videos[key] = video
    return [videos[key] for key in keys]


def _key(what: str, model: VideoModel, prompt: str, seed: int, settings: RenderSettings) -> str:
    """Return the name of what one prompt gives; the batch size does not matter to it."""
    clip = settings.model_dump(mode="json", exclude={"batch_size"})
    return (
        f"{what}-{digest({'model': model.fingerprint(), 'prompt': prompt, 'seed': seed, 'settings': clip}, length=32)}"
    )
