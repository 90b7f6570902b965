"""A float HunyuanVideo denoiser on disk, under diffusers' names whatever its own are; nothing of it is in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from hyquant.checkpoint.files import StoredTensor, open_file
from hyquant.errors import ConfigError, LayerMatchError
from hyquant.export.names import require_plain
from hyquant.export.tensor_file import DTYPE_NAMES, size_of
from hyquant.json_text import parse_json
from hyquant.models import DTYPES
from hyquant.models.checkpoints import find_checkpoint
from hyquant.models.names import float_rows
from hyquant.models.original_folder import DENOISER, MODEL_PATTERN
from hyquant.models.skeleton import diffusers_skeleton, original_skeleton
from hyquant.text_file import read_text

PIECE_BYTES = 2 * 2**20
"""How much is read at a time."""

_ORIGINAL_MARK = "double_blocks."
_INDEX = "*.safetensors.index.json"


@dataclass(frozen=True)
class FloatTensor:
    """A weight of the denoiser: runs of rows of a stored tensor, read in pieces and in the denoiser's dtype."""

    stored: StoredTensor
    runs: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        return (sum(stop - start for start, stop in self.runs), *self.stored.shape[1:])

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield first row and values of one piece after the other."""
        row_bytes = size_of((self.stored.dtype, self.stored.shape[1:]))
        step = max(1, PIECE_BYTES // max(1, row_bytes))
        first = 0
        for begin, end in self.runs:
            for start in range(begin, end, step):
                stop = min(end, start + step)
                yield first, self.stored.rows(start, stop).to(self.dtype)
                first += stop - start


@dataclass(frozen=True)
class FloatCheckpoint:
    """A denoiser on disk.

    Attributes:
        denoiser: The module in diffusers' layout, on the meta device.
        tensors: Its weights by name in `denoiser.state_dict()`.
        dtype: The dtype it is loaded in.
        source: What `load_model` loads the whole model from, as far as is known.
        identity: What changes if the files do: names, sizes, times of change, and all headers.
    """

    denoiser: nn.Module
    tensors: Mapping[str, FloatTensor]
    dtype: torch.dtype
    source: str
    identity: JsonValue

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all weights in the denoiser's dtype."""
        return sum(size_of((tensor.dtype, tensor.shape)) for tensor in self.tensors.values())


def open_checkpoint(path: Path, *, dtype: str | None = None) -> FloatCheckpoint:
    """Find a denoiser's weights and check that they are HunyuanVideo's; only headers are read.

    Args:
        path: A `.safetensors` or `.pt` file; a folder with such files, with or without an index; or the folder of a
            whole model, in diffusers' or Tencent's layout.
        dtype: "float32", "bfloat16" or "float16", as `load_model` would load it; None for that of the weights.

    Raises:
        ConfigError: If there are no weights, a file is missing or damaged, or dtypes are mixed and none is given.
        LayerMatchError: If tensors are missing, are of another model, or have other shapes.
    """
    folder, source = _find_denoiser(path)
    files, index = _find_files(folder)
    stored = _merged(files, index, folder)
    where = folder if folder.is_dir() else folder.parent
    model_dtype = _dtype_of(stored, dtype, path)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if scalars := sorted(name for name, shape in shapes.items() if not shape):
        raise LayerMatchError(
            f"weights of HunyuanVideo have dimensions, but {scalars[0]} of {path} has none; give its own"
        )
    if any(name.startswith(_ORIGINAL_MARK) for name in stored):
        denoiser = original_skeleton(shapes, where)
        rows = float_rows(shapes)
    else:
        denoiser = diffusers_skeleton(where)
        rows = {name: (name, ((0, shape[0]),)) for name, shape in shapes.items()}
    tensors = {name: FloatTensor(stored[own], runs, model_dtype) for name, (own, runs) in rows.items()}
    _require_fit(tensors, denoiser, path)
    identity: JsonValue = {
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "tensors": {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(stored.items())},
        "dtype": str(model_dtype),
    }
    return FloatCheckpoint(denoiser, tensors, model_dtype, source, identity)


