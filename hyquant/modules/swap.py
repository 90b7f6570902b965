"""Exchanging the Linears of a denoiser for QuantLinears and back, by swapping pointers; hooking its attentions.

Float Linears that smoothing scales are folded into are exchanged too, for Linears with the folded weights.

What was exchanged is remembered on the denoiser itself: the float modules (untouched, so that `restore_` is bit exact),
the quantized ones, the plan, and the clock they follow.
"""

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hyquant.attention import ATTENTIONS, QuantAttention
from hyquant.clock import StepClock
from hyquant.config import W8A8Timestep
from hyquant.errors import ConfigError, LayerMatchError
from hyquant.latency_report import KernelKind
from hyquant.models.attentions import hook_attends, hook_attentions_, unhook_attention_
from hyquant.modules.linear import FusedLinear, QuantLinear, quant_linears
from hyquant.plan import QuantPlan
from hyquant.schemes.contract import LayerTensors

_ATTRIBUTE = "_hyquant_swapped"
_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@dataclass(frozen=True)
class Swapped:
    """What `install_tensors_` did to a denoiser; all tables are by module path."""

    plan: QuantPlan
    clock: StepClock
    floats: dict[str, nn.Module]
    quantized: dict[str, QuantLinear]
    attentions: dict[str, QuantAttention] = field(default_factory=dict)

    def follow(self) -> None:
        """Listen to the clock from now on."""
        self.clock.subscribe(self.set_step, num_steps=self.plan.num_steps)

    def set_step(self, step_index: int) -> None:
        """Tell every quantized layer the step."""
        for module in self.quantized.values():
            module.set_step(step_index)


def swapped(denoiser: nn.Module) -> Swapped | None:
    """Return what was exchanged in a denoiser, or None if it is in float."""
    state = vars(denoiser).get(_ATTRIBUTE)
    assert state is None or isinstance(state, Swapped)
    return state


