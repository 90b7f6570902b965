"""Where the time of a study's model goes and what its recipes can gain at most: measured here, or on paper.

The profile of a study is measured once per model, shape and machine, and kept in the store's cache. Ceilings follow
from it for every exclusion set of the space. On paper the same is worked out for a device that a YAML file describes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from pydantic import JsonValue

from hyquant.calibration.store import Entry
from hyquant.config import FA3Int8, LayerSelection, QuantConfig, W8A8Dynamic, digest
from hyquant.cost import (
    ATTENTION,
    DeviceProfile,
    Tokens,
    Work,
    modes_of,
    operations_by_kind,
    seconds_of,
    work_of,
)
from hyquant.devices import resolve_device
from hyquant.errors import ConfigError
from hyquant.kernels.selection import FORCED
from hyquant.kernels.x86_build import source_digest
from hyquant.latency import LatencyBench, loop_latency, steps_by_mode
from hyquant.latency_report import LatencyReport
from hyquant.layers import first_match
from hyquant.models.attentions import AttentionBlock, attention_blocks
from hyquant.models.base import DeploymentShape, RenderSettings, VideoModel
from hyquant.models.names import LayerGroup, layer_groups
from hyquant.models.skeleton import published_skeleton
from hyquant.plan import QuantPlan, build_plan
from hyquant.profile import DenoiserProfile, ceiling, profile_denoiser
from spaces.space import SearchSpace

if TYPE_CHECKING:
    from search.workbench import Workbench

FULL_TEXT_TOKENS = 256
"""Text tokens of HunyuanVideo's published pipeline."""

_SEED = LayerSelection(exclude=("*img_mod*", "*modulation*", "*fc2*"))
_WITH_FC2 = LayerSelection(exclude=("*img_mod*", "*modulation*"))

PAPER_RECIPES: Mapping[str, QuantConfig] = {
    "W8A8, seed's layers": QuantConfig(linear=W8A8Dynamic(), layers=_SEED),
    "W8A8, also fc2": QuantConfig(linear=W8A8Dynamic(), layers=_WITH_FC2),
    "W8A8, also fc2, int8 attention": QuantConfig(linear=W8A8Dynamic(), layers=_WITH_FC2, attention=FA3Int8()),
}
"""What the table on paper compares; the last one as if every device had a kernel for int8 attention."""

_LISTED = 4
_LONG_STEP_S = 0.5


@dataclass(frozen=True)
class PaperRow:
    """One denoiser step of HunyuanVideo 13B on paper, by kind.

    Attributes:
        kind: The kind of layer.
        operations: Multiplications and additions.
        share: Of all operations.
        float_s: Seconds in the device's float dtype.
        int8_s: Seconds with int8 operands.
    """

    kind: str
    operations: int
    share: float
    float_s: float
    int8_s: float


def ceilings(profile: DenoiserProfile, space: SearchSpace) -> dict[str, float]:
    """Return how many times faster a step can get at most, by exclusion set of a space or rung of its ladder."""
    names = [name for part in profile.parts if part.kind != ATTENTION for name in part.layers]
    included = [name for name in names if first_match(name, space.include)]
    return {
        label: ceiling(profile, [name for name in included if not first_match(name, patterns)])
        for label, patterns in space.exclusion_sets.items()
    }


def ceiling_sentence(profile: DenoiserProfile, space: SearchSpace) -> str:
    """Return in one sentence what int8 Linears can give at most: the sets of the space that allow most of it."""
    found = sorted(ceilings(profile, space).items(), key=lambda entry: -entry[1])
    listed = ", ".join(f"{value:.2f} ({label})" for label, value in found[:_LISTED])
    more = f", less with the other {len(found) - _LISTED}" if len(found) > _LISTED else ""
    return (
        f"int8 Linears alone can make a step at most this many times faster, by exclusion set: {listed}{more}; "
        f"{profile.shape}, {'compiled' if profile.compiled else 'not compiled'}, {profile.device}; attention, "
        f"{share_of(profile, ATTENTION):.0%} of a step, {_attention_gain(profile)}"
    )


def _attention_gain(profile: DenoiserProfile) -> str:
    found = next((part for part in profile.parts if part.kind == ATTENTION and part.kernel is not None), None)
    if found is None:
        return "has no int8 kernel here"
    return f"is {found.speedup:.2f} times faster on int8 where a strategy quantizes it"


def share_of(profile: DenoiserProfile, kind: str) -> float:
    """Return the share of a step that a kind takes."""
    return sum(part.float_s for part in profile.parts if part.kind == kind) / profile.step_s


def stored_profile(bench: "Workbench") -> DenoiserProfile | None:
    """Return the profile of the study's model at its deployment shape, from the cache or measured now.

    Only rank 0 has one. Nothing is measured for a study that predicts its latencies.

    Raises:
        HyquantError: If the model cannot be looked at.
    """
    if bench.latency_bench is None or bench.config.latency.device_profile is not None:
        return None
    timed = bench.latency_bench
    key = f"profile-{digest(_identity(bench.model, timed), length=32)}"
    with bench.lock.measuring():  # whoever waits here finds what another slot has measured meanwhile
        entry = bench.cache.get_or_build(
            key, lambda: Entry({}, {"profile": measured_profile(timed).model_dump(mode="json")})
        )
    return DenoiserProfile.model_validate(entry.meta["profile"])


