"""Runs the CUDA kernel on the CPU: Triton's interpreter for its own parts, cuBLASLt's rules around the product.

Triton decides at import whether it interprets, so this is a process of its own: it reads calls and writes results.
Usage: TRITON_INTERPRET=1 python -m tests.hyquant_tests.interpreted_rows CALLS RESULTS
"""

import sys

import torch

from hyquant.kernels import cuda
from tests.reference.cublas import by_cublas_rules


def run(call):
    operand = cuda.CUDA_INT_MM.prepare(call["weight"])
    return getattr(cuda.CUDA_INT_MM, call["form"])(call["x"], operand, **call["options"])


def main(calls, results):
    assert cuda.row_kernels() is not None
    cuda.BY_OPERATORS = None  # falling back to operators is an error here
    torch._int_mm = by_cublas_rules
    torch.save({name: run(call) for name, call in torch.load(calls).items()}, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
