"""The AVX2 kernel: an exact int8 Linear for x86-64 CPUs without VNNI, built from C on first use.

There PyTorch has nothing to offer: `torch._int_mm` runs scalar loops, and oneDNN's byte product (vpmaddubsw) saturates
its 16-bit sums, which on full-range operands is wrong by 18 % in relative L2. `int8_linear_avx2.c` widens to 16 bits.
It is compiled once per machine with the C compiler found in PATH (the one `torch.compile` needs as well) and kept in
the user's cache folder; without a compiler the reference kernel gives the same integers.

M rows   K input channels   N output channels
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from hyquant.kernels.base import TINY
from hyquant.latency_report import KernelKind

_SOURCE = "int8_linear_avx2.c"
_FLAGS = ("-O3", "-mavx2", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")

_OPERATORS = torch.library.Library("hyquant", "DEF")  # type: ignore[no-untyped-call]
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "int8_linear_avx2(Tensor x, Tensor packed, Tensor out_scale, Tensor? input_scale, Tensor? input_offset,"
    " Tensor? quant_bias, Tensor? bias, Tensor? mul_scale) -> Tensor"
)


@torch.library.impl(_OPERATORS, "int8_linear_avx2", "CPU")
def _int8_linear(
    x: Tensor,
    packed: Tensor,
    out_scale: Tensor,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    quant_bias: Tensor | None,
    bias: Tensor | None,
    mul_scale: Tensor | None,
) -> Tensor:
    library = _library()
    assert library is not None
    rows = x.contiguous()
    (num_rows, num_inputs), num_outputs = rows.shape, out_scale.numel()
    y = torch.empty((num_rows, num_outputs), dtype=torch.float32)
    failed = library.hyq_int8_linear(
        *(_address(tensor) for tensor in (rows, packed, y)),
        *(num_rows, num_outputs, num_inputs),
        *(_address(tensor) for tensor in (mul_scale, input_scale, input_offset, out_scale, quant_bias, bias)),
        *(TINY, torch.get_num_threads()),
    )
    if failed:
        raise torch.OutOfMemoryError(f"an int8 Linear needs {96 * num_inputs} bytes a thread, but malloc refused.")
    return y


@torch.library.register_fake("hyquant::int8_linear_avx2")  # type: ignore[untyped-decorator]
def _int8_linear_fake(
    x: Tensor,
    packed: Tensor,
    out_scale: Tensor,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    quant_bias: Tensor | None,
    bias: Tensor | None,
    mul_scale: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], out_scale.numel()))


class Avx2Kernel:
    """Quantize, multiply and dequantize in one pass over the input; see `int8_linear_avx2.c`."""

    name = "avx2"
    kind: KernelKind = "native"

    def prepare(self, weight: Tensor) -> Tensor:
        """Return an [N, K] int8 weight as the int16 panels that the C code reads, flat; about twice the bytes."""
        library = _library()
        assert library is not None
        num_outputs, num_inputs = weight.shape
        packed = torch.empty(library.hyq_packed_size(num_outputs, num_inputs), dtype=torch.int16)
        library.hyq_pack_weight(weight.contiguous().data_ptr(), packed.data_ptr(), num_outputs, num_inputs)
        return packed

    def static(
        self,
        x: Tensor,
        operand: Tensor,
        *,
        input_scale: Tensor,
        input_offset: Tensor,
        deq_scale: Tensor,
        quant_bias: Tensor,
        mul_scale: Tensor | None,
    ) -> Tensor:
        """Apply a Linear whose input range is fixed."""
        rows = x.reshape(-1, x.shape[-1]).float()
        y: Tensor = torch.ops.hyquant.int8_linear_avx2(
            rows, operand, deq_scale, input_scale, input_offset, quant_bias, None, mul_scale
        )
        return y.to(x.dtype).reshape(*x.shape[:-1], deq_scale.numel())

    def dynamic(
        self, x: Tensor, operand: Tensor, *, weight_scale: Tensor, bias: Tensor | None, mul_scale: Tensor | None
    ) -> Tensor:
        """Apply a Linear that takes the range of each token."""
        rows = x.reshape(-1, x.shape[-1]).float()
        y: Tensor = torch.ops.hyquant.int8_linear_avx2(rows, operand, weight_scale, None, None, None, bias, mul_scale)
        return y.to(x.dtype).reshape(*x.shape[:-1], weight_scale.numel())


def is_available() -> bool:
    """Return whether this CPU has AVX2 and the C code is built or can be."""
    return (
        platform.machine().lower() in ("x86_64", "amd64") and torch.cpu._is_avx2_supported() and _library() is not None
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    source = files("hyquant.kernels").joinpath(_SOURCE).read_text()
    name = hashlib.sha256("\n".join((source, *_FLAGS)).encode()).hexdigest()[:16]
    path = _cache_folder() / f"int8_linear_avx2-{name}.so"
    if not path.exists() and not _build(source, path):
        return None
    library = ctypes.CDLL(str(path))
    library.hyq_packed_size.argtypes = [ctypes.c_int64] * 2
    library.hyq_packed_size.restype = ctypes.c_int64
    library.hyq_pack_weight.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2
    library.hyq_pack_weight.restype = None
    library.hyq_int8_linear.argtypes = [
        *[ctypes.c_void_p] * 3,
        *[ctypes.c_int64] * 3,
        *[ctypes.c_void_p] * 6,
        ctypes.c_float,
        ctypes.c_int,
    ]
    library.hyq_int8_linear.restype = ctypes.c_int
    return library


def _address(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _build(source: str, path: Path) -> bool:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        (Path(folder) / _SOURCE).write_text(source)
        built = Path(folder) / path.name
        command = [compiler, *_FLAGS, "-o", str(built), str(Path(folder) / _SOURCE), "-lm"]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return False
        os.replace(built, path)
    return True


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyquant"


AVX2 = Avx2Kernel()
