"""HunyuanVideo from a folder as Tencent publishes it, as the components of a diffusers pipeline.

    FOLDER/
      hunyuan-video-t2v-720p/transformers/   mp_rank_00_model_states.pt; config.json unless heads have 128 channels
      hunyuan-video-t2v-720p/vae/            pytorch_model.pt and config.json
      text_encoder/  text_encoder_2/         as transformers saves them, tokenizers inside or beside as tokenizer*/
      scheduler/                             optional: scheduler_config.json; else flow matching with shift 7
      prompt_template.json                   optional: template, crop_start, max_sequence_length; else the published

The transformer's sizes are read from its weights. Only the split of the rotary embedding over the axes is not in them:
`rope_dim_list` in config.json, or the published 16, 56, 56.
Sources: Tencent-Hunyuan/HunyuanVideo, ckpts/README.md and hyvideo/modules/models.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import JsonValue
from torch import Tensor

from hyquant.errors import ConfigError
from hyquant.json_text import parse_json
from hyquant.models.checkpoints import find_checkpoint, read_checkpoint
from hyquant.models.components import is_complete
from hyquant.models.names import to_diffusers
from hyquant.models.original_vae import (
    ORIGINAL_CLASS,
    vae_config_to_diffusers,
    vae_to_diffusers,
)

if TYPE_CHECKING:
    from torch import nn

DENOISER = "transformers"
"""Tencent's name of the denoiser's folder; diffusers' is `transformer`."""

MODEL_PATTERN = "hunyuan-video-t2v-*"
PROMPT_TEMPLATE = "prompt_template.json"
ROPE_KEY = "rope_dim_list"
_ROPE = {128: (16, 56, 56)}
"""Channels per head -> those of them that turn with time, height and width, in the published model."""


@dataclass(frozen=True)
class OriginalFolder:
    """Where the components of a pipeline lie in Tencent's layout; `scheduler` is None for the published one."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    text_encoder_2: Path
    tokenizer_2: Path
    scheduler: Path | None


def find_original(folder: Path, *, load_key: str = "module") -> OriginalFolder | None:
    """Return where things lie in a folder in Tencent's layout, or None if it has no `transformers` folder.

    Args:
        folder: The folder of all checkpoints, or of one resolution in it.
        load_key: Which set of weights will be loaded; some files bear it in their name.

    Raises:
        ConfigError: If a component is missing, or the folder holds several models.
    """
    models = [place for place in (folder, *sorted(folder.glob(MODEL_PATTERN))) if (place / DENOISER).is_dir()]
    if not models:
        return None
    if len(models) > 1:
        raise ConfigError(
            f"a source must be one model, but {folder} holds {', '.join(place.name for place in models)}; "
            "give the folder of one of them"
        )
    model = models[0]

    def place(name: str) -> Path:
        """Return where a component lies: in the model's folder or beside it."""
        return next((base / name for base in (model, model.parent) if (base / name).is_dir()), model / name)

    def tokenizer(name: str, encoder: str) -> Path:
        own = place(name)
        return own if is_complete(own, name) else place(encoder)

    beside = place("scheduler")
    found = OriginalFolder(
        transformer=model / DENOISER,
        vae=place("vae"),
        text_encoder=place("text_encoder"),
        tokenizer=tokenizer("tokenizer", "text_encoder"),
        text_encoder_2=place("text_encoder_2"),
        tokenizer_2=tokenizer("tokenizer_2", "text_encoder_2"),
        scheduler=beside if is_complete(beside, "scheduler") else None,
    )
    require_components(found, folder, load_key=load_key)
    return found


