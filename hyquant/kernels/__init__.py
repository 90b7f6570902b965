"""int8 Linears as they really run, by kernel name, and which one a device gets."""

import torch

from hyquant.kernels.avx2 import AVX2
from hyquant.kernels.avx2 import is_available as has_avx2_kernel
from hyquant.kernels.base import Int8Linear
from hyquant.kernels.cpu import CPU, has_int8_instructions
from hyquant.kernels.reference import REFERENCE

KERNELS: dict[str, Int8Linear] = {"reference": REFERENCE, "cpu": CPU, "avx2": AVX2}


def kernel_for(device: torch.device) -> Int8Linear:
    """Return the native kernel of a device, or the reference kernel where there is none."""
    if device.type == "cpu" and has_int8_instructions():
        return CPU
    if device.type == "cpu" and has_avx2_kernel():
        return AVX2
    return REFERENCE


__all__ = ["KERNELS", "Int8Linear", "kernel_for"]
