"""Compiling a denoiser block by block, each denoiser with a compilation cache of its own.

Blocks of one class share one compiled graph as long as they look alike, so a denoiser of 60 blocks compiles a handful
of graphs. `torch.compile` keeps its cache on the code object of the function it compiles, which all instances of a
class share: a search that compiles one quantization after another would run into the recompile limit, and slow every
call down by checking the guards of long-dead variants. Hence each denoiser gets its own copy of its blocks' code.
"""

import functools
import shutil
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import reset_code

from hyquant.compiler_records import forget_compilations
from hyquant.kernels.cuda import row_kernels
from hyquant.values import map_tensors

_CPU_COMPILERS = ("g++", "clang++")


def can_compile(device: torch.device) -> bool:
    """Return whether `torch.compile` has what it needs here.

    On the CPU that is a C++ compiler in PATH, on CUDA triton and a C compiler; for other devices it has no backend.
    """
    if device.type == "cuda":
        return row_kernels() is not None
    return device.type == "cpu" and any(shutil.which(name) for name in _CPU_COMPILERS)


def blocks_of(denoiser: nn.Module) -> Iterator[nn.Module]:
    """Yield the repeated blocks of a denoiser: the members of its top-level ModuleLists."""
    for child in denoiser.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def compile_blocks_(denoiser: nn.Module) -> None:
    """Compile every block of a denoiser for fixed shapes; nothing is compiled before the first call.

    Inputs are made contiguous before each block: the first block of a kind often gets a view of another stride than the
    later ones, which would compile the same arithmetic twice.
    """
    copies: dict[Callable[..., Any], Callable[..., Any]] = {}
    for block in blocks_of(denoiser):
        # A block whose attention is intercepted in the original layout has a forward of its own.
        forward = vars(block).get("forward", types.MethodType(type(block).forward, block)).__func__
        if forward not in copies:
            copies[forward] = _with_own_code(forward)
        block.register_forward_pre_hook(_contiguous_inputs, with_kwargs=True)
        block.forward = torch.compile(types.MethodType(copies[forward], block), dynamic=False)
    codes = [copy.__code__ for copy in copies.values()]
    weakref.finalize(denoiser, _forget_compiled, codes).atexit = False


def _forget_compiled(codes: Sequence[types.CodeType]) -> None:
    """Free the graphs of code objects that nobody will run again, what checks their guards, and records of both.

    For every guarded object the compiler registers a finalizer that would invalidate the graph. It holds the guards,
    and so megabytes, until that object dies; without a graph it would do nothing, and is taken off.

    Source: torch/_dynamo/guards.py, `CheckFunctionManager.id_ref` and `invalidate`.
    """
    for code in codes:
        reset_code(code)
    registry: dict[weakref.finalize[..., Any], Any] = getattr(weakref.finalize, "_registry", {})
    for finalizer in list(registry):
        if (alive := finalizer.peek()) is not None and _guards_nothing(alive[1]):
            finalizer.detach()
    forget_compilations()


def _guards_nothing(called: object) -> bool:
    """Tell whether a finalizer's function is one that invalidates a graph which is gone already."""
    owner = getattr(getattr(called, "func", None), "__self__", None)
    if type(owner).__name__ != "CheckFunctionManager":
        return False
    return getattr(getattr(owner, "guard_manager", None), "cache_entry", None) is None


def _contiguous_inputs(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    changed: tuple[tuple[Any, ...], dict[str, Any]] = map_tensors((args, kwargs), _packed)
    return changed


def _packed(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor with the strides of a new one; a dimension of size 1 may have kept others."""
    whole, strides, stride = tensor.contiguous(), [], 1
    for size in reversed(tensor.shape):
        strides.append(stride)
        stride *= max(size, 1)
    return whole.as_strided(whole.shape, strides[::-1], whole.storage_offset())


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does the same but whose code object is a copy."""
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copy, function)
