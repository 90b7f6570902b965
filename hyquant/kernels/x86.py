"""int8 Linears in C for x86-64 CPUs: quantize, multiply exactly, dequantize, in one call; built on first use.

One source, `int8_linear_x86.c`, is built for two instruction sets. On AVX512-VNNI it does in one call what takes
PyTorch a chain of operators and an int32 result in memory. On AVX2 PyTorch has nothing to offer: `torch._int_mm` runs
scalar loops, and oneDNN's byte product (vpmaddubsw) saturates its 16-bit sums, which on full-range operands is wrong by
18 % in relative L2.

The C compiler found in PATH (the one `torch.compile` needs as well) builds it once per machine; the result is kept in
the user's cache folder. Without a compiler other kernels give the same integers.

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
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from hyquant.kernels.base import TINY
from hyquant.latency_report import KernelKind

_SOURCE = "int8_linear_x86.c"
_FLAGS = ("-O3", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
_DIRECT_DTYPES = (torch.float32, torch.bfloat16)

_OPERATORS = torch.library.Library("hyquant", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "int8_linear_x86(str name, Tensor x, Tensor packed, Tensor out_scale, Tensor? input_scale, Tensor? input_offset,"
    " Tensor? quant_bias, Tensor? bias, Tensor? mul_scale, int largest_code) -> Tensor"
)


@torch.library.impl(_OPERATORS, "int8_linear_x86", "CPU")
def _int8_linear(
    name: str,
    x: Tensor,
    packed: Tensor,
    out_scale: Tensor,
    input_scale: Tensor | None,
    input_offset: Tensor | None,
    quant_bias: Tensor | None,
    bias: Tensor | None,
    mul_scale: Tensor | None,
    largest_code: int,
) -> Tensor:
    library = _library(name)
    assert library is not None
    rows = x.contiguous()
    (num_rows, num_inputs), num_outputs = rows.shape, out_scale.numel()
    y = torch.empty((num_rows, num_outputs), dtype=x.dtype)
    failed = library.hyq_int8_linear(
        *(_address(tensor) for tensor in (rows, packed, y)),
        *(num_rows, num_outputs, num_inputs),
        *(_address(tensor) for tensor in (mul_scale, input_scale, input_offset, out_scale, quant_bias, bias)),
        *(largest_code, TINY, x.dtype == torch.bfloat16, torch.get_num_threads()),
    )
    if failed:
        raise torch.OutOfMemoryError(f"an int8 Linear needs {num_rows} x {num_inputs} codes, but malloc refused.")
    return y


@torch.library.register_fake("hyquant::int8_linear_x86")  # type: ignore[untyped-decorator]
def _int8_linear_fake(name: str, x: Tensor, packed: Tensor, out_scale: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], out_scale.numel()))


@dataclass(frozen=True)
class X86Kernel:
    """`int8_linear_x86.c`, built for one instruction set.

    Attributes:
        name: Key in `KERNELS`.
        flags: What the compiler is told about the instruction set.
        has_instructions: Whether this CPU has them.
    """

    name: str
    flags: tuple[str, ...]
    has_instructions: Callable[[], bool]
    kind: KernelKind = "native"

    def is_available(self, device: torch.device) -> bool:
        """Return whether this is a CPU that has the instructions and the C code is built or can be."""
        is_x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
        return is_x86 and self.has_instructions() and _library(self.name) is not None

    def prepare(self, weight: Tensor) -> Tensor:
        """Return an [N, K] int8 weight as the panels that the C code reads, as bytes: K bytes a row, on AVX2 2 K."""
        library = _library(self.name)
        assert library is not None
        num_outputs, num_inputs = weight.shape
        packed = torch.empty(library.hyq_packed_bytes(num_outputs, num_inputs), dtype=torch.int8)
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
        return self._apply(x, operand, deq_scale, input_scale, input_offset, quant_bias, None, mul_scale, 127)

    def dynamic(
        self,
        x: Tensor,
        operand: Tensor,
        *,
        weight_scale: Tensor,
        bias: Tensor | None,
        mul_scale: Tensor | None,
        largest_code: int = 127,
    ) -> Tensor:
        """Apply a Linear that takes the range of each token."""
        return self._apply(x, operand, weight_scale, None, None, None, bias, mul_scale, largest_code)

    def _apply(self, x: Tensor, operand: Tensor, out_scale: Tensor, *others: Tensor | int | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.dtype not in _DIRECT_DTYPES:
            rows = rows.float()
        y: Tensor = torch.ops.hyquant.int8_linear_x86(self.name, rows, operand, out_scale, *others)
        return y.to(x.dtype).reshape(*x.shape[:-1], out_scale.numel())


AVX2 = X86Kernel("avx2", ("-mavx2",), torch.cpu._is_avx2_supported)
VNNI = X86Kernel(
    "vnni",
    ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    torch.cpu._is_vnni_supported,
)
_BUILDS = {kernel.name: kernel for kernel in (AVX2, VNNI)}


@functools.cache
def _library(name: str) -> ctypes.CDLL | None:
    flags = (*_FLAGS, *_BUILDS[name].flags)
    source = files("hyquant.kernels").joinpath(_SOURCE).read_text()
    digest = hashlib.sha256("\n".join((source, *flags)).encode()).hexdigest()[:16]
    path = cache_folder() / f"int8_linear_{name}-{digest}.so"
    if not path.exists() and not _build(source, flags, path):
        return None
    library = ctypes.CDLL(str(path))
    library.hyq_packed_bytes.argtypes = [ctypes.c_int64] * 2
    library.hyq_packed_bytes.restype = ctypes.c_int64
    library.hyq_pack_weight.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2
    library.hyq_pack_weight.restype = None
    library.hyq_int8_linear.argtypes = [
        *[ctypes.c_void_p] * 3,
        *[ctypes.c_int64] * 3,
        *[ctypes.c_void_p] * 6,
        ctypes.c_float,
        ctypes.c_float,
        ctypes.c_int,
        ctypes.c_int,
    ]
    library.hyq_int8_linear.restype = ctypes.c_int
    return library


def _address(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _build(source: str, flags: tuple[str, ...], path: Path) -> bool:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        (Path(folder) / _SOURCE).write_text(source)
        built = Path(folder) / path.name
        command = [compiler, *flags, "-o", str(built), str(Path(folder) / _SOURCE), "-lm"]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return False
        os.replace(built, path)
    return True


@functools.cache
def source_digest() -> str:
    """Return what changes if the C source does."""
    return hashlib.sha256(files("hyquant.kernels").joinpath(_SOURCE).read_bytes()).hexdigest()[:16]


def cache_folder() -> Path:
    """Return the folder of the user's cache that kernels keep their files in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyquant"
