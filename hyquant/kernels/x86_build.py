"""The C code for x86-64 CPUs, built on first use and kept: one library per instruction set.

The C compiler found in PATH (the one `torch.compile` needs as well) builds it once per machine; the result is kept in
the user's cache folder, under a digest of source and flags. Without a compiler there is none.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from hyquant.file_modes import FILE_MODE, FOLDER_MODE, make_folder

logger = logging.getLogger(__name__)

_SOURCES = ("int8_x86.h", "int8_linear_x86.c", "int8_attention_x86.c", "int8_rows_x86.c")
_FLAGS = ("-O3", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
_POINTER, _COUNT, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


@dataclass(frozen=True)
class X86Build:
    """An instruction set that the C code is built for.

    Attributes:
        name: As kernels are called that need it.
        flags: What the compiler is told about it.
        has_instructions: Whether this CPU has it.
    """

    name: str
    flags: tuple[str, ...]
    has_instructions: Callable[[], bool]

    def is_available(self, device: torch.device) -> bool:
        """Return whether this is a CPU that has the instructions and the C code is built or can be."""
        is_x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
        return is_x86 and self.has_instructions() and _library(self) is not None

    def library(self) -> ctypes.CDLL:
        """Return the library of an instruction set that is available."""
        library = _library(self)
        assert library is not None
        return library


AVX2_BUILD = X86Build("avx2", ("-mavx2",), torch.cpu._is_avx2_supported)
VNNI_BUILD = X86Build(
    "vnni",
    ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    torch.cpu._is_vnni_supported,
)
BUILDS = {build.name: build for build in (AVX2_BUILD, VNNI_BUILD)}


def address(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    """Return where a tensor lies, as C functions take it; None for none.

    The tensor must live until they have returned.

    Raises:
        ValueError: If it is not on the CPU, not contiguous or of another dtype than what C reads it as.
    """
    if tensor is None:
        return None
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"C code reads contiguous {dtype} on the CPU, but got {tensor.dtype} with strides {tensor.stride()} on "
            f"{tensor.device}."
        )
    return tensor.data_ptr()


def cache_folder() -> Path:
    """Return the folder of the user's cache that kernels keep their files in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyquant"


@functools.cache
def source_digest() -> str:
    """Return what changes if the C code does."""
    return hashlib.sha256("\n".join(_sources().values()).encode()).hexdigest()[:16]


@functools.cache
def _library(build: X86Build) -> ctypes.CDLL | None:
    flags = (*_FLAGS, *build.flags)
    digest = hashlib.sha256("\n".join((source_digest(), *flags)).encode()).hexdigest()[:16]
    library = _loaded(flags, f"int8_{build.name}-{digest}.so")
    if library is None:
        return None
    _declare(library, "hyq_packed_bytes", _COUNT, [_COUNT] * 2)
    _declare(library, "hyq_pack_weight", None, [_POINTER] * 2 + [_COUNT] * 2)
    _declare(
        library,
        "hyq_int8_linear",
        _INT,
        [*[_POINTER] * 3, *[_COUNT] * 3, *[_POINTER] * 6, _FLOAT, _FLOAT, _INT, _INT],
    )
    _declare(library, "hyq_row_absmax", None, [_POINTER, _INT, *[_POINTER] * 2, *[_COUNT] * 2, _INT])
    _declare(library, "hyq_quantize_rows", None, [_POINTER, _INT, *[_POINTER] * 3, *[_FLOAT] * 2, *[_COUNT] * 2, _INT])
    _declare(library, "hyq_row_sums", None, [*[_POINTER] * 2, *[_COUNT] * 2, _INT])
    _declare(library, "hyq_row_errors", None, [_POINTER, _INT, *[_POINTER] * 3, *[_COUNT] * 2, _INT])
    if build is VNNI_BUILD:
        _declare(library, "hyq_int8_attention", _INT, [*[_POINTER] * 8, *[_COUNT] * 4, _INT, _INT])
    return library


def _declare(library: ctypes.CDLL, name: str, result: type | None, arguments: list[type]) -> None:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments


def _loaded(flags: tuple[str, ...], name: str) -> ctypes.CDLL | None:
    """Return the library kept under a name, built if it is not there or cannot be loaded; None if neither works.

    Where the user's cache cannot hold a library that can be run, it is built into a folder for this process alone.
    """
    try:
        kept = cache_folder() / name
        _make_own(kept.parent)
        if (kept.exists() and _is_own(kept)) or _compile(flags, kept):
            return ctypes.CDLL(str(kept))
        return None
    except (OSError, RuntimeError) as error:  # read-only or not executable, damaged, or no home at all
        logger.warning("compiled kernels in the user's cache cannot be used; this process builds its own: %s", error)
    try:
        with tempfile.TemporaryDirectory(prefix="hyquant-") as folder:
            own = Path(folder) / name
            return ctypes.CDLL(str(own)) if _compile(flags, own) else None
    except OSError:
        return None


def _make_own(folder: Path) -> None:
    """Make a folder that nobody but its owner can write: what lies in it is executed."""
    make_folder(folder)
    if folder.stat().st_mode & 0o022:
        folder.chmod(FOLDER_MODE)


def _is_own(library: Path) -> bool:
    """Say whether nobody but this user can have written a library."""
    status = library.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _compile(flags: tuple[str, ...], path: Path) -> bool:
    """Build with the first compiler that can, and put the library in place in one step."""
    compilers = [found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))]
    if not compilers:
        return False
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name, source in _sources().items():
            (Path(folder) / name).write_text(source)
        built = Path(folder) / path.name
        units = [str(Path(folder) / name) for name in _SOURCES if name.endswith(".c")]
        for compiler in compilers:
            run = subprocess.run(
                [compiler, *flags, "-o", str(built), *units, "-lm"], capture_output=True, text=True, check=False
            )
            if run.returncode == 0:
                with built.open("rb") as file:
                    os.fsync(file.fileno())
                built.chmod(FILE_MODE)
                os.replace(built, path)
                return True
            logger.info("%s cannot build the int8 kernels: %s", compiler, run.stderr.strip()[-500:])
    return False


@functools.cache
def _sources() -> dict[str, str]:
    folder = files("hyquant.kernels")
    return {name: folder.joinpath(name).read_text() for name in _SOURCES}
