"""Writing a safetensors file tensor by tensor: its header first, its SHA-256 on the way.

A file is 8 bytes with the length of the header, the header (JSON: dtype, shape and place of each tensor), and the
tensors without gaps. Names, dtypes and shapes settle the header, so it can be written before there is any tensor.
Readers want each tensor aligned to its element size. Tensors whose bytes are a multiple of 8 come first, in the given
order, and leave what follows them aligned; the others come last, those of larger elements first.
Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from hyquant.export.manifest import FileInfo
from hyquant.schemes.base import Spec

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors spells dtypes."""

_ALIGNMENT = 8
_CHUNK = 2**20


@dataclass(frozen=True)
class FileLayout:
    """Where everything lies in a file.

    Attributes:
        header: The first bytes of the file.
        places: First and one-past-last byte of each tensor, in the order of the file.
        body_end: One past the last byte of the tensors in the given order; what lies behind is the tail.
    """

    header: bytes
    places: Mapping[str, tuple[int, int]]
    body_end: int

    @property
    def size_bytes(self) -> int:
        """Return the size of the file."""
        return max((end for _, end in self.places.values()), default=len(self.header))


def spec_of(tensor: Tensor) -> Spec:
    """Return dtype and shape of a tensor."""
    return tensor.dtype, tuple(tensor.shape)


def size_of(spec: Spec) -> int:
    """Return the bytes of a tensor of some dtype and shape."""
    dtype, shape = spec
    return dtype.itemsize * torch.Size(shape).numel()


def file_layout(specs: Mapping[str, Spec]) -> FileLayout:
    """Return where tensors of given dtypes and shapes lie in a file, in their order as far as alignment lets them."""
    body = [key for key, spec in specs.items() if size_of(spec) % _ALIGNMENT == 0]
    tail = sorted((key for key in specs if key not in set(body)), key=lambda key: -specs[key][0].itemsize)
    offset = 0
    entries: dict[str, dict[str, object]] = {}
    for key in (*body, *tail):
        dtype, shape = specs[key]
        end = offset + size_of(specs[key])
        entries[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    places: dict[str, tuple[int, int]] = {}
    offset = len(header)
    for key in (*body, *tail):
        places[key] = offset, offset + size_of(specs[key])
        offset = places[key][1]
    return FileLayout(header, places, places[body[-1]][1] if body else len(header))


class TensorFile:
    """A file that is being written.

    Args:
        path: The file; made, or kept as it is up to `resume`.
        specs: Dtype and shape of every tensor, in the order in which those of the body will be written.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self.layout = file_layout(specs)
        self._specs = dict(specs)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
        self._sha256 = hashlib.sha256()
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._hashing: Future[None] | None = None
        self.position = 0

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._beside.shutdown()
        os.close(self._handle)

    def start(self) -> None:
        """Write the header of a new file."""
        os.ftruncate(self._handle, 0)
        self._append(memoryview(self.layout.header))

    def resume(self, end: int, sha256: str) -> bool:
        """Take up to a position what the file holds already, if its digest is the given one.

        Args:
            end: The position, not before the one that was reached so far.
            sha256: `running_sha256()` of when that position was reached.
        """
        state = self._digest().copy()
        for position in range(self.position, end, _CHUNK):
            state.update(os.pread(self._handle, min(_CHUNK, end - position), position))
        if state.hexdigest() != sha256:
            return False
        self._sha256, self.position = state, end
        return True

    def put(self, key: str, tensor: Tensor) -> None:
        """Write a tensor: those of the body in their order, those of the tail at any time.

        Args:
            key: Its name.
            tensor: On the CPU, with the dtype and shape that the header says.
        """
        assert spec_of(tensor) == self._specs[key], f"{key} is {spec_of(tensor)}, not {self._specs[key]}"
        start, end = self.layout.places[key]
        content = tensor_bytes(tensor)
        if start >= self.layout.body_end:
            _write_all(self._handle, content, start)
            return
        assert start == self.position, f"{key} belongs at {start}, but {self.position} is reached"
        self._append(content)
        assert end == self.position

    def tail_sha256(self, keys: Iterable[str]) -> str | None:
        """Return the digest of those tensors that lie in the tail, as the file holds them; None if none does."""
        places = [self.layout.places[key] for key in keys]
        tail = [(start, end) for start, end in places if start >= self.layout.body_end and end > start]
        state = hashlib.sha256()
        for start, end in sorted(tail):
            for position in range(start, end, _CHUNK):
                state.update(os.pread(self._handle, min(_CHUNK, end - position), position))
        return state.hexdigest() if tail else None

    def running_sha256(self) -> str:
        """Return the digest of everything up to `position`."""
        return self._digest().hexdigest()

    def flush(self) -> None:
        """Wait until what was written has reached the disk."""
        os.fdatasync(self._handle)

    def finish(self) -> FileInfo:
        """Return size and digest of the complete file; the tail is read for it."""
        assert self.position == self.layout.body_end
        size = self.layout.size_bytes
        os.ftruncate(self._handle, size)
        for position in range(self.position, size, _CHUNK):
            self._digest().update(os.pread(self._handle, min(_CHUNK, size - position), position))
        self.position = size
        return FileInfo(size_bytes=size, sha256=self.running_sha256())

    def _append(self, content: memoryview) -> None:
        # What was written last is hashed while this is written.
        _write_all(self._handle, content, self.position)
        self._hashing = self._beside.submit(self._digest().update, content)
        self.position += content.nbytes

    def _digest(self) -> "hashlib._Hash":
        """Return the digest of everything up to `position`, once it is complete."""
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None
        return self._sha256


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> FileInfo:
    """Write contiguous tensors on the CPU into a new safetensors file, and return its size and digest."""
    with TensorFile(path, {key: spec_of(tensor) for key, tensor in tensors.items()}) as file:
        file.start()
        for key in file.layout.places:
            file.put(key, tensors[key])
        return file.finish()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


def _write_all(handle: int, content: memoryview, position: int) -> None:
    while content.nbytes:
        written = os.pwrite(handle, content, position)
        content, position = content[written:], position + written
