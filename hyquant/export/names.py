"""File names of an export: the pair an engine reads, a copy of it per rank, and the shards of a large one.

MindIE-SD is given the path of the description and derives the tensor file's name from the model's type. A description
whose name ends in `_RANK` makes every rank read the pair with its own number. Source: mindiesd 3.1 (`quantize`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, field_validator
from torch import Tensor

from hyquant.config import FrozenModel, Target
from hyquant.errors import ExportError

MANIFEST_NAME = "hyq_manifest.json"
CERTIFICATE_NAME = "certificate.json"
CERTIFICATE_PAGE_NAME = "certificate.html"

WEIGHTS_SUFFIX = ".safetensors"
DESCRIPTION_SUFFIX = ".json"
INDEX_SUFFIX = ".index.json"

_RANK = re.compile(r"_(\d+)$")
_ODD = re.compile(r"[/\\:\x00-\x1f]")


def require_plain(name: str) -> str:
    """Return a file's name, which must lead nowhere else.

    Raises:
        ValueError: If it names a folder, is hidden or can be no name on some system.
    """
    if not 0 < len(name.encode(errors="replace")) < 256 or name.startswith(".") or _ODD.search(name):
        raise ValueError(f"a file name must be plain and name no folder, but got {name[:100]!r}; give a plain name")
    return name


FileName = Annotated[str, AfterValidator(require_plain)]


class FileNames(FrozenModel):
    """The names of one pair of files: the tensors (`*.safetensors`) and their description (`*.json`)."""

    weights: str
    description: str

    @field_validator("weights")
    @classmethod
    def _weights_are_a_file(cls, name: str) -> str:
        return _plain(name, WEIGHTS_SUFFIX)

    @field_validator("description")
    @classmethod
    def _description_is_a_file(cls, name: str) -> str:
        if name == MANIFEST_NAME:
            raise ValueError(f"{MANIFEST_NAME} is the manifest's name; give the description another")
        return _plain(name, DESCRIPTION_SUFFIX)


def default_names(quant_type: str) -> FileNames:
    """Return the names that engines expect for a type of the description, such as "W8A8_TIMESTEP"."""
    kind = quant_type.lower()
    return FileNames(
        weights=f"quant_model_weight_{kind}{WEIGHTS_SUFFIX}",
        description=f"quant_model_description_{kind}{DESCRIPTION_SUFFIX}",
    )


def for_rank(names: FileNames, rank: int) -> FileNames:
    """Return the names of one rank's pair: `_RANK` before the suffix of both."""
    weights, description = (
        f"{name.removesuffix(suffix)}_{rank}{suffix}"
        for name, suffix in ((names.weights, WEIGHTS_SUFFIX), (names.description, DESCRIPTION_SUFFIX))
    )
    return FileNames(weights=weights, description=description)


def for_ranks(names: FileNames, num_ranks: int | None) -> tuple[FileNames, ...]:
    """Return a pair for each of a number of ranks; the one pair without a number for None."""
    return (names,) if num_ranks is None else tuple(for_rank(names, rank) for rank in range(num_ranks))


def rank_of(description: str) -> int | None:
    """Return the rank that a description's name ends in, None without one."""
    found = _RANK.search(description.removesuffix(DESCRIPTION_SUFFIX))
    return None if found is None else int(found[1])


def expected_weights(description: str, quant_type: str) -> str:
    """Return the tensor file that the engine reads for a description of some type."""
    default, rank = default_names(quant_type), rank_of(description)
    return (default if rank is None else for_rank(default, rank)).weights


def require_loadable(pairs: Sequence[FileNames], quant_type: str, target: Target) -> None:
    """Check that no file is named twice, and that a MindIE target finds the tensors of each description.

    Raises:
        ExportError: If there is no pair, two share a file, or the target would look for another tensor file.
    """
    files = [name for names in pairs for name in (names.weights, names.description)]
    if not files or len(set(files)) != len(files):
        raise ExportError(
            f"an export must have a pair of file names or more and each name once, but got {files}; give every rank "
            "its own"
        )
    if not target.startswith("mindie-sd"):
        return
    for names in pairs:
        expected = expected_weights(names.description, quant_type)
        if names.weights != expected:
            raise ExportError(
                f"{target} reads the tensors that {names.description} describes from {expected}, but they were to be "
                f"written to {names.weights}; give that name, or target hyquant"
            )


def shards(weights: str, tensors: Mapping[str, Tensor], part_size_bytes: int | None) -> dict[str, list[str]]:
    """Return which tensors go into which file, in order: one file, or parts of a limited size.

    A tensor larger than the limit gets a part of its own.

    Args:
        weights: The name of the tensor file.
        tensors: The tensors by name.
        part_size_bytes: The most bytes of tensors in one file; None for one file. If all fit in one, its name is
            `weights`, else the names are STEM-00001-of-0000N.safetensors.
    """
    parts: list[list[str]] = [[]]
    held = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if part_size_bytes is not None and parts[-1] and held + size > part_size_bytes:
            parts.append([])
            held = 0
        parts[-1].append(key)
        held += size
    if len(parts) == 1:
        return {weights: parts[0]}
    stem = weights.removesuffix(WEIGHTS_SUFFIX)
    return {
        f"{stem}-{number:05d}-of-{len(parts):05d}{WEIGHTS_SUFFIX}": keys for number, keys in enumerate(parts, start=1)
    }


def index_name(weights: str) -> str:
    """Return the name of the file that says which part holds which tensor."""
    return f"{weights}{INDEX_SUFFIX}"


def _plain(name: str, suffix: str) -> str:
    if not name.endswith(suffix) or name == suffix:
        raise ValueError(f"a file name must end in {suffix} and name no folder, but got {name!r}; give a plain name")
    return require_plain(name)
