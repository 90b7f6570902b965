"""What the engine accepts as a pair of description and weights, before it looks at any layer."""

import json
import re
import stat
from pathlib import Path

from tests.reference.typed import Typed, read_safetensors

ALGORITHMS = frozenset(
    {
        "W8A8",
        "W8A8_TIMESTEP",
        "W8A8_DYNAMIC",
        "W8A8_PER_CHANNEL",
        "W8A8_PER_TENSOR",
        "W8A8_PER_CHANNEL_PER_TOKEN",
        "W8A8_PER_CHANNEL_PER_TENSOR",
        "W8A8_PER_TENSOR_PER_TOKEN",
        "W8A8_MXFP8",
        "W4A4_DYNAMIC",
        "W4A4_MXFP4",
        "W4A4_MXFP4_DUALSCALE",
        "W4A4_MXFP4_SVD",
        "W8A16",
        "W4A16",
        "W4A16_AWQ",
        "W4A8_AWQ",
        "W8A16_GPTQ",
        "W4A16_GPTQ",
        "W4A8",
        "INT8",
        "FP8_DYNAMIC",
        "MXFP8_DYNAMIC",
        "MXFP4_DYNAMIC",
        "NO_QUANT",
        "W16A16",
        "MIXED_PERCISION",
    }
)
"""The engine's enum; "PERCISION" is its spelling."""

DESCRIPTION_BYTES, WEIGHT_BYTES = 10 * 2**30, 100 * 2**30


class ParametersInvalid(Exception):
    """What the engine raises about files, tensors and steps."""


class ConfigError(Exception):
    """What the engine raises about the run."""


def read_export(path: Path, *, rank: int | None = None) -> tuple[dict[str, str], dict[str, Typed]]:
    """Return the description and the tensors that the engine would read.

    Args:
        path: The description. A stem that ends in `_<digits>` is that of a rank, and the number is replaced by ours.
        rank: Of this process; None while torch.distributed is not initialised.
    """
    suffix = ""
    if re.search(r"_\d+$", path.stem):
        if rank is None:
            raise ConfigError("a description of a rank needs an initialised torch.distributed")
        suffix = f"_{rank}"
        path = path.with_name(re.sub(r"_\d+$", suffix, path.stem) + path.suffix)
    require_file(path, DESCRIPTION_BYTES)
    description = json.loads(path.read_text())
    if "model_quant_type" not in description:
        raise ParametersInvalid("model_quant_type is missing")
    kind = description["model_quant_type"]
    if kind not in ALGORITHMS:
        raise ValueError(f"{kind!r} is not a valid QuantAlgorithm")
    weights = path.with_name(f"quant_model_weight_{kind.lower()}{suffix}.safetensors")
    require_file(weights, WEIGHT_BYTES)
    return description, read_safetensors(weights)


def require_file(path: Path, most_bytes: int) -> None:
    """Raise unless a path is a regular file that nobody else can read or change."""
    if path.is_symlink():
        raise ParametersInvalid(f"{path} is a symbolic link")
    if not path.is_file():
        raise ParametersInvalid(f"{path} doesn't exist")
    found = path.stat()
    if found.st_size > most_bytes:
        raise ParametersInvalid(f"{path} is too large")
    if stat.S_IMODE(found.st_mode) & ~0o640:
        raise PermissionError(f"{path} has mode {stat.S_IMODE(found.st_mode):04o}, more than 0640")