def install_tensors_(
    denoiser: nn.Module,
    plan: QuantPlan,
    tensors: Mapping[str, LayerTensors],
    clock: StepClock,
    *,
    attentions: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Put QuantLinears in place of the planned Linears, Linears where the plan rewrites, and quantize attentions.

    The denoiser is restored first if it is quantized. Nothing is exchanged unless everything fits.

    Args:
        denoiser: The denoiser; changed in place.
        plan: Which layers, with which scheme.
        tensors: Contract tensors by module path; weight and bias of what stays in float with other weights.
        clock: The clock the layers follow.
        attentions: Contract tensors of each planned attention by its block's module path; an attention without stored
            tensors has an empty entry or none.

    Raises:
        LayerMatchError: If tensors for a planned module are missing, or the denoiser lacks it.
        ConfigError: If a weight has another shape than the module it replaces, or an attention cannot be intercepted.
    """
    restore_(denoiser)
    sep = plan.config.linear.timestep_sep if isinstance(plan.config.linear, W8A8Timestep) else 0
    floats: dict[str, nn.Module] = {}
    quantized: dict[str, QuantLinear] = {}
    for layer in plan.quantized:
        assert layer.scheme is not None
        for path in layer.modules:
            floats[path] = _fitting_linear(denoiser, path, tensors)
        for paths in called_together(layer.modules):
            members = quant_linears([tensors[path] for path in paths], scheme=layer.scheme, timestep_sep=sep)
            quantized.update(zip(paths, members, strict=True))
    rewritten: dict[str, nn.Module] = {}
    for path in (path for layer in plan.rewritten for path in layer.modules):
        floats[path] = _fitting_linear(denoiser, path, tensors)
        rewritten[path] = linear_of(tensors[path]["weight"], tensors[path].get("bias"))
    hooks = {
        block.module: ATTENTIONS[str(block.scheme)]((attentions or {}).get(block.module, {}))
        for block in plan.quantized_attentions
    }
    hook_attentions_(denoiser, hooks)
    for path, module in (quantized | rewritten).items():
        _put(denoiser, path, module)
    state = Swapped(plan=plan, clock=clock, floats=floats, quantized=quantized, attentions=hooks)
    setattr(denoiser, _ATTRIBUTE, state)
    state.follow()


def called_together(modules: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the members of a layer group by who calls them: those of one module get the very same tensor.

    A single block of diffusers hands its attention a copy of what its MLP reads, so that q, k and v would not find the
    product that the MLP's Linear has made of them, and all would be multiplied twice.
    """
    return tuple(tuple(paths) for _, paths in itertools.groupby(modules, key=lambda path: path.rpartition(".")[0]))


def restore_(denoiser: nn.Module) -> None:
    """Put the float Linears back: the very same modules, so bit exact. A float denoiser is left as it is.

    Where the denoiser has been moved to another device meanwhile, they follow it.
    """
    state = swapped(denoiser)
    if state is None:
        return
    state.clock.unsubscribe(state.set_step)
    for path, module in state.floats.items():
        replaced = denoiser.get_submodule(path)
        _put(denoiser, path, module.to(next(itertools.chain(replaced.parameters(), replaced.buffers())).device))
    for path in state.attentions:
        unhook_attention_(denoiser, path)
    delattr(denoiser, _ATTRIBUTE)


def quantized_tensors(denoiser: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the contract tensors of every quantized Linear by module path; empty for a float denoiser."""
    state = swapped(denoiser)
    return {} if state is None else {path: module.tensors() for path, module in state.quantized.items()}


def attention_tensors(denoiser: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the contract tensors of every quantized attention by its block's module path; empty if there are none."""
    state = swapped(denoiser)
    return {} if state is None else {path: hook.tensors() for path, hook in state.attentions.items()}


def attention_kinds(denoiser: nn.Module) -> dict[str, KernelKind]:
    """Return how every quantized attention runs as things are now, by its block's module path."""
    state = swapped(denoiser)
    paths = () if state is None else state.attentions
    return {path: "native" if hook_attends(denoiser, path) else "simulated" for path in paths}


def structural_twin(denoiser: nn.Module, clock: StepClock | None = None) -> nn.Module:
    """Return a copy of a denoiser's structure that shares every tensor with it.

    Parameters, buffers and tensors kept as plain attributes are the same objects, so a twin costs no memory; modules
    are its own, so quantizing, restoring or compiling one does not touch the other. Forward hooks are not copied. The
    twin of a quantized denoiser has its own step buffers and follows its own clock.

    Args:
        denoiser: Float or quantized.
        clock: The clock that a quantized twin follows.

    Raises:
        ConfigError: If the denoiser is quantized and no clock is given.
    """
    state = swapped(denoiser)
    if state is not None and clock is None:
        raise ConfigError("the twin of a quantized denoiser must follow a clock, but got None; give it a StepClock.")
    for module in denoiser.modules():
        if isinstance(module, FusedLinear):
            module.prepare()  # so that the twin shares what is prepared
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _shared_tensors(denoiser, state)}
    for module in _all_modules(denoiser, state):
        memo.update({id(vars(module)[name]): OrderedDict() for name in _HOOK_TABLES})
    if state is not None:
        memo[id(state.clock)] = clock
        memo[id(state.plan)] = state.plan
    twin = copy.deepcopy(denoiser, memo)
    twin_state = swapped(twin)
    if twin_state is not None:
        twin_state.follow()
    return twin


def _all_modules(denoiser: nn.Module, state: Swapped | None) -> Iterator[nn.Module]:
    yield from denoiser.modules()
    if state is not None:
        for module in state.floats.values():
            yield from module.modules()


def _shared_tensors(denoiser: nn.Module, state: Swapped | None) -> Iterator[Tensor]:
    own = {
        id(buffer)
        for module in denoiser.modules()
        if isinstance(module, FusedLinear)
        for buffer in module.step_buffers()
    }
    for module in _all_modules(denoiser, state):
        held = (module._parameters, module._buffers, vars(module))
        for table in held:
            yield from (value for value in table.values() if isinstance(value, Tensor) and id(value) not in own)
    for hook in () if state is None else state.attentions.values():
        yield from (value for value in vars(hook).values() if isinstance(value, Tensor))


def float_linear(denoiser: nn.Module, path: str) -> nn.Linear:
    """Return the Linear at a module path.

    Raises:
        LayerMatchError: If the denoiser has no Linear there.
    """
    parent_path, _, name = path.rpartition(".")
    try:
        module = getattr(denoiser.get_submodule(parent_path), name, None)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise LayerMatchError(
            f"the plan's module {path} must be a Linear of the denoiser, but there is {type(module).__name__}; "
            "build the plan from this denoiser's layer groups."
        )
    return module


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen Linear that holds given tensors: weight [N, K] and bias [N] or None."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.eval()


def _fitting_linear(denoiser: nn.Module, path: str, tensors: Mapping[str, LayerTensors]) -> nn.Linear:
    module = float_linear(denoiser, path)
    if path not in tensors:
        raise LayerMatchError(f"every planned module must have tensors, but {path} has none; quantize it or replan.")
    shape = tuple(tensors[path]["weight"].shape)
    if shape != tuple(module.weight.shape):
        raise ConfigError(
            f"the new weight of {path} must have shape {tuple(module.weight.shape)}, but got {shape}; "
            "these tensors belong to another model."
        )
    return module


def _put(denoiser: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(denoiser.get_submodule(parent), name, module)
