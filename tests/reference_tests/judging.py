"""How far a deployed export is from its float model: end to end, and layer by layer on the float model's own inputs."""

import copy
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.attentions import quantized_attention, rerouted
from tests.reference.loader import Loaded, load
from tests.reference.steps import static_steps
from tests.reference_tests.routes import Route, denoised, description_of, planned, rounded


@dataclass(frozen=True)
class Scores:
    """What is held against the bars.

    Attributes:
        cosine: Of the latents after the loop.
        gains: By replaced Linear or attention and step, least-squares slope of its output (without bias) on the float
            one's. Over all steps at once, a table that is one row off would look better than it is.
        num_replaced: Linears that the loader replaced.
        num_planned: Linears that the manifest's plan quantizes.
    """

    cosine: float
    gains: dict[tuple[str, int], float]
    num_replaced: int
    num_planned: int

    @property
    def worst_gain_error(self) -> float:
        return max((abs(gain - 1) for gain in self.gains.values()), default=0.0)

    def missed(self, lowest_cosine: float, *, largest_gain_error: float = 0.02) -> set[str]:
        """Return the names of the bars that are missed."""
        bars = {
            "count": self.num_replaced == self.num_planned and bool(self.gains),
            "cosine": self.cosine >= lowest_cosine,
            "gain": self.worst_gain_error < largest_gain_error,
        }
        return {name for name, is_met in bars.items() if not is_met}


@dataclass(frozen=True)
class FloatRun:
    """The float model's latents, and what its Linears and attentions read: (step, input) in the order of the calls."""

    latents: Tensor
    linears: dict[str, list[tuple[int, Tensor]]]
    attentions: dict[str, list[tuple[int, tuple[Tensor, ...]]]]


def run_float(route: Route) -> FloatRun:
    """Run the deployed model in float and keep every input, rounded to the deployment dtype."""
    model, linears, attentions, now = copy.deepcopy(route.deployed), defaultdict(list), defaultdict(list), [0]

    def keep(block: str, *qkv: Tensor) -> Tensor:
        attentions[block].append((now[0], tuple(rounded(part, route.dtype) for part in qkv)))
        return F.scaled_dot_product_attention(*qkv)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: linears[name].append((now[0], rounded(args[0], route.dtype)))
            )
    with rerouted(model, block_names(model), keep):
        found = denoised(model, route.inputs, dtype=route.dtype, set_step=lambda step: now.__setitem__(0, step))
    return FloatRun(found, dict(linears), dict(attentions))


def block_names(model: nn.Module) -> list[str]:
    """Return the double and single blocks, which own the attentions, of either layout."""
    lists = ("double_blocks", "single_blocks", "transformer_blocks", "single_transformer_blocks")
    return [f"{found}.{index}" for found in lists for index in range(len(getattr(model, found, ())))]


def deploy(route: Route, folder: Path, **options: Any) -> tuple[Loaded, Tensor]:
    """Load an export by the reference into the float model, with the static steps it recommends, and run the loop."""
    options = {"dtype": route.dtype, "static_steps": static_steps(folder)} | options
    loaded = load(copy.deepcopy(route.deployed), description_of(folder), **options)
    with loaded.running():
        return loaded, denoised(loaded.model, route.inputs, dtype=route.dtype, set_step=loaded.steps.set)


def judge(route: Route, folder: Path, expected: FloatRun, **options: Any) -> tuple[Scores, Loaded, Tensor]:
    """Deploy an export and score it; return the scores, what was loaded, and the latents."""
    loaded, found = deploy(route, folder, **options)
    gains = {}
    for name in loaded.linears:
        gains |= linear_gains(route.deployed, loaded, name, expected)
    for name in loaded.attentions:
        gains |= attention_gains(loaded, name, expected)
    num_planned = sum(len(names) for names, _ in planned(folder))
    return Scores(cosine(found, expected.latents), gains, len(loaded.linears), num_planned), loaded, found


@torch.no_grad()
def linear_gains(float_model: nn.Module, loaded: Loaded, name: str, expected: FloatRun) -> dict[tuple[str, int], float]:
    """Return the slope of a Linear at every step; the bias would hide an error of the scale, so it is taken off."""
    ours, theirs = float_model.get_submodule(name), loaded.model.get_submodule(name)
    gains = {}
    for step, x in expected.linears[name]:
        loaded.steps.set(step)
        gains[name, step] = slope(theirs(x) - ours.bias, F.linear(x, ours.weight))
    return gains


def attention_gains(loaded: Loaded, name: str, expected: FloatRun) -> dict[tuple[str, int], float]:
    """Return the slope of a block's quantized attention at every step."""
    answer = quantized_attention(loaded.attentions, loaded.dtype)
    return {
        (name, step): slope(answer(name, *qkv), F.scaled_dot_product_attention(*qkv))
        for step, qkv in expected.attentions[name]
    }


def slope(actual: Tensor, expected: Tensor) -> float:
    """Return the factor on `expected` that comes nearest to `actual`."""
    a, b = actual.flatten().double(), expected.flatten().double()
    return ((a @ b) / (b @ b)).item()


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
