"""Arrays that know which dtype of the device they are in: numpy has no bfloat16, and operators refuse by dtype.

Floats are held in float32, rounded to the dtype they stand for; a sum or product of two arrays is computed in float32
and rounded again, as a device does.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STORED = {
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
    "I8": ("int8", "i1"),
    "I32": ("int32", "<i4"),
    "I64": ("int64", "<i8"),
    "U8": ("uint8", "u1"),
}
"""Dtypes of a safetensors header: our name, and numpy's name of the bytes."""


@dataclass(frozen=True)
class Typed:
    """An array and the device dtype of it; floats are float32 arrays whose values the dtype can represent."""

    values: np.ndarray
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def is_float(self) -> bool:
        return self.dtype in ("float32", "float16", "bfloat16")


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest value with 8 significant bits, ties to even: add half of the cut part, then cut."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).reshape(np.shape(x))


def cast(x: Typed | np.ndarray, dtype: str) -> Typed:
    """Convert to a dtype; integers become floats and floats whole numbers by value."""
    values = x.values if isinstance(x, Typed) else x
    if dtype == "bfloat16":
        return Typed(to_bfloat16(values.astype(np.float32)), dtype)
    if dtype == "float16":
        return Typed(values.astype(np.float16).astype(np.float32), dtype)
    return Typed(values.astype(dtype), dtype)


def read_safetensors(path: Path) -> dict[str, Typed]:
    """Read a whole file by its published layout: 8 bytes of length, a JSON header with offsets, the bytes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, numpy_dtype = STORED[entry["dtype"]]
        first, last = entry["data_offsets"]
        values = np.frombuffer(data[start + first : start + last], numpy_dtype).reshape(entry["shape"])
        if dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        if dtype == "float16":
            values = values.astype(np.float32)
        tensors[name] = Typed(values, dtype)
    return tensors
