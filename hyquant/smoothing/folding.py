"""Working multipliers into weights: what each Linear's weight and bias become so that the float function is unchanged.

Where an input x is replaced by x m, with m = 1 / s per channel, its readers' columns are divided by m. Under placement
"multiplier" that is all, and x is multiplied at run time. Under "fold" the rows that produce x are multiplied instead:

    y = W h + b            becomes   m y:           W' = m W    b' = m b                  (a shift, or v)
    1 + y, as a factor     becomes   m (1 + y):     W' = m W    b' = m (1 + b) - 1        (a scale)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyquant.models.producers import ProducerRows, junction_of
from hyquant.modules.swap import linear_of, structural_twin
from hyquant.plan import LayerPlan, QuantPlan
from hyquant.smoothing.multiplier import fold


@dataclass(frozen=True)
class Edit:
    """A change of one Linear: columns divided by `mul` where `rows` is None, else those rows multiplied by it.

    Attributes:
        mul: [C] float32 > 0; C rows are multiplied by one value each.
        rows: Output rows, or None for all input columns.
        is_gain: Whether the rows' output plus 1 is what `mul` multiplies.
    """

    mul: Tensor
    rows: slice | None = None
    is_gain: bool = False


def weight_edits(plan: QuantPlan, multipliers: Mapping[str, Tensor]) -> dict[str, list[Edit]]:
    """Return what the smoothing of a plan changes in each Linear, by module path.

    Args:
        plan: The plan.
        multipliers: [C] float32 > 0 by name of the smoothed group.
    """
    by_name = {layer.name: layer for layer in plan.layers}
    edits: dict[str, list[Edit]] = {}
    for unit in plan.smoothing_units:
        mul = multipliers[unit[0].name]
        junction = junction_of(unit[0].name) if unit[0].folded else None
        consumers = [by_name[name] for name in junction.consumers] if junction is not None else list(unit)
        for path in (path for layer in consumers for path in layer.modules):
            edits.setdefault(path, []).append(Edit(mul))
        for rows in junction.producers if junction is not None else ():
            path, start = _member_of(by_name[rows.name], rows, len(mul))
            edits.setdefault(path, []).append(Edit(mul, slice(start, start + len(mul)), rows.is_gain))
    return edits


@torch.no_grad()
def edited(weight: Tensor, bias: Tensor | None, edits: Sequence[Edit]) -> tuple[Tensor, Tensor | None]:
    """Return weight [N, K] and bias [N] (or None) after some edits, float32; what is given stays as it is.

    A weight without edits is returned in its own dtype.
    """
    bias = None if bias is None else bias.float()
    weight = weight.float() if edits else weight
    for edit in edits:
        if edit.rows is None:
            weight = fold(weight, edit.mul)
            continue
        weight, mul = weight.clone(), edit.mul.to(weight.device)
        weight[edit.rows] *= mul[:, None]
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias.clone()
        offset = 1.0 if edit.is_gain else 0.0
        bias[edit.rows] = (bias[edit.rows] + offset) * mul - offset
    return weight, bias


def edits_of_rows(edits: Sequence[Edit], start: int, stop: int) -> list[Edit]:
    """Return what some edits change in rows `start` to `stop` of a Linear, as edits of these rows alone."""
    own: list[Edit] = []
    for edit in edits:
        if edit.rows is None:
            own.append(edit)
            continue
        first, last = max(edit.rows.start, start), min(edit.rows.stop, stop)
        if first < last:
            mul = edit.mul[first - edit.rows.start : last - edit.rows.start]
            own.append(Edit(mul, slice(first - start, last - start), edit.is_gain))
    return own


def smoothed_twin(denoiser: nn.Module, plan: QuantPlan, multipliers: Mapping[str, Tensor]) -> nn.Module:
    """Return a float denoiser with the smoothing of a plan and nothing quantized: it computes what the original does.

    Args:
        denoiser: The float denoiser; untouched, and all other weights are shared with it.
        plan: A plan whose smoothing to install.
        multipliers: [C] float32 > 0 by name of the smoothed group.
    """
    twin = structural_twin(denoiser)
    edits = weight_edits(plan, multipliers)
    for path, changes in edits.items():
        linear = twin.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        weight, bias = edited(linear.weight, linear.bias, changes)
        parent, _, name = path.rpartition(".")
        new = linear_of(weight.to(linear.weight.dtype), None if bias is None else bias.to(linear.weight.dtype))
        setattr(twin.get_submodule(parent), name, new)
    for layer in plan.smoothed:
        for path in layer.modules if layer.has_multiplier else ():
            twin.get_submodule(path).register_forward_pre_hook(_multiply_by(multipliers[layer.name]))
    return twin


def _multiply_by(mul: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((args[0].float() * mul).to(args[0].dtype), *args[1:])

    return multiply


def _member_of(layer: LayerPlan, rows: ProducerRows, num_channels: int) -> tuple[str, int]:
    """Return the member of a group that holds a run of the group's rows, and where the run starts in it."""
    start = rows.part * num_channels
    for path, num_rows in zip(layer.modules, layer.out_features, strict=True):
        if start < num_rows:
            return path, start
        start -= num_rows
    raise AssertionError(f"{layer.name} has no rows {rows.part} x {num_channels}")
