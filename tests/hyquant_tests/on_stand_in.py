"""Calibrate, quantize and render on a device that refuses mixed tensors, and print what failed, one line each.

Statistics come from the CPU, where merging over ranks and the cache leave them; once from where they were observed.
"""

import os
import traceback
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.packing import pack_stats, unpack_stats
from hyquant.config import M3, M4, M6, FA3Fp8, FA3Int8, QuantConfig, W8A8Dynamic, W8A8Static, W8A8Timestep
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import RenderSettings
from hyquant.models.tiny import TinyVideoModel
from hyquant.plan import build_plan
from tests.toys.stand_in_device import OnStandIn, register

LAYERS = ("*double_blocks.*attn_qkv",)
SCHEMES = {
    "dynamic": W8A8Dynamic(),
    "static": W8A8Static(act_method="minmax"),
    "histogram": W8A8Static(act_method="histogram"),
    "timestep": W8A8Timestep(timestep_sep=1, act_method="minmax"),
}
SMOOTHINGS = {
    "none": None,
    "m3": M3(layers=LAYERS),
    "m4": M4(layers=LAYERS),
    "m4 folded": M4(layers=LAYERS, placement="fold"),
    "m6": M6(layers=LAYERS),
}
ATTENTIONS = {"int8 attention": FA3Int8(), "fp8 attention": FA3Fp8()}
COMBINED = [*(("static", name) for name in SMOOTHINGS), ("timestep", "m4"), ("histogram", "m4"), ("dynamic", "m6")]
CASES = {
    f"{scheme} {smoothing}": QuantConfig(linear=SCHEMES[scheme], smoothing=SMOOTHINGS[smoothing])
    for scheme, smoothing in COMBINED
} | {name: QuantConfig(linear=SCHEMES["static"], attention=attention) for name, attention in ATTENTIONS.items()}


def plain_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """Scaled dot product attention from matrix products: the fused one knows no stand-in."""
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_bool else scores + attn_mask
    return scores.softmax(-1) @ value


def on_cpu(stats):
    """Return statistics as the store's cache gives them back."""
    if stats is None:
        return None
    packed = pack_stats(stats)
    return unpack_stats(type(packed)({name: tensor.cpu() for name, tensor in packed.tensors.items()}, packed.meta))


def main() -> None:
    device = register()
    os.environ["HYQUANT_KERNEL"] = "reference"
    torch.set_grad_enabled(False)
    torch.inference_mode = lambda *_: nullcontext()  # inference tensors cannot be wrapped
    F.scaled_dot_product_attention = plain_attention
    with OnStandIn():
        model = TinyVideoModel(0, device=device)
        settings = RenderSettings(height=16, width=16, num_frames=1, num_steps=2)
        records = capture_in_memory(model, ["a b"], [0], settings)
        for name, config in CASES.items():
            plan = build_plan(model.groups(), config, num_steps=2, attentions=attention_blocks(model.denoiser))
            for place in ("device", "cpu") if name == "static m4" else ("cpu",):
                try:
                    found = calibrate(model.denoiser, plan, records, model.clock)
                    if place == "cpu":
                        smoothed, scales = on_cpu(found.smoothed_stats), found.scales
                        scales = None if scales is None else {key: scale.cpu() for key, scale in scales.items()}
                        found = replace(found, stats=on_cpu(found.stats), smoothed_stats=smoothed, scales=scales)
                    quantize_calibrated_(model.denoiser, plan, found, model.clock)
                    (video,) = model.render(["a b"], [0], settings)
                    assert bool(torch.isfinite(video).all())
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    print(f"{name}, statistics on the {place}: {error} ({where.filename}:{where.lineno})")
                else:
                    print(f"{name}, statistics on the {place}: ok")


if __name__ == "__main__":
    main()
