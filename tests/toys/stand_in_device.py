"""A card that is not there: tensors that say they lie on `npu:0`, compute on the CPU, and refuse to mix with others.

It shows without an accelerator what breaks on every one: an operation between tensors of two devices. `torch.nn` and
the library run on it as they are, in eager mode. Registering it changes torch for the whole process, so tests use it in
a process of their own.
"""

import sys
import types
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_MOVES = ("aten::copy_", "aten::_to_copy")
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")
"""Operations whose indices may lie on the CPU."""


def register() -> torch.device:
    """Make torch know the device, and return it."""
    runtime: Any = types.ModuleType("torch.npu")
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "_is_in_bad_fork": False,
        "get_device_name": "stand-in",
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }
    for name, answer in answers.items():
        setattr(runtime, name, lambda *_, answer=answer: answer)
    for name in ("_lazy_init", "synchronize", "manual_seed_all", "empty_cache", "reset_peak_memory_stats"):
        setattr(runtime, name, lambda *_: None)
    _setup_privateuseone_for_python_backend("npu", runtime)
    sys.modules["torch.npu"] = runtime
    from_data = torch.tensor

    def tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        made = from_data(data, dtype=dtype)
        return made if device is None else made.to(device)

    torch.tensor = tensor  # makes its tensor below the dispatcher
    return torch.device("npu", 0)


class StandIn(torch.Tensor):
    """A tensor that says it lies on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "StandIn":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device("npu", 0), requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class OnStandIn(TorchDispatchMode):
    """While it lasts, the device can be used; operations on the CPU alone are what they always are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    name = func._schema.name
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    there = [one for one in tensors if isinstance(one, StandIn)]
    _refuse_mixed(name, args, there, [one for one in tensors if not isinstance(one, StandIn)])
    plain_args, plain_kwargs = tree_map(lambda one: one.held if isinstance(one, StandIn) else one, (args, kwargs))
    wanted = kwargs.get("device")
    if wanted is not None:
        plain_kwargs = {**plain_kwargs, "device": torch.device("cpu")}
    answer = func(*plain_args, **plain_kwargs)
    if name == "aten::_local_scalar_dense":
        return answer
    if name.endswith("_") and tensors and isinstance(args[0], torch.Tensor):
        return args[0]
    is_there = torch.device(wanted).type == "npu" if wanted is not None else bool(there)
    return tree_map(lambda one: StandIn(one) if isinstance(one, torch.Tensor) else one, answer) if is_there else answer


def _refuse_mixed(name, args, there, elsewhere):
    """Raise as a card does; a tensor without dimensions is a number, and may lie anywhere."""
    if not there or name in _MOVES:
        return
    if name in _INDEXED and isinstance(args[0], StandIn):
        return
    is_joined = name in ("aten::cat", "aten::stack")
    if any(one.dim() > 0 or is_joined for one in elsewhere):
        raise RuntimeError(f"expected all tensors to be on one device, but {name} has npu:0 and cpu")
