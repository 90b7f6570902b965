"""The original video autoencoder (AutoencoderKLCausal3D) and diffusers' AutoencoderKLHunyuanVideo: one set of weights.

diffusers kept the original's module names, so tensors differ in nothing but a prefix that some files have; what differs
is the configuration. Names are checked all the same: what is no weight of this autoencoder is an error.

Sources: Tencent's hyvideo/vae/__init__.py and autoencoder_kl_causal_3d.py; diffusers'
scripts/convert_hunyuan_video_to_diffusers.py, whose table of autoencoder names is empty.
"""

import re
from collections.abc import Mapping

from pydantic import JsonValue
from torch import Tensor

from hyquant.errors import LayerMatchError

ORIGINAL_CLASS = "AutoencoderKLCausal3D"

_PREFIX = "vae."
_RESNET = r"resnets\.\d+\.(norm[12]|conv[12]\.conv|conv_shortcut\.conv)"
_MODULE = re.compile(
    r"(post_)?quant_conv"
    r"|(encoder|decoder)\.(conv_in\.conv|conv_norm_out|conv_out\.conv)"
    rf"|(encoder|decoder)\.mid_block\.({_RESNET}|attentions\.\d+\.(group_norm|to_[qkv]|to_out\.0))"
    rf"|encoder\.down_blocks\.\d+\.({_RESNET}|downsamplers\.0\.conv\.conv)"
    rf"|decoder\.up_blocks\.\d+\.({_RESNET}|upsamplers\.0\.conv\.conv)"
)
"""Every module of the autoencoder that has weights, under the name it has in both."""

_KEYS = {"time_compression_ratio": "temporal_compression_ratio"}
_BLOCKS = {"DownEncoderBlockCausal3D": "HunyuanVideoDownBlock3D", "UpDecoderBlockCausal3D": "HunyuanVideoUpBlock3D"}
_ORIGINAL_ONLY: Mapping[str, JsonValue] = {"sample_size": 256, "sample_tsize": 64, "force_upcast": True}
"""What shapes tiling in the original and is no part of the weights, with the published values."""


def vae_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an original state dict under diffusers' names: without the prefix that training puts before them.

    Raises:
        LayerMatchError: If a tensor is none of the autoencoder's.
    """
    prefixed = {name: tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    own = {name.removeprefix(_PREFIX): tensor for name, tensor in (prefixed or state).items()}
    return _checked(own)


def vae_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a diffusers state dict under the original names.

    Raises:
        LayerMatchError: If a tensor is none of the autoencoder's.
    """
    return _checked(state)


def vae_config_to_diffusers(config: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return an original configuration as diffusers' class takes it; `vae_config_to_original` undoes it."""
    own = {key: value for key, value in config.items() if key not in _ORIGINAL_ONLY and not key.startswith("_")}
    return {_KEYS.get(key, key): _renamed_blocks(value, _BLOCKS) for key, value in own.items()}


def vae_config_to_original(config: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return diffusers' configuration as the original class takes it, with the published values of what it lacks."""
    keys = {theirs: ours for ours, theirs in _KEYS.items()}
    blocks = {theirs: ours for ours, theirs in _BLOCKS.items()}
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    renamed = {keys.get(key, key): _renamed_blocks(value, blocks) for key, value in own.items()}
    return {"_class_name": ORIGINAL_CLASS, **renamed, **_ORIGINAL_ONLY}


def _checked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    unknown = sorted(
        name
        for name in state
        for module, _, kind in [name.rpartition(".")]
        if kind not in ("weight", "bias") or not _MODULE.fullmatch(module)
    )
    if unknown or not state:
        raise LayerMatchError(
            f"every tensor must belong to HunyuanVideo's autoencoder, but {unknown[:3] or 'none'} ({len(unknown)} in "
            "all) do not; are these its weights?"
        )
    return dict(state)


def _renamed_blocks(value: JsonValue, names: Mapping[str, str]) -> JsonValue:
    if not isinstance(value, list | tuple):
        return value
    return [names.get(entry, entry) if isinstance(entry, str) else entry for entry in value]
