"""Give the mini model the outlier channels that large video transformers have, without changing what it computes.

Every block normalizes its input and modulates it, x_mod = norm(x) * (1 + scale) + shift, before its first linear
layers. For a few chosen channels, `apply_outliers_` makes x_mod larger by a power of two and the columns that read
these channels smaller by the same power, so the float function is the same but for rounding, while a quantizer now
faces activation ranges that are dominated by a few channels and drift with the denoising step.

These outliers are synthetic. Smoothing undoes exactly this kind of rescaling, so that its success here is by
construction and says nothing about another model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OutlierFactors = Mapping[str, Mapping[int, float]]
"""Site, by its name in the original HunyuanVideo (`single_blocks.0.linear1`), to channel index to factor."""


def load_outliers(path: Path) -> dict[str, dict[int, float]]:
    """Read the factors of an outlier file."""
    content = json.loads(path.read_text())
    return {site["site"]: dict(zip(site["channels"], site["factors"], strict=True)) for site in content["sites"]}


def _blocks(transformer: nn.Module, name: str) -> Iterable[Any]:
    blocks = transformer.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def outlier_sites(transformer: nn.Module) -> dict[str, Site]:
    """Return every place of a HunyuanVideo transformer where a modulation feeds linear layers, by original name."""
    sites: dict[str, Site] = {}
    for index, block in enumerate(_blocks(transformer, "transformer_blocks")):
        name = f"double_blocks.{index}"
        attention = block.attn
        image_qkv = (attention.to_q, attention.to_k, attention.to_v)
        text_qkv = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
        sites[f"{name}.img_attn_qkv"] = Site(block.norm1.linear, 6, 0, image_qkv)
        sites[f"{name}.txt_attn_qkv"] = Site(block.norm1_context.linear, 6, 0, text_qkv)
        sites[f"{name}.img_mlp.fc1"] = Site(block.norm1.linear, 6, 3, (block.ff.net[0].proj,))
        sites[f"{name}.txt_mlp.fc1"] = Site(block.norm1_context.linear, 6, 3, (block.ff_context.net[0].proj,))
    for index, block in enumerate(_blocks(transformer, "single_transformer_blocks")):
        consumers = (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
        sites[f"single_blocks.{index}.linear1"] = Site(block.norm.linear, 3, 0, consumers)
    return sites


class Site:
    """One modulation and the linear layers that read its output.

    Args:
        modulation: Linear layer whose output is cut into `num_chunks` equal parts.
        num_chunks: Parts of the modulation's output.
        shift_chunk: Which part is the shift; the next one is the scale.
        consumers: Linear layers that all read the modulated activation.
    """

    def __init__(
        self, modulation: nn.Linear, num_chunks: int, shift_chunk: int, consumers: tuple[nn.Linear, ...]
    ) -> None:
        self.modulation, self.num_chunks, self.shift_chunk = modulation, num_chunks, shift_chunk
        self.consumers = consumers

    def rescale_(self, channel: int, factor: float) -> None:
        """Multiply one channel of the modulated activation by `factor` and let the consumers divide by it."""
        width = self.modulation.out_features // self.num_chunks
        shift, scale = self.shift_chunk * width + channel, (self.shift_chunk + 1) * width + channel
        weight, bias = self.modulation.weight, self.modulation.bias
        weight[[shift, scale]] *= factor
        bias[shift] *= factor
        bias[scale] = (1 + bias[scale]) * factor - 1
        for consumer in self.consumers:
            consumer.weight[:, channel] /= factor


@torch.no_grad()
def apply_outliers_(transformer: nn.Module, factors: OutlierFactors) -> None:
    """Rescale the channels of a float transformer in place; applying twice squares the factors.

    Args:
        transformer: A diffusers `HunyuanVideoTransformer3DModel` with float32 weights.
        factors: Channels to enlarge, per site; powers of two keep every product exact.

    Raises:
        ValueError: If a site does not exist, a channel is out of range, or a factor is not a positive power of two.
    """
    sites = outlier_sites(transformer)
    for name, channels in factors.items():
        if name not in sites:
            raise ValueError(f"an outlier site must be one of {sorted(sites)}, but got {name!r}; correct the file")
        for channel, factor in channels.items():
            _check(name, channel, factor, width=sites[name].consumers[0].in_features)
            sites[name].rescale_(channel, factor)


def _check(name: str, channel: int, factor: float, *, width: int) -> None:
    if not 0 <= channel < width:
        raise ValueError(f"a channel of {name} must lie in [0, {width}), but got {channel}; correct the file")
    mantissa: Tensor = torch.frexp(torch.tensor(float(factor))).mantissa
    if mantissa != 0.5:
        raise ValueError(f"a factor of {name} must be a positive power of two, but got {factor}; use 32 or 64, say")
