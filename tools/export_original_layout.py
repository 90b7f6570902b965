"""Write a HunyuanVideo that diffusers reads as Tencent publishes it: names, files and folders.

    python -m tools.export_original_layout --source mini --out DIR

What is written loads as `source: DIR` wherever the project takes a folder, and the transformer file loads into the
original code. Text encoders and tokenizers are copied as they are, and so is an autoencoder that is not HunyuanVideo's
own, such as the mini model's codec. The layout is described in `hyquant/models/original_folder.py`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo

from hyquant.errors import ConfigError
from hyquant.models import DTYPES
from hyquant.models.fingerprint import plain_config
from hyquant.models.hunyuan_folder import HunyuanSource, find_source, load_pipeline
from hyquant.models.names import to_original
from hyquant.models.original_folder import DENOISER, PROMPT_TEMPLATE, ROPE_KEY
from hyquant.models.original_vae import vae_config_to_original, vae_to_original

MODEL = "hunyuan-video-t2v-720p"
"""The published name of the folder of transformer and autoencoder."""

COPIED = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")


def export_original(source: str, out: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the model that `source` names into a new folder.

    Raises:
        ConfigError: If the source cannot be loaded or is in the original layout already, or the folder is not empty.
    """
    found = find_source(source)
    if found.original is not None:
        raise ConfigError(
            f"the source must be in diffusers layout, but {source} is in the original one already; use it"
        )
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"the output must be a new folder, but {out} holds other things; give another one")
    pipe = load_pipeline(found, dtype=dtype)
    write_transformer(pipe.transformer, out / MODEL / DENOISER)
    write_vae(pipe.vae, out / MODEL / "vae")
    for name in COPIED:
        shutil.copytree(found.folder / name, out / name)
    write_prompt_template(found, out)


def write_transformer(transformer: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    torch.save({"module": to_original(transformer.state_dict())}, folder / "mp_rank_00_model_states.pt")
    write_json(folder / "config.json", {ROPE_KEY: list(transformer.config.rope_axes_dim)})


def write_vae(vae: Any, folder: Path) -> None:
    if not isinstance(vae, AutoencoderKLHunyuanVideo):
        vae.save_pretrained(folder)
        return
    folder.mkdir(parents=True)
    torch.save({"state_dict": vae_to_original(vae.state_dict())}, folder / "pytorch_model.pt")
    config = plain_config(vae.config)
    assert isinstance(config, dict)
    write_json(folder / "config.json", vae_config_to_original(config))


def write_prompt_template(found: HunyuanSource, out: Path) -> None:
    if found.prompt_template is not None:
        content = {**found.prompt_template, "max_sequence_length": found.max_sequence_length}
        write_json(out / PROMPT_TEMPLATE, content)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a HunyuanVideo in Tencent's original layout.")
    parser.add_argument("--source", default="mini", help="mini, mini-outliers or a folder in diffusers layout")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of transformer and autoencoder")
    arguments = parser.parse_args()
    try:
        export_original(arguments.source, arguments.out, dtype=DTYPES[arguments.dtype])
    except ConfigError as error:
        parser.exit(1, f"{error}\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
