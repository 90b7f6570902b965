"""Judging exports of msModelSlim: no manifest, so the description and the tensors have to speak for themselves.

What such an export stores differs from ours in three ways: scales may have the model's dtype, every rank may have its
own values, and which steps are static is written nowhere. Sources: msmodelslim 26.1.0 (its savers), mindiesd 3.1.0.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hyquant.clock import StepClock
from hyquant.config import Target
from hyquant.errors import ExportError, HyquantError
from hyquant.export.compare import LayerCheck, call_with_inputs, compare_layer
from hyquant.export.engine import (
    OUR_LINEARS,
    EngineView,
    engine_modules,
    engine_view,
    parents_of,
)
from hyquant.export.files import read_description, read_tensors
from hyquant.export.foreign_checks import (
    algorithms_of,
    attention_problems,
    description_problems,
    file_problems,
    float_problems,
    layer_problems,
    tensors_of,
)
from hyquant.export.layout import ALGORITHMS, TYPE_KEY, has_diffusers_names, undeployed
from hyquant.export.manifest import Layout
from hyquant.export.names import DESCRIPTION_SUFFIX, INDEX_SUFFIX, WEIGHTS_SUFFIX, FileNames, expected_weights
from hyquant.models.base import Record
from hyquant.models.names import by_module, layer_groups
from hyquant.modules.linear import QuantLinear, quant_linears
from hyquant.modules.swap import float_linear
from hyquant.numerics.error import cosine
from hyquant.schemes import SCHEMES
from hyquant.schemes.base import Bits
from hyquant.schemes.weights import dequantize_weight

_SCHEMES = {algorithm: scheme for scheme, algorithm in ALGORITHMS.items()}
MIN_WEIGHT_COSINES: Mapping[Bits, float] = MappingProxyType({8: 0.99, 4: 0.9})
"""Far below what rows of so many bits keep of a weight (0.9999, 0.99); another model's weights have about 0."""


@dataclass(frozen=True)
class ForeignFindings:
    """What was found out about a folder without a manifest."""

    problems: tuple[str, ...]
    view: EngineView
    layer_counts: dict[str, int]
    layer_checks: tuple[LayerCheck, ...]


def find_pairs(folder: Path) -> tuple[FileNames, ...]:
    """Return the pairs of tensors and description in a folder without a manifest; none if it has no description."""
    pairs: list[FileNames] = []
    for path in sorted(folder.glob(f"*{DESCRIPTION_SUFFIX}")):
        if path.name.endswith(INDEX_SUFFIX) or path.name.startswith("."):
            continue
        try:
            quant_type = read_description(path).get(TYPE_KEY)
        except ExportError:
            quant_type = None
        if quant_type is None and not path.name.startswith("quant_model_description"):
            continue
        try:
            pairs.append(FileNames(weights=_weights_of(folder, path.name, quant_type), description=path.name))
        except ValidationError as error:
            raise ExportError(
                f"a description and its tensors must have plain file names, but {folder} holds {path.name!r} for "
                f"{str(quant_type)[:60]!r}; correct it"
            ) from error
    return tuple(pairs)


def table_rows(folder: Path) -> int | None:
    """Return how many steps the stored ranges of a folder are for; None if no layer has one per step."""
    for path in filter(Path.is_file, sorted(folder.glob(f"*{WEIGHTS_SUFFIX}"))):
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (the object is no mapping)
                if key.endswith(".input_scale") and len(shape := file.get_slice(key).get_shape()) == 2:
                    return int(shape[0])
    return None


def check_foreign(
    folder: Path, target: Target, denoiser: nn.Module | None, records: Sequence[Record]
) -> ForeignFindings:
    """Check every pair of a folder, and with a float denoiser its names, its weights and its layers.

    Args:
        folder: The folder.
        target: What is meant to execute it.
        denoiser: The float denoiser it was made from, or None.
        records: Calls of the denoiser; the layers of the first pair are compared on the first and the last.
    """
    problems: list[str] = []
    views: list[EngineView] = []
    counts: Counter[str] = Counter()
    layers: list[LayerCheck] = []
    for number, names in enumerate(find_pairs(folder)):
        try:
            description = read_description(folder / names.description)
            tensors, unreadable = read_tensors(folder, names)
            problems.extend((*file_problems(folder, names), *unreadable))
            if unreadable:
                continue
            problems.extend(description_problems(names, description, tensors))
            algorithms = algorithms_of(description)
            found = [
                problem
                for layer, algorithm in algorithms.items()
                for problem in layer_problems(layer, algorithm, tensors)
            ]
            problems.extend(
                (*found, *attention_problems(description, tensors, target), *float_problems(description, tensors))
            )
            layout = _layout(denoiser, tensors)
            views.append(_view(description, tensors, denoiser, layout, target))
            if number == 0:
                counts.update(algorithms.values())
                if denoiser is not None and not found:
                    weights, checks = _compared(denoiser, records, tensors, algorithms, layout)
                    problems.extend(weights)
                    layers.extend(checks)
        except HyquantError as error:
            problems.append(str(error))
    view = views[0] if views else EngineView(replaced={}, attentions={}, ignored=())
    return ForeignFindings(tuple(problems), view, dict(counts), tuple(layers))


