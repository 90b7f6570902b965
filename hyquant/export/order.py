"""In which order an export is written: unit by unit, as a walk over the float weights sorted by name completes them.

A unit is what becomes tensors of the export together: the Linears that one layer of the plan consists of, or any other
single tensor. Sorted names are the order in which a denoiser's digest sees its weights
(`hyquant.models.fingerprint`), so one pass over a checkpoint can compute the digest and write the export.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hyquant.export.layout import deployed, is_renamed, layer_names
from hyquant.export.manifest import Layout
from hyquant.plan import LayerPlan, QuantPlan


@dataclass(frozen=True)
class Unit:
    """Tensors that are exported together.

    Attributes:
        layer: The layer of the plan; None for a tensor that belongs to no Linear.
        keys: `MODULE.KIND` of each, in the denoiser's names.
    """

    layer: LayerPlan | None
    keys: tuple[str, ...]


def units(keys: Iterable[str], plan: QuantPlan) -> tuple[Unit, ...]:
    """Return the units of a denoiser in the order of an export.

    Args:
        keys: `MODULE.KIND` of all its tensors, float or quantized; the order is the same for both.
        plan: What is done to which layer.
    """
    layers = {module: layer for layer in plan.layers for module in layer.modules}
    grouped: dict[str, tuple[LayerPlan | None, list[str]]] = {}
    for key in keys:
        layer = layers.get(key.rpartition(".")[0])
        last = key if layer is None else max(f"{module}.weight" for module in layer.modules)
        grouped.setdefault(last, (layer, []))[1].append(key)
    return tuple(Unit(layer, tuple(own)) for _, (layer, own) in sorted(grouped.items(), key=lambda entry: entry[0]))


def unit_tensors(state: Mapping[str, Tensor], unit: Unit, plan: QuantPlan, layout: Layout) -> dict[str, Tensor]:
    """Return a unit's tensors with the names and dtypes of the export, in the order of the export.

    Args:
        state: The tensors by `unit.keys`, or what quantization made of them by `MODULE.KIND`.
        unit: The unit.
        plan: What is done to which layer.
        layout: Whose names to give.
    """
    named = deployed(
        state,
        list(layer_names(plan, layout)),
        renamed=is_renamed(plan, layout),
        deploy_dtype=plan.config.deploy_dtype,
    )
    return dict(sorted(named.items()))
