"""Rows of weights in C for x86-64 CPUs (`int8_rows_x86.c`): what PyTorch does in several passes, in one.

A chain of operators reads and writes a weight once for each of them. The results are the same, bit by bit, but for sums
of squares, which are added up in another order. Every function takes matrices [N, K] on the CPU: weights in float32 or
bfloat16, codes in int8.

N rows (output channels)   K input channels
"""

import functools

import torch
from torch import Tensor

from hyquant.kernels.x86_build import AVX2_BUILD, VNNI_BUILD, X86Build, address

_WEIGHTS = (torch.float32, torch.bfloat16)


def has_rows_kernel(weight: Tensor) -> bool:
    """Return whether the functions here take a weight, as its device and dtype are, and the C code is there."""
    return weight.dtype in _WEIGHTS and _is_taken(weight)


def sums_rows(codes: Tensor) -> bool:
    """Return whether `row_sums` takes these codes."""
    return codes.dtype == torch.int8 and _is_taken(codes)


def row_absmax(weight: Tensor, mul: Tensor | None = None) -> Tensor:
    """Return the largest |w m| of each row, [N, 1] float32; not finite where the row is not.

    Args:
        weight: [N, K].
        mul: [K] float32, what each input channel is multiplied by first; None for nothing.
    """
    absmax = torch.empty(weight.shape[0], 1)
    _call("hyq_row_absmax", *_pointers(weight), _factors(mul), absmax, *weight.shape)
    return absmax


def quantize_rows(weight: Tensor, scale: Tensor, mul: Tensor | None = None, *, qmin: int, qmax: int) -> Tensor:
    """Return clamp(round(w m / s), qmin, qmax), [N, K] int8.

    Args:
        weight: [N, K].
        scale: [N, 1] float32 > 0.
        mul: [K] float32 or None, as for `row_absmax`.
        qmin: Lowest code.
        qmax: Largest code.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8)
    arguments = (*_pointers(weight), _factors(mul), _factors(scale), codes, qmin, qmax, *weight.shape)
    _call("hyq_quantize_rows", *arguments)
    return codes


def row_sums(codes: Tensor) -> Tensor:
    """Return the sum of each row of int8 codes [N, K]: [N] int32."""
    sums = torch.empty(codes.shape[0], dtype=torch.int32)
    _call("hyq_row_sums", codes.contiguous(), sums, *codes.shape)
    return sums


def signal_and_noise(weight: Tensor, codes: Tensor, scale: Tensor) -> tuple[float, float]:
    """Return the sums of w^2 and of (w - q s)^2.

    Args:
        weight: [N, K].
        codes: [N, K] int8.
        scale: [N, 1] float32.
    """
    sums = torch.empty(2, dtype=torch.float64)
    _call("hyq_row_errors", *_pointers(weight), codes.contiguous(), _factors(scale), sums, *weight.shape)
    signal, noise = sums.tolist()
    return signal, noise


@functools.cache
def _build() -> X86Build | None:
    cpu = torch.device("cpu")
    return next((build for build in (VNNI_BUILD, AVX2_BUILD) if build.is_available(cpu)), None)


def _call(name: str, *arguments: Tensor | int | None) -> None:
    build = _build()
    assert build is not None
    function = getattr(build.library(), name)
    found = (address(value, value.dtype) if isinstance(value, Tensor) else value for value in arguments)
    function(*found, torch.get_num_threads())


def _pointers(weight: Tensor) -> tuple[Tensor, int]:
    return weight.detach().contiguous(), weight.dtype == torch.bfloat16


def _factors(factors: Tensor | None) -> Tensor | None:
    return None if factors is None else factors.float().contiguous()


def _is_taken(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.ndim == 2 and _build() is not None