def measured_profile(bench: LatencyBench) -> DenoiserProfile:
    """Measure a profile, in few rounds where a step is long."""
    rough_s = bench.float_step_s(rounds=1, warmup=1)
    return profile_denoiser(bench, rounds=7 if rough_s < _LONG_STEP_S else 2, warmup=1)


def around_the_loop(model: VideoModel, shape: DeploymentShape, prompts: tuple[str, str]) -> dict[str, float]:
    """Return seconds per clip of text encoding and of decoding, by renderings of one step.

    A prompt is encoded once, so the first of two renderings takes longer by that much.

    Args:
        model: The model, in float.
        shape: The clip.
        prompts: One to warm up with, and another one that the model has not seen.

    Returns:
        "text_s" and "decode_s".
    """
    settings = RenderSettings(
        height=shape.height,
        width=shape.width,
        num_frames=shape.num_frames,
        num_steps=1,
        batch_size=1,
    )
    now = partial(resolve_device(model.device.type).now_s, model.device.index or 0)
    inputs = model.deployment_inputs(shape.model_copy(update={"batch_size": 1}))

    def seconds(work: Callable[[], object]) -> float:
        started = now()
        work()
        return now() - started

    with torch.inference_mode():
        model.render([prompts[0]], [0], settings)
        first = seconds(lambda: model.render([prompts[1]], [0], settings))
        again = min(seconds(lambda: model.render([prompts[1]], [0], settings)) for _ in range(2))
        step = min(seconds(lambda: model.denoiser(**inputs)) for _ in range(2))
    return {"text_s": max(0.0, first - again), "decode_s": max(0.0, again - step)}


def predicted_latency(bench: LatencyBench, plan: QuantPlan, device: DeviceProfile) -> LatencyReport:
    """Return the latency of a plan at a bench's shape on a device that is not there, by `hyquant.cost`.

    Raises:
        ConfigError: If the model is not HunyuanVideo.
    """
    model, shape = bench.model, bench.shape
    work = work_of(model.groups(), attention_blocks(model.denoiser), tokens_at(bench), batch_size=shape.batch_size)
    float_s = sum(seconds_of(work, device, {}).values())
    step_s = sum(seconds_of(work, device, modes_of(plan, device)).values())
    counts = steps_by_mode(plan, shape.num_steps)
    loop_s = loop_latency(counts, dict.fromkeys(counts, step_s))
    return LatencyReport(
        loop_latency_s=loop_s,
        control_loop_latency_s=shape.num_steps * float_s,
        ratio=loop_s / (shape.num_steps * float_s),
        ratio_mad=0.0,
        step_latency_s={"control": float_s, **dict.fromkeys(counts, step_s)},
        rounds=0,
        warmup=0,
        shape=bench.description,
        kind="predicted",
        compiled=False,
        device=f"{device.name} on paper",
    )


def tokens_at(bench: LatencyBench) -> Tokens:
    """Return the tokens of a HunyuanVideo at a bench's shape.

    Raises:
        ConfigError: If the model is something else.
    """
    inputs, config = bench.inputs, getattr(bench.model.denoiser, "config", {})
    try:
        frames, height, width = inputs["hidden_states"].shape[-3:]
        text = int(inputs["encoder_hidden_states"].shape[1])
        patch, patch_t = int(config["patch_size"]), int(config["patch_size_t"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"latencies are predicted for HunyuanVideo in diffusers' layout, but {bench.model.name} is something else; "
            "leave latency.device_profile out"
        ) from error
    return Tokens(int(frames // patch_t * (height // patch) * (width // patch)), text)


def paper_rows(work: Sequence[Work], device: DeviceProfile) -> list[PaperRow]:
    """Return one row per kind for all products of a step."""
    operations, everything = operations_by_kind(work), sum(part.operations for part in work)
    float_s, int8_s = seconds_of(work, device, {}), seconds_of(work, device, {part.name: "int8" for part in work})
    return [
        PaperRow(kind, count, count / everything, float_s[kind], int8_s[kind]) for kind, count in operations.items()
    ]


def paper_steps(
    groups: Sequence[LayerGroup], blocks: Sequence[AttentionBlock], tokens: Tokens, device: DeviceProfile
) -> dict[str, float]:
    """Return seconds of one step of a HunyuanVideo in float and by recipe.

    Args:
        groups: Its layers.
        blocks: Its attentions.
        tokens: Of the clip.
        device: Where.
    """
    work = work_of(groups, blocks, tokens)
    able = device.model_copy(update={"int8_attention": True})
    found = {"float": sum(seconds_of(work, device, {}).values())}
    for label, config in PAPER_RECIPES.items():
        plan = build_plan(groups, config, num_steps=1, attentions=blocks)
        found[label] = sum(seconds_of(work, device, modes_of(plan, able)).values())
    return found


def full_model() -> tuple[tuple[LayerGroup, ...], tuple[AttentionBlock, ...]]:
    """Return the layers and attentions of HunyuanVideo 13B."""
    denoiser = published_skeleton()
    return layer_groups(denoiser), attention_blocks(denoiser)


def _identity(model: VideoModel, bench: LatencyBench) -> dict[str, JsonValue]:
    return {
        "model": model.fingerprint(),
        "dtype": str(model.dtype),
        "shape": bench.description,
        "device": bench.device_description,
        "hardware": bench.hardware,
        "compiled": bench.is_compiled,
        "torch": torch.__version__,
        "code": source_digest(),
        "kernel": os.environ.get(FORCED, ""),
    }
