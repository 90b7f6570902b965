"""What will be written of a unit, known before any weight is read: names, dtypes, shapes, and where rows end up.

Both are asked of the code that names an export's tensors: it is given stand-ins for a unit's tensors, without values
for the specs and with row numbers as values for the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyquant.export.layout import wrapped
from hyquant.export.manifest import Layout
from hyquant.export.order import Unit, unit_tensors
from hyquant.export.tensor_file import spec_of
from hyquant.plan import QuantPlan
from hyquant.schemes import scheme_of
from hyquant.schemes.base import Spec
from hyquant.schemes.contract import INPUT_TENSORS
from hyquant.smoothing.folding import Edit


@dataclass(frozen=True)
class UnitOutput:
    """What a unit becomes.

    Attributes:
        unit: The unit, in the names of the denoiser.
        specs: Dtype and shape of each of its tensors in the export, in the order of the export.
        rows: Module -> name of its layer in the export, and the rows [N] int64 of that layer which are the module's.
    """

    unit: Unit
    specs: Mapping[str, Spec]
    rows: Mapping[str, tuple[str, Tensor]]

    @property
    def last_key(self) -> str:
        """Return the float tensor that is read last."""
        return max(self.unit.keys)

    def key(self, module: str, kind: str) -> str:
        """Return what the export calls a tensor of a module."""
        layer = self.unit.layer
        name, _ = self.rows[module]
        return wrapped(f"{name}.{kind}", {name} if layer is not None and layer.has_multiplier else ())


def unit_output(
    unit: Unit,
    plan: QuantPlan,
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    edits: Mapping[str, Sequence[Edit]],
) -> UnitOutput:
    """Return what a unit of a float denoiser becomes under a plan.

    Args:
        unit: The unit.
        plan: What is done to which layer.
        layout: Whose names the export has.
        shapes: Shapes of the float tensors by name.
        dtype: Their dtype.
        edits: What smoothing changes in each Linear, by module path.
    """
    named = unit_tensors(_stand_ins(unit, plan, shapes, dtype, edits), unit, plan, layout)
    return UnitOutput(unit, {key: spec_of(tensor) for key, tensor in named.items()}, _rows(unit, plan, layout, shapes))


def _stand_ins(
    unit: Unit,
    plan: QuantPlan,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    edits: Mapping[str, Sequence[Edit]],
) -> dict[str, Tensor]:
    layer = unit.layer
    specs: dict[str, Spec] = {key: (dtype, shapes[key]) for key in unit.keys}
    if layer is None:
        return {key: _stand_in(key, spec) for key, spec in specs.items()}
    for module, rows in zip(layer.modules, layer.out_features, strict=True):
        if f"{module}.bias" in specs or any(edit.rows is not None for edit in edits.get(module, ())):
            specs[f"{module}.bias"] = (dtype if layer.scheme is None else torch.float32, (rows,))
        if layer.scheme is not None and plan.config.linear is not None:
            own = scheme_of(plan.config.linear).specs(rows, layer.in_features, plan.num_steps)
            specs |= {f"{module}.{kind}": spec for kind, spec in own.items()}
        if layer.has_multiplier:
            specs[f"{module}.mul_scale"] = (torch.float32, (layer.in_features,))
    return {key: _stand_in(key, spec) for key, spec in specs.items()}


def _stand_in(key: str, spec: Spec) -> Tensor:
    dtype, shape = spec
    # Members of a group are asked whether they agree on what describes their input, so that needs values.
    is_shared = key.rpartition(".")[2] in INPUT_TENSORS
    return torch.zeros(shape, dtype=dtype, device="cpu" if is_shared else "meta")


def _rows(
    unit: Unit, plan: QuantPlan, layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, Tensor]]:
    modules = dict.fromkeys(key.rpartition(".")[0] for key in unit.keys)
    numbers: dict[str, Tensor] = {}
    start = 0
    for module in modules:
        stop = start + next(shapes[key][0] for key in unit.keys if key.rpartition(".")[0] == module)
        numbers[f"{module}.bias"] = torch.arange(start, stop)
        start = stop
    found: dict[str, tuple[str, Tensor]] = {}
    for key, order in unit_tensors(numbers, unit, plan, layout).items():
        for module in modules:
            own = numbers[f"{module}.bias"]
            is_own = (order >= own[0]) & (order <= own[-1])
            if bool(is_own.any()):
                places = is_own.nonzero().flatten()
                found[module] = key.removesuffix(".bias"), places[order[places].argsort()]
    return found