def require_components(found: OriginalFolder, folder: Path, *, load_key: str = "module") -> None:
    """Check that every component is there with its configuration and weights; none of them is read.

    Args:
        found: Where they lie.
        folder: What to call the whole in messages.
        load_key: Which set of weights will be loaded.

    Raises:
        ConfigError: If a component is missing.
    """
    find_checkpoint(found.transformer, load_key=load_key)
    if not (found.vae / "config.json").is_file():
        raise ConfigError(
            f"the autoencoder must come with config.json, but {found.vae} has none; complete the download"
        )
    find_checkpoint(found.vae)
    missing = [
        name
        for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        if not is_complete(getattr(found, name), name)
    ]
    if missing:
        raise ConfigError(
            f"HunyuanVideo in Tencent's layout needs text encoders and tokenizers as transformers saves them, but "
            f"{folder} lacks files of {', '.join(missing)}; its README tells how to prepare them"
        )


def load_components(found: OriginalFolder, *, dtype: torch.dtype, load_key: str = "module") -> dict[str, Any]:
    """Load all components on the CPU, as `HunyuanVideoPipeline` takes them.

    Raises:
        ConfigError, LayerMatchError: If a checkpoint is no HunyuanVideo.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, CLIPTextModel, LlamaModel

    local = {"local_files_only": True}
    no_code = {"trust_remote_code": False}  # else transformers asks whether to run what lies in the folder
    return {
        "transformer": load_denoiser(found.transformer, dtype=dtype, load_key=load_key),
        "vae": load_vae(found.vae, dtype=dtype),
        "text_encoder": LlamaModel.from_pretrained(found.text_encoder, dtype=dtype, **local),
        "tokenizer": AutoTokenizer.from_pretrained(found.tokenizer, padding_side="right", **no_code, **local),
        "text_encoder_2": CLIPTextModel.from_pretrained(found.text_encoder_2, dtype=dtype, **local),
        "tokenizer_2": AutoTokenizer.from_pretrained(found.tokenizer_2, **no_code, **local),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)
        if found.scheduler is None
        else FlowMatchEulerDiscreteScheduler.from_pretrained(found.scheduler, **local),
    }


def load_denoiser(path: Path, *, dtype: torch.dtype, load_key: str = "module") -> "nn.Module":
    """Return a diffusers transformer with the weights of an original checkpoint.

    Args:
        path: A file or folder, as `find_checkpoint` takes it; config.json beside the weights may hold `rope_dim_list`.
        dtype: Dtype of all weights.
        load_key: Which set of weights of a file that wraps several.

    Raises:
        ConfigError: If it is no HunyuanVideo.
        LayerMatchError: If it has tensors that HunyuanVideo has not.
    """
    from diffusers import HunyuanVideoTransformer3DModel

    (file, *_) = find_checkpoint(path, load_key=load_key)
    state = read_checkpoint(path, load_key=load_key)
    config = denoiser_config(state, json_table(file.parent / "config.json"))
    return _filled(lambda: HunyuanVideoTransformer3DModel(**config), to_diffusers(state), path, dtype)


def denoiser_config(state: Mapping[str, Tensor], extra: Mapping[str, JsonValue]) -> dict[str, Any]:
    """Return the arguments of `HunyuanVideoTransformer3DModel` for original weights.

    Args:
        state: Tensors by original name.
        extra: What weights do not tell: `rope_dim_list`, channels of a head that turn with time, height and width.

    Raises:
        ConfigError: If weights are missing, or `rope_dim_list` is and heads have not the published 128 channels.
    """
    try:
        patch = state["img_in.proj.weight"]
        rows, hidden = state["double_blocks.0.img_mlp.fc1.weight"].shape
        head_dim = state["double_blocks.0.img_attn_q_norm.weight"].shape[0]
        num_out = state["final_layer.linear.weight"].shape[0]
        text_embed_dim = state["txt_in.input_embedder.weight"].shape[1]
        pooled_projection_dim = state["vector_in.in_layer.weight"].shape[1]
    except KeyError as error:
        raise ConfigError(
            f"original HunyuanVideo weights must hold {error.args[0]}, but it is not there; are these the weights of "
            "its transformer?"
        ) from error
    _, in_channels, patch_t, patch_size, _ = patch.shape
    return {
        "in_channels": in_channels,
        "out_channels": num_out // (patch_t * patch_size**2),
        "num_attention_heads": hidden // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": _num_blocks(state, "double_blocks."),
        "num_single_layers": _num_blocks(state, "single_blocks."),
        "num_refiner_layers": _num_blocks(state, "txt_in.individual_token_refiner.blocks."),
        "mlp_ratio": rows / hidden,
        "patch_size": patch_size,
        "patch_size_t": patch_t,
        "guidance_embeds": "guidance_in.mlp.0.weight" in state,
        "text_embed_dim": text_embed_dim,
        "pooled_projection_dim": pooled_projection_dim,
        "rope_axes_dim": _rope_dims(head_dim, extra),
    }


def load_vae(folder: Path, *, dtype: torch.dtype) -> "nn.Module":
    """Return the autoencoder of a folder: the original one, diffusers', or the codec of the shipped mini model.

    Raises:
        ConfigError: If config.json names another class or the weights do not fit it.
        LayerMatchError: If the weights are of something else.
    """
    from diffusers import AutoencoderKLHunyuanVideo

    from hyquant.models.pca_codec import PatchPCACodec

    config = json_table(folder / "config.json")
    saved: dict[str, Any] = {cls.__name__: cls for cls in (AutoencoderKLHunyuanVideo, PatchPCACodec)}
    kind = config.get("_class_name", ORIGINAL_CLASS)
    if kind in saved:
        vae: nn.Module = saved[str(kind)].from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
        return vae
    if kind != ORIGINAL_CLASS:
        raise ConfigError(
            f"an autoencoder must be {ORIGINAL_CLASS} or {', '.join(saved)}, but {folder} says {kind}; "
            "give HunyuanVideo's own"
        )
    arguments: dict[str, Any] = vae_config_to_diffusers(config)
    return _filled(
        lambda: AutoencoderKLHunyuanVideo(**arguments), vae_to_diffusers(read_checkpoint(folder)), folder, dtype
    )


def read_prompt_template(folder: Path) -> dict[str, str | int]:
    """Return `prompt_template.json` of a folder: template, crop_start, max_sequence_length; empty if there is none.

    Raises:
        ConfigError: If it holds anything else.
    """
    content = json_table(folder / PROMPT_TEMPLATE)
    kinds = {"template": str, "crop_start": int, "max_sequence_length": int}
    if content and not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        raise ConfigError(
            f"{folder / PROMPT_TEMPLATE} must hold template (text), crop_start and max_sequence_length (numbers), but "
            f"holds {content}; complete it, or remove it for the published template"
        )
    return {key: value for key, value in content.items() if isinstance(value, str | int)}


def _filled(
    build: Callable[[], "nn.Module"], state: Mapping[str, Tensor], path: Path, dtype: torch.dtype
) -> "nn.Module":
    """Build a module without weights and give it these."""
    try:
        with torch.device("meta"):
            module = build()
        module.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} must hold weights that fit together, but they do not: {error}") from error
    return module.eval().requires_grad_(False)


def _num_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})


def _rope_dims(head_dim: int, extra: Mapping[str, JsonValue]) -> list[int]:
    given = extra.get(ROPE_KEY, list(_ROPE.get(head_dim, ())))
    dims = [dim for dim in given if isinstance(dim, int)] if isinstance(given, list) else []
    if given != dims or len(dims) != 3 or sum(dims) != head_dim:
        raise ConfigError(
            f"the rotary embedding must split a head's {head_dim} channels over time, height and width, but "
            f"{ROPE_KEY} is {given or 'not given'}; give it in config.json beside the weights, as 16, 56, 56 "
            "of the published model"
        )
    return dims


def json_table(path: Path) -> dict[str, JsonValue]:
    """Return a JSON table, empty if there is no such file.

    Raises:
        ConfigError: If it is anything else.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} must be JSON, but it is not: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a table, but it is a {type(content).__name__}")
    return content
