"""int8 Linears as they really run, by kernel name; `hyquant.kernels.selection` says which one a layer gets."""

from hyquant.kernels.base import Int8Linear
from hyquant.kernels.cuda import CUDA_INT_MM
from hyquant.kernels.int_mm import INT_MM
from hyquant.kernels.npu import NPU
from hyquant.kernels.reference import REFERENCE
from hyquant.kernels.x86 import AVX2, VNNI

KERNELS: dict[str, Int8Linear] = {kernel.name: kernel for kernel in (REFERENCE, INT_MM, AVX2, VNNI, CUDA_INT_MM, NPU)}

__all__ = ["KERNELS", "Int8Linear"]