def _find_denoiser(path: Path) -> tuple[Path, str]:
    """Return the folder (or file) of the denoiser's weights, and the folder of the model it belongs to."""
    if not path.exists():
        raise ConfigError(f"a checkpoint must be a file or a folder, but {path} does not exist; correct the path")
    if (path / "model_index.json").is_file():
        return path / "transformer", str(path)
    models = [place for place in (path, *sorted(path.glob(MODEL_PATTERN))) if (place / DENOISER).is_dir()]
    if len(models) > 1:
        raise ConfigError(
            f"a checkpoint must be of one model, but {path} holds {', '.join(place.name for place in models)}; give "
            "the folder of one of them"
        )
    if models:
        return models[0] / DENOISER, str(path)
    folder = path if path.is_dir() else path.parent
    return path, str(folder.parent if (folder.parent / "model_index.json").is_file() else path)


def _find_files(path: Path) -> tuple[tuple[Path, ...], Mapping[str, str] | None]:
    """Return the files of the weights, and which tensor lies in which of them if an index says so."""
    indexes = sorted(path.glob(_INDEX)) if path.is_dir() else []
    if len(indexes) > 1:
        raise ConfigError(
            f"a checkpoint must have one index, but {path} holds {', '.join(file.name for file in indexes)}; give the "
            "folder of one set of weights"
        )
    if not indexes:
        return find_checkpoint(path), None
    try:
        table = parse_json(read_text(indexes[0]))["weight_map"]
        names = sorted({require_plain(str(name)) for name in table.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{indexes[0]} must say which file holds which tensor (weight_map), but: {error}; download it again"
        ) from error
    missing = [name for name in names if not (path / name).is_file()]
    if missing or not names:
        raise ConfigError(
            f"every file that {indexes[0].name} lists must be there, but {', '.join(missing[:3]) or 'none'} "
            f"({len(missing)} of {len(names)}) are missing in {path}; complete the download"
        )
    return tuple(path / name for name in names), table


def _merged(files: tuple[Path, ...], index: Mapping[str, str] | None, path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of all files, each of which must hold what the index says."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        own = open_file(file)
        if index is not None:
            listed = {name for name, holder in index.items() if holder == file.name}
            if odd := sorted(own.keys() ^ listed):
                raise ConfigError(
                    f"{file} must hold the tensors that the index lists, but they differ in {', '.join(odd[:3])} "
                    f"({len(odd)} in all); download it again"
                )
        if twice := sorted(own.keys() & found.keys()):
            raise ConfigError(
                f"each tensor must lie in one file, but {twice[0]} ({len(twice)} in all) lies in several of {path}; "
                "give the file or the folder of one set of weights"
            )
        found |= own
    return found


def _dtype_of(stored: Mapping[str, StoredTensor], asked: str | None, path: Path) -> torch.dtype:
    found = {tensor.dtype for tensor in stored.values()}
    known = set(DTYPES.values())
    if found - known:
        names = ", ".join(sorted(DTYPE_NAMES.get(dtype, str(dtype)) for dtype in found - known))
        raise ConfigError(
            f"weights to be quantized must be {', '.join(DTYPES)}, but {path} holds {names}; give the float checkpoint"
        )
    if asked is not None:
        return DTYPES[asked]
    if len(found) != 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found)) or "nothing"
        raise ConfigError(f"a model runs in one dtype, but {path} holds {names}; say which by --dtype")
    return found.pop()


def _require_fit(tensors: Mapping[str, FloatTensor], denoiser: nn.Module, path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    odd = {
        "lacks": sorted(expected.keys() - tensors.keys()),
        "also holds": sorted(tensors.keys() - expected.keys()),
        "has other shapes of": sorted(
            name for name in expected.keys() & tensors.keys() if tensors[name].shape != expected[name]
        ),
    }
    said = [f"{what} {', '.join(names[:3])} ({len(names)} in all)" for what, names in odd.items() if names]
    if said:
        raise LayerMatchError(
            f"a checkpoint must hold the weights of a HunyuanVideo denoiser with its configuration, but {path} "
            f"{' and '.join(said)}; give the weights that belong together"
        )
