"""Tensors of original checkpoints: `.pt` files, folders of them and safetensors, read without running any code in them.

A `.pt` file is a pickle. It is read with `torch.load(weights_only=True)`, which knows tensors and plain containers and
refuses everything else, so that a file from anywhere cannot do more than hold wrong numbers.
Files: Tencent-Hunyuan/HunyuanVideo, `hyvideo/inference.py` and `hyvideo/vae/__init__.py`.
"""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hyquant.errors import ConfigError

_UNREADABLE = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
)
"""What the readers raise on files that are cut short, are something else, or hold code."""


def find_checkpoint(path: Path, *, load_key: str = "module") -> tuple[Path, ...]:
    """Return the files that hold a model's tensors.

    Args:
        path: A `.pt` or `.safetensors` file, or a folder with `*_model_states.pt`, `pytorch_model_LOADKEY.pt`,
            `pytorch_model.pt` or safetensors; of several kinds, the first of these.
        load_key: Which of several sets of weights.

    Raises:
        ConfigError: If there is none, or the folder holds several of a kind.
    """
    if path.is_file():
        return (path,)
    for pattern in ("*_model_states.pt", f"pytorch_model_{load_key}.pt", "pytorch_model.pt"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise ConfigError(
                f"a folder must hold one {pattern}, but {path} holds {', '.join(file.name for file in found)}; "
                "give the file itself"
            )
        if found:
            return tuple(found)
    shards = tuple(sorted(path.glob("*.safetensors")))
    if shards:
        return shards
    raise ConfigError(
        f"a checkpoint is a file, or a folder with *_model_states.pt, pytorch_model_{load_key}.pt, pytorch_model.pt or "
        f"*.safetensors, but {path} is none; complete the download"
    )


def read_checkpoint(path: Path, *, load_key: str = "module") -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, on the CPU; those of `.pt` files stay mapped to the file.

    Args:
        path: What `find_checkpoint` takes.
        load_key: Which set to take of a file that wraps several: "module", or "ema" for averaged weights.

    Raises:
        ConfigError: If the file is missing, unreadable, holds anything but tensors, or lacks the key.
    """
    tensors: dict[str, Tensor] = {}
    for file in find_checkpoint(path, load_key=load_key):
        tensors |= _unwrapped(_read(file), file, load_key)
    return tensors


def is_archive(file: Path) -> bool:
    """Tell whether a `.pt` file is an archive as torch has written since 1.6; its tensors can stay mapped."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # its last record belongs to an archive of several disks
        return False


def _read(file: Path) -> object:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what comes of it is said below
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive(file))
    except _UNREADABLE as error:
        # torch's own message recommends to switch the protection off, so it is not passed on.
        raise ConfigError(
            f"a checkpoint must hold tensors and nothing else, but {file} is damaged or holds code, which is not run; "
            "download it again from its publisher, or give it as safetensors"
        ) from error


def _unwrapped(content: object, file: Path, load_key: str) -> dict[str, Tensor]:
    """Return the tensors of a loaded file, out of what wraps them."""
    if isinstance(content, Mapping) and not _are_tensors(content):
        found = [key for key in (load_key, "state_dict") if key in content]
        if not found:
            raise ConfigError(
                f"a checkpoint must hold tensors by name, or under load_key {load_key!r}, but {file} has "
                f"{', '.join(map(str, list(content)[:5])) or 'nothing'}; give one of its keys"
            )
        content = content[found[0]]
    if not isinstance(content, Mapping) or not _are_tensors(content):
        raise ConfigError(
            f"a checkpoint must hold tensors by name, but {file} holds something else; give the weights of one model"
        )
    return dict(content)


def _are_tensors(content: Mapping[object, object]) -> bool:
    return bool(content) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )
