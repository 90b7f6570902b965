"""Where the time of a float denoiser goes, and how much faster quantization can make it at most.

The whole step is timed as latencies are: compiled if they are, on the same inputs. Linears are timed where they stand,
in eager steps with a look at the clock before and after each; the kernels' speed-up by itself, float and int8 in turns
on random inputs of the same size, quantizing them included; attention by itself, too. What is left of the step is
norms, modulation and whatever lies between.

    share of a kind = its seconds / seconds of the step
    ceiling of a plan = step / (step - sum over quantized layers of seconds (1 - 1 / kernel speed-up))

The ceiling is Amdahl's law (AFIPS Spring Joint Computer Conference, 1967) with everything else left as it is. It is
meant as an upper bound: a Linear in a step finds its weights cold, a kernel that is timed by itself finds them warm.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyquant.attention.int8 import PARTS, Int8Attention
from hyquant.config import FrozenModel
from hyquant.cost import ATTENTION, kind_of
from hyquant.devices import resolve_device
from hyquant.kernels.selection import candidates
from hyquant.kernels.x86_attention import attends_natively
from hyquant.kernels.x86_build import VNNI_BUILD
from hyquant.latency import LatencyBench
from hyquant.models.attentions import attention_blocks, hook_attention_
from hyquant.models.names import layer_groups
from hyquant.modules.linear import FusedLinear
from hyquant.modules.swap import called_together, restore_, structural_twin
from hyquant.numerics.qparams import choose_qparams
from hyquant.plan import QuantPlan
from hyquant.schemes import SCHEMES
from hyquant.timing import median_seconds


class PartTime(FrozenModel):
    """The Linears of one kind and size, or all attentions, in one step of the float denoiser.

    Attributes:
        kind: What they are counted under, such as "img fc1".
        layers: Canonical names of the layers, or of the blocks that own the attentions.
        size: Rows x input channels -> output channels, or batch x heads x tokens x head dim.
        operations: Multiplications and additions in one step.
        float_s: Seconds in one step, in float.
        speedup: Seconds in float over those of the fastest int8 kernel, by themselves; 1 where there is none.
        kernel: The kernel; None where there is none.
    """

    kind: str
    layers: tuple[str, ...]
    size: str
    operations: int
    float_s: float
    speedup: float
    kernel: str | None


class DenoiserProfile(FrozenModel):
    """Where the time of one float denoiser step goes.

    Attributes:
        shape, device, compiled: As in `LatencyReport`.
        step_s: Seconds of a whole step.
        parts: What was timed alone.
    """

    shape: str
    device: str
    compiled: bool
    step_s: float
    parts: tuple[PartTime, ...]

    @property
    def rest_s(self) -> float:
        """Return the seconds of a step that no part accounts for: norms, modulation, rotary embedding, activations."""
        return max(0.0, self.step_s - sum(part.float_s for part in self.parts))


def ceiling(profile: DenoiserProfile, names: Iterable[str]) -> float:
    """Return how many times faster a step can get at most if some layers are quantized.

    Args:
        profile: Of the float denoiser.
        names: Canonical names of the layers, and of the blocks whose attentions are quantized.
    """
    quantized = set(names)
    saved = sum(
        part.float_s * len(quantized.intersection(part.layers)) / len(part.layers) * (1 - 1 / part.speedup)
        for part in profile.parts
    )
    return max(1.0, profile.step_s / max(profile.step_s - saved, profile.rest_s, 1e-12))


def quantized_names(plan: QuantPlan) -> tuple[str, ...]:
    """Return the layers that a plan quantizes and the blocks whose attentions it quantizes."""
    blocks = (block.name for block in plan.attentions if block.scheme is not None)
    return (*(layer.name for layer in plan.quantized), *blocks)


def profile_denoiser(bench: LatencyBench, *, rounds: int = 7, warmup: int = 2) -> DenoiserProfile:
    """Measure a model's float denoiser at a shape; nothing else should run on this host meanwhile.

    Args:
        bench: Of the model and the shape. Its compiled control is made if it is not there, and kept.
        rounds: How often everything is timed; medians are taken.
        warmup: Steps to run without counting them; the first one compiles.
    """
    step_s = bench.float_step_s(rounds=rounds, warmup=warmup)
    with torch.inference_mode():
        parts = tuple(_timed_parts(bench, rounds))
    return DenoiserProfile(
        shape=bench.description, device=bench.device_description, compiled=bench.is_compiled, step_s=step_s, parts=parts
    )


@dataclass
class _Linears:
    """Layer groups of one kind and size; `parts` are the members of one of them that run as one."""

    rows: int
    dtype: torch.dtype
    names: list[str] = field(default_factory=list)
    parts: tuple[tuple[nn.Linear, ...], ...] = ()
    seconds: float = 0.0


@dataclass
class _Seen:
    """What steps show: rows, dtype and seconds by module path; q and which keys count by block."""

    rows: dict[str, tuple[int, torch.dtype]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    attentions: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)


def _timed_parts(bench: LatencyBench, rounds: int) -> Iterator[PartTime]:
    device = bench.model.device
    twin = structural_twin(bench.model.denoiser, bench.model.clock)
    restore_(twin)
    seen = _watched(twin, bench.inputs, device, rounds)
    for kind, linears in _by_size(twin, seen).items():
        yield _timed_linears(kind[0], linears, device, rounds)
    yield from _timed_attentions(seen, device, rounds)


def _watched(twin: nn.Module, inputs: Mapping[str, Any], device: torch.device, rounds: int) -> _Seen:
    """Run eager steps, and note what Linears and attentions get and how long each Linear takes."""
    seen, now = _Seen(), _clock(device)
    started: dict[str, float] = {}

    def begin(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.rows[path] = args[0].numel() // args[0].shape[-1], args[0].dtype
        started[path] = now()

    def end(path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.seconds.setdefault(path, []).append(now() - started[path])

    def note(name: str, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        seen.attentions[name] = q, valid
        return q, k, v

    for group in layer_groups(twin):
        for path in group.modules:
            twin.get_submodule(path).register_forward_pre_hook(partial(begin, path))
            twin.get_submodule(path).register_forward_hook(partial(end, path))
    for block in attention_blocks(twin):
        hook_attention_(twin, block.module, partial(note, block.name))
    for _ in range(rounds + 1):
        twin(**inputs)
    return seen


def _by_size(twin: nn.Module, seen: _Seen) -> dict[tuple[str, int, int, int], _Linears]:
    found: dict[tuple[str, int, int, int], _Linears] = {}
    for group in layer_groups(twin):
        if group.modules[0] not in seen.rows:
            continue
        rows, dtype = seen.rows[group.modules[0]]
        key = kind_of(group.name), rows, group.in_features, sum(group.out_features)
        own = found.setdefault(key, _Linears(rows, dtype))
        own.names.append(group.name)
        own.parts = tuple(
            tuple(twin.get_submodule(path) for path in paths)  # type: ignore[misc]
            for paths in called_together(group.modules)
        )
        own.seconds += sum(median(seen.seconds[path][1:]) for path in group.modules)
    return found


def _timed_linears(kind: str, linears: _Linears, device: torch.device, rounds: int) -> PartTime:
    first = [member for part in linears.parts for member in part]
    inputs, outputs = first[0].in_features, sum(member.out_features for member in first)
    x = torch.randn(linears.rows, inputs, device=device).to(linears.dtype)

    def in_float() -> None:
        for member in first:
            F.linear(x, member.weight, member.bias)

    calls: dict[str, Callable[[], object]] = {"float": in_float}
    native = candidates(device)[0].kind == "native"
    if native:
        dynamic, static = (
            [_fused(part, x, kind=scheme) for part in linears.parts] for scheme in ("w8a8_dynamic", "w8a8_static")
        )
        calls |= {
            "dynamic": lambda: [layer(x) for layer in dynamic],
            "static": lambda: [layer(x) for layer in static],
        }
    seconds = median_seconds(calls, _clock(device), rounds)
    quantized_s = min(seconds["dynamic"], seconds["static"]) if native else math.inf
    return PartTime(
        kind=kind,
        layers=tuple(linears.names),
        size=f"{linears.rows}x{inputs}->{outputs}",
        operations=2 * linears.rows * inputs * outputs * len(linears.names),
        float_s=linears.seconds,
        speedup=seconds["float"] / quantized_s if native else 1.0,
        kernel=dynamic[0].kernel.name if native else None,
    )


def _fused(members: Sequence[nn.Linear], x: Tensor, *, kind: str) -> FusedLinear:
    """Return some Linears that share an input as one int8 layer, its range that of x."""
    scheme, lo, hi = SCHEMES[kind], x.float().amin().reshape(1), x.float().amax().reshape(1)
    qparams = choose_qparams(lo, hi, symmetric=False, deploy_dtype="bfloat16") if scheme.needs_range else None
    tensors = [
        scheme.build(member.weight.float(), None if member.bias is None else member.bias.float(), qparams, "bfloat16")
        for member in members
    ]
    return FusedLinear(tensors, scheme=kind, timestep_sep=0)


def _timed_attentions(seen: _Seen, device: torch.device, rounds: int) -> Iterator[PartTime]:
    if not seen.attentions:
        return
    (batch, tokens, heads, head_dim), valid = next((tuple(q.shape), valid) for q, valid in seen.attentions.values())
    dtype = next(iter(seen.attentions.values()))[0].dtype
    q, k, v = (torch.randn(batch, heads, tokens, head_dim, device=device).to(dtype) for _ in range(3))
    mask = None if valid is None else valid[:, None, None, :]
    calls: dict[str, Callable[[], object]] = {"float": lambda: F.scaled_dot_product_attention(q, k, v, mask)}
    native = attends_natively(device, head_dim)
    if native:
        scale = (q.float().abs().amax() / 127).expand(heads, 1).contiguous()
        hook = Int8Attention({f"{part}.scale": scale for part in PARTS})
        q_first, k_first, v_first = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        calls["int8"] = lambda: hook.attend(q_first, k_first, v_first, valid)
    seconds = median_seconds(calls, _clock(device), rounds)
    yield PartTime(
        kind=ATTENTION,
        layers=tuple(seen.attentions),
        size=f"{batch}x{heads}x{tokens}x{head_dim}",
        operations=4 * batch * tokens * tokens * heads * head_dim * len(seen.attentions),
        float_s=seconds["float"] * len(seen.attentions),
        speedup=seconds["float"] / seconds["int8"] if native else 1.0,
        kernel=VNNI_BUILD.name if native else None,
    )


def _clock(device: torch.device) -> Callable[[], float]:
    """Return what tells the seconds after everything on the device has ended."""
    return partial(resolve_device(device.type).now_s, device.index or 0)
