"""Writing a safetensors file tensor by tensor, with its SHA-256 on the way.

The format (https://github.com/huggingface/safetensors#format): eight bytes, little endian, that say how long the header
is; the header, a JSON object of dtype, shape and byte range per tensor, padded with spaces to a multiple of eight; the
tensors' bytes one after another. Tensors are ordered as the safetensors library orders them, so the header is known
before any value is, and the file is the one the library would write.

After the library's own writer the file must be read again for its digest, and it needs all tensors at once; here
another thread hashes what is being written, and tensors can come one after another.
"""

import hashlib
import json
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the format, in the order in which the library writes tensors."""

_ORDER = {dtype: index for index, dtype in enumerate(DTYPE_NAMES)}
_WRITE_BYTES = 2**24


@dataclass(frozen=True)
class TensorSpec:
    """What a file says of a tensor before it holds it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Return the bytes of its values."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def spec_of(tensor: Tensor) -> TensorSpec:
    """Return dtype and shape of a tensor."""
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


def in_file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return the names of tensors in the order of their bytes in a file."""
    return sorted(specs, key=lambda name: (_ORDER[specs[name].dtype], name))


def header_of(specs: Mapping[str, TensorSpec]) -> bytes:
    """Return everything in front of the first tensor's bytes."""
    table: dict[str, dict[str, object]] = {}
    start = 0
    for name in in_file_order(specs):
        spec = specs[name]
        end = start + spec.size_bytes
        table[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write contiguous CPU tensors as a safetensors file.

    Args:
        path: The file; replaced if it exists.
        tensors: By name; contiguous, on the CPU.

    Returns:
        The SHA-256 of the file as hex digits.

    Raises:
        OSError: If the disk does not take it.
    """
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    with path.open("wb", buffering=0) as file, HashThread() as digest:
        write_all(file.fileno(), header_of(specs), digest)
        for name in in_file_order(specs):
            write_all(file.fileno(), bytes_of(tensors[name]), digest)
        return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, not copied."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def write_all(handle: int, data: bytes | memoryview, digest: "HashThread") -> None:
    """Write bytes to an open file, and have them hashed meanwhile."""
    view = memoryview(data)
    for start in range(0, len(view), _WRITE_BYTES):
        piece = view[start : start + _WRITE_BYTES]
        digest.update(piece)
        while piece:
            piece = piece[os.write(handle, piece) :]


class HashThread:
    """A SHA-256 computed in another thread, in the order of `update`; large pieces are hashed without Python's lock."""

    def __init__(self) -> None:
        self._state = hashlib.sha256()
        self._pieces: queue.SimpleQueue[memoryview | bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "HashThread":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def update(self, piece: memoryview | bytes) -> None:
        """Hash some bytes, later; they must not change until then."""
        self._pieces.put(piece)

    def hexdigest(self) -> str:
        """Wait for all that was given and return the digest."""
        self._finish()
        return self._state.hexdigest()

    def _finish(self) -> None:
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._state.update(piece)
