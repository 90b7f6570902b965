"""The files of an export as they lie on disk: are they all there, whole, of the right kind, and what do they hold?

Source of the rules: the files that mindiesd 3.1 accepts.
"""

import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hyquant.errors import ExportError
from hyquant.export.folder import sha256_of
from hyquant.export.manifest import ExportManifest
from hyquant.export.names import MANIFEST_NAME, FileNames, index_name
from hyquant.file_modes import FILE_MODE, FOLDER_MODE
from hyquant.json_text import parse_json
from hyquant.text_file import read_text


def read_tensors(folder: Path, names: FileNames) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of one pair, of one file or of its parts, and why they cannot be read."""
    index = folder / index_name(names.weights)
    if (folder / names.weights).is_file() or not index.is_file():
        return _loaded(folder / names.weights)
    table, problems = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(table.values())):
        part, unreadable = _loaded(folder / name)
        problems.extend(unreadable)
        tensors |= part
    if not problems and table.keys() != tensors.keys():
        odd = sorted(table.keys() ^ tensors.keys())
        problems.append(f"{index.name} must list the tensors of its parts, but they differ in {odd[:3]}")
    return tensors, problems


def _weight_map(index: Path) -> tuple[dict[str, str], list[str]]:
    problem = f"{index.name} must say which part holds which tensor (weight_map), but does not; copy it again"
    try:
        table = parse_json(read_text(index))["weight_map"]
    except (ValueError, KeyError, TypeError):
        return {}, [problem]
    if not isinstance(table, dict) or not all(isinstance(name, str) and "/" not in name for name in table.values()):
        return {}, [problem]
    return table, []


def _loaded(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    if not path.is_file():  # a pipe would be waited for
        return {}, [f"{path.name} must be a regular file, but it is missing"]
    try:
        return load_file(path), []
    except (SafetensorError, OSError) as error:
        return {}, [f"{path.name} must be a safetensors file, but cannot be read: {error}"]


def file_problems(folder: Path, manifest: ExportManifest) -> Iterator[str]:
    """Check names, kinds, modes, sizes and digests of the files."""
    listed = set(manifest.files)
    for names in manifest.names:
        if names.description not in listed or not {names.weights, index_name(names.weights)} & listed:
            yield (
                f"the manifest must list {names.description} and {names.weights}, but lists {sorted(listed)}; copy "
                "it again"
            )
    if (mode := stat.S_IMODE(folder.stat().st_mode)) & ~FOLDER_MODE:
        yield f"the folder must have a mode within 0750, but it has {mode:04o}; run chmod 750 on it"
    for name in (MANIFEST_NAME, *sorted(listed)):
        path = folder / name
        if (problem := kind_problem(path)) is not None:
            yield problem
            continue
        if (problem := mode_problem(path)) is not None:
            yield problem
        if name in listed:
            yield from _content_problems(path, manifest)


def kind_problem(path: Path) -> str | None:
    """Return why the engine would refuse what lies under a file's name, None if it is a file."""
    if path.is_file() and not path.is_symlink():
        return None
    return f"{path.name} must be a regular file, but it is {'a link' if path.is_symlink() else 'missing'}"


def mode_problem(path: Path) -> str | None:
    """Return why the engine would refuse a file's mode, None if it would not."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & ~FILE_MODE:
        return None
    return f"{path.name} must have a mode within 0640, but it has {mode:04o}; the engine refuses it"


def rank_problems(manifest: ExportManifest) -> Iterator[str]:
    """Check that every rank's files hold the same: statistics are merged before they are written."""
    first, *others = manifest.names
    for names in others:
        for one, other in ((first.weights, names.weights), (first.description, names.description)):
            known = manifest.files.get(one), manifest.files.get(other)
            if None not in known and known[0] != known[1]:
                yield f"{other} must hold what {one} does, because ranks share one config, but it differs; export again"


def _content_problems(path: Path, manifest: ExportManifest) -> Iterator[str]:
    info = manifest.files[path.name]
    size = path.stat().st_size
    if size != info.size_bytes:
        yield f"{path.name} must have {info.size_bytes} bytes, but it has {size}; copy it again"
    elif sha256_of(path) != info.sha256:
        yield f"{path.name} must have the SHA-256 of the manifest, but its bytes were changed; copy it again"


def read_description(path: Path) -> dict[str, object]:
    """Return the flat table of a description.

    Raises:
        ExportError: If it cannot be read, or is something else.
    """
    try:
        found = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path.name} must be JSON, but it is not: {error}; copy it again") from error
    if not isinstance(found, dict):
        raise ExportError(f"{path.name} must be a flat table, but it is a {type(found).__name__}; copy it again")
    return found
