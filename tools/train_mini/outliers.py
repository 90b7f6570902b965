"""Choose the synthetic outliers of the variant `mini-outliers` and measure what they do to W8A8.

Channels are those of each modulated activation whose range changes most over the denoising steps, so that, enlarged,
they make the range of the whole layer drift with the step. The strength is chosen so that a plain static scale per
tensor visibly damages the video, a scale per step less, and a scale per token hardly.

The quantization here is simulated by rounding in float, with ranges from the calibration prompts, and independent of
the library that the model exists to test.

    T denoising steps   S tokens   C input channels   N output channels
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor, nn

from hyquant.models.mini.outliers import OutlierFactors, outlier_sites
from tools.train_mini.codec import psnr_db
from tools.train_mini.package import NUM_STEPS, generate

CHANNELS_PER_SITE = 2
FACTOR = 32.0
ALPHA = 0.5
DISCLOSURE = (
    "These outlier channels are synthetic: they were put in by rescaling trained weights by powers of two, which "
    "leaves the float function unchanged. They imitate the activation ranges of large video transformers; they "
    "were not learnt. Smoothing inverts exactly this rescaling."
)


def record_ranges(pipeline: HunyuanVideoPipeline, prompts: list[str], seed: int) -> dict[str, Tensor]:
    """Return [T, C] largest |activation| per step and channel at every outlier site."""
    ranges = {name: [] for name in outlier_sites(pipeline.transformer)}
    hooks = []
    for name, site in outlier_sites(pipeline.transformer).items():

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], rows: list[Tensor] = ranges[name]) -> None:
            rows.append(inputs[0].abs().flatten(0, -2).amax(dim=0))

        hooks.append(site.consumers[0].register_forward_pre_hook(hook))
    generate(pipeline, prompts, seed=seed)
    for handle in hooks:
        handle.remove()
    return {name: torch.stack(rows).unflatten(0, (-1, NUM_STEPS)).amax(dim=0) for name, rows in ranges.items()}


def choose_outliers(ranges_TC: dict[str, Tensor], per_site: int, factor: float) -> dict[str, dict[int, float]]:
    """Choose per site the channels of largest drift among the louder half of all channels."""
    chosen = {}
    for name, absmax_TC in ranges_TC.items():
        loudest_C = absmax_TC.amax(dim=0)
        drift_C = loudest_C / absmax_TC.amin(dim=0).clamp_min(1e-6)
        drift_C[loudest_C < loudest_C.median()] = 0
        chosen[name] = {int(c): factor for c in drift_C.topk(per_site).indices.sort().values}
    return chosen


def save_outliers(factors: OutlierFactors, path: Path) -> None:
    """Write the outlier file with its disclosure."""
    sites = [
        {"site": name, "channels": list(channels), "factors": list(channels.values())}
        for name, channels in factors.items()
    ]
    path.write_text(json.dumps({"disclosure": DISCLOSURE, "sites": sites}, indent=1) + "\n")


Quantizer = Callable[[Tensor, int], Tensor]
"""Takes an activation [.., S, C] and the step index, returns it rounded to 8 bits and back."""


def measure_w8a8(
    pipeline: HunyuanVideoPipeline, calibration: list[str], prompts: list[str], seed: int
) -> dict[str, float]:
    """Return the PSNR to the float videos, in dB, of four ways to quantize every linear layer of every block."""
    layers = _block_linears(pipeline.transformer)
    ranges = _record_layer_ranges(pipeline, layers, calibration, seed + 1000)
    float_clips = generate(pipeline, prompts, seed=seed)

    def static(absmax_TC: Tensor, _: nn.Linear) -> Quantizer:
        return lambda x, step: _rounded(x, absmax_TC.amax() / 127)

    def per_step(absmax_TC: Tensor, _: nn.Linear) -> Quantizer:
        return lambda x, step: _rounded(x, absmax_TC[step].amax() / 127)

    def per_token(absmax_TC: Tensor, _: nn.Linear) -> Quantizer:
        return lambda x, step: _rounded(x, x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / 127)

    results = {}
    for name, choose, smooths in (
        ("static", static, False),
        ("per_step", per_step, False),
        ("per_token", per_token, False),
        ("smooth_static", static, True),
    ):
        with _quantized(layers, ranges, choose, smooths=smooths):
            results[name] = psnr_db(generate(pipeline, prompts, seed=seed), float_clips)
    return results


def _block_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks, without the modulations."""
    return {
        name: layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and "transformer_blocks" in name and "norm" not in name
    }


def _record_layer_ranges(
    pipeline: HunyuanVideoPipeline, layers: dict[str, nn.Linear], prompts: list[str], seed: int
) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: rows[name].append(inputs[0].abs().flatten(0, -2).amax(dim=0))
        )
        for name, layer in layers.items()
    ]
    generate(pipeline, prompts, seed=seed)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(r).unflatten(0, (-1, NUM_STEPS)).amax(dim=0) for name, r in rows.items()}


@contextmanager
def _quantized(
    layers: dict[str, nn.Linear],
    ranges: dict[str, Tensor],
    choose: Callable[[Tensor, nn.Linear], Quantizer],
    *,
    smooths: bool,
) -> Iterator[None]:
    """Round weights per output channel and activations as chosen, for the duration of the context."""
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    hooks = []
    for name, layer in layers.items():
        absmax_TC, weight_NC = ranges[name], kept[name]
        smoothing_C = torch.ones(weight_NC.shape[1])
        if smooths:
            smoothing_C = absmax_TC.amax(dim=0).clamp_min(1e-5) ** ALPHA
            smoothing_C = smoothing_C / weight_NC.abs().amax(dim=0).clamp_min(1e-5) ** (1 - ALPHA)
        scaled_NC = weight_NC * smoothing_C
        layer.weight.data = _rounded(scaled_NC, scaled_NC.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / 127)
        hooks.append(
            layer.register_forward_pre_hook(_rounding_hook(choose(absmax_TC / smoothing_C, layer), smoothing_C))
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            layer.weight.data = kept[name]


def _rounding_hook(quantizer: Quantizer, smoothing_C: Tensor) -> Callable[..., Any]:
    calls = 0

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal calls
        rounded = quantizer(inputs[0] / smoothing_C, calls % NUM_STEPS)
        calls += 1
        return rounded, *inputs[1:]

    return hook


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-127, 127) * scale