def _weights_of(folder: Path, description: str, quant_type: object) -> str:
    """Return the tensor file that belongs to a description: the engine's, or the only one there is."""
    if isinstance(quant_type, str):
        expected = expected_weights(description, quant_type)
        if (folder / expected).exists() or (folder / f"{expected}{INDEX_SUFFIX}").exists():
            return expected
    alike = description.removesuffix(DESCRIPTION_SUFFIX).replace("description", "weight") + WEIGHTS_SUFFIX
    others = sorted(path.name for path in folder.glob(f"*{WEIGHTS_SUFFIX}"))
    return others[0] if len(others) == 1 and not (folder / alike).exists() else alike


def _layout(denoiser: nn.Module | None, tensors: Mapping[str, Tensor]) -> Layout:
    """Return "diffusers" if the tensors bear a denoiser's own names while engines know others."""
    if denoiser is None or any(key.startswith(("double_blocks.", "single_blocks.")) for key in tensors):
        return "original"
    return "diffusers"


def _view(
    description: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    denoiser: nn.Module | None,
    layout: Layout,
    target: Target,
) -> EngineView:
    if denoiser is not None:
        return engine_view(description, engine_modules(denoiser, "original" if target != "hyquant" else layout), target)
    weights = {key.removesuffix(".weight").removesuffix(".linear") for key in tensors if key.endswith(".weight")}
    return engine_view(description, dict.fromkeys(parents_of(tensors), False) | dict.fromkeys(weights, True), target)


def _compared(
    denoiser: nn.Module,
    records: Sequence[Record],
    tensors: Mapping[str, Tensor],
    algorithms: Mapping[str, str],
    layout: Layout,
) -> tuple[list[str], list[LayerCheck]]:
    """Compare weights and layers of the export with those of the float denoiser."""
    groups = layer_groups(denoiser)
    is_renamed = layout == "original" and has_diffusers_names(groups)
    known = {name for group in groups for name in ((group.name,) if is_renamed else group.modules)}
    own = {
        f"{layer}.{kind}": tensor.float() if kind not in ("weight", "quant_bias", "deq_scale") else tensor
        for layer, algorithm in algorithms.items()
        if algorithm in OUR_LINEARS and layer in known
        for kind, tensor in tensors_of(layer, tensors)[1].items()
    }
    modules = by_module(undeployed(own, renamed=is_renamed))
    schemes = {
        path: _SCHEMES[algorithms[group.name if is_renamed else path]]
        for group in groups
        for path in group.modules
        if path in modules
    }
    problems = [
        problem
        for path in modules
        for problem in _weight_problems(path, modules[path], denoiser, SCHEMES[schemes[path]].weight_bits)
    ]
    if problems or not records:
        return problems, []
    device = next(denoiser.parameters()).device
    linears = {
        path: quant_linears([{kind: t.to(device) for kind, t in kinds.items()}], scheme=schemes[path])[0]
        for path, kinds in modules.items()
    }
    return [], list(_layer_checks(denoiser, [records[0], records[-1]], linears))


def _weight_problems(path: str, kinds: Mapping[str, Tensor], denoiser: nn.Module, bits: Bits) -> Iterator[str]:
    weight = float_linear(denoiser, path).weight
    if kinds["weight"].shape != weight.shape:
        yield (
            f"the weight of {path} must have the model's shape {tuple(weight.shape)}, but has "
            f"{tuple(kinds['weight'].shape)}; it belongs to another model"
        )
        return
    scale = kinds.get("weight_scale")
    if scale is None:
        deq = kinds["deq_scale"] / kinds["input_scale"]
        scale = (deq[0] if deq.ndim > 1 else deq)[:, None]
    kept = dequantize_weight(kinds["weight"], scale.reshape(-1, 1)) * kinds.get("mul_scale", torch.ones(()))
    lowest = MIN_WEIGHT_COSINES[bits]
    if not (found := cosine(weight.detach().cpu().float(), kept)) >= lowest:
        yield (
            f"the weight of {path} must be the model's in int{bits} (cosine {lowest} or more), but has cosine "
            f"{found:.4f}; it belongs to another model or its scales are wrong"
        )


def _layer_checks(
    denoiser: nn.Module, records: Sequence[Record], linears: Mapping[str, QuantLinear]
) -> Iterator[LayerCheck]:
    """Compare every layer at the steps of some records, with stored ranges where there are any."""
    clock = StepClock()
    for record in records:
        _, inputs = call_with_inputs(denoiser, record, clock, list(linears))
        for path, linear in linears.items():
            table = linear.fused.deq_scale_table
            if path not in inputs or (table is not None and record.step_index >= table.shape[0]):
                continue
            linear.set_step(record.step_index)
            x = inputs[path].to(linear.weight.device)
            yield compare_layer(path, record.step_index, [float_linear(denoiser, path)], [linear], x)
