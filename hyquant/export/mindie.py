"""The engine itself as a judge: load an export through an installed `mindiesd`, and count what it replaced.

The engine wants a model with the original layer names. What it looks at are names and kinds of modules, so it is given
a skeleton: a Linear wherever the model has one, under the original names, without weights. On an NPU each replaced
layer is then run on the float denoiser's inputs.
"""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hyquant.clock import StepClock
from hyquant.config import FrozenModel
from hyquant.errors import ExportError
from hyquant.export.compare import LayerCheck, call_with_inputs, compare_layer, inputs_of, rounded
from hyquant.export.manifest import ExportManifest, read_manifest
from hyquant.models.base import Record
from hyquant.models.names import LayerGroup, layer_groups
from hyquant.modules.swap import float_linear, restore_

ENGINE_DEVICE = "npu"
"""The kind of device that has the engine's operators."""


class EngineReport(FrozenModel):
    """What the installed engine made of an export.

    Attributes:
        version: Of the engine.
        expected: How many Linears it should replace.
        replaced: How many it replaced, by class of the replacement.
        problems: What is wrong, one sentence each.
        layer_checks: Replaced layers against the float ones, run by the engine; empty where there is no NPU.
        not_run: Why no layer was run; None if they were.
    """

    version: str
    expected: int
    replaced: dict[str, int]
    problems: tuple[str, ...]
    layer_checks: tuple[LayerCheck, ...] = ()
    not_run: str | None = None


def load_in_engine(export_dir: str | Path, denoiser: nn.Module, record: Record | None = None) -> EngineReport:
    """Load an export through the installed MindIE-SD.

    Args:
        export_dir: The folder.
        denoiser: The float denoiser it was made from; it is in float afterwards.
        record: A call of it, whose inputs the replaced layers are run on; only on an NPU.

    Raises:
        ExportError: If the engine is not installed or cannot be imported, or the folder is no export of ours.
    """
    folder = Path(export_dir)
    manifest = read_manifest(folder)
    mindiesd = _import_engine()
    restore_(denoiser)
    groups = layer_groups(denoiser)
    model = skeleton(groups, {group.name for group in groups if _has_bias(denoiser, group)})
    before = dict(model.named_modules())
    description = folder / manifest.names[0].description
    try:
        mindiesd.quantize(model, str(description.resolve()), **_options(mindiesd, manifest))
    except Exception as error:  # the engine's own kinds of errors, whatever they derive from, are its verdict
        return EngineReport(
            version=_version(),
            expected=len(manifest.plan.quantized),
            replaced={},
            problems=(f"MindIE-SD must load {description.name}, but it says: {error}",),
            not_run="it was not loaded",
        )
    replaced = {
        name: module
        for name, module in model.named_modules()
        if name in before and module is not before[name] and isinstance(before[name], nn.Linear)
    }
    kinds = [type(module).__name__ for module in replaced.values()]
    problems = list(_count_problems(replaced, manifest))
    checks, not_run = _run(replaced, groups, denoiser, record, mindiesd, manifest)
    return EngineReport(
        version=_version(),
        expected=len(manifest.plan.quantized),
        replaced={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        problems=tuple(problems),
        layer_checks=tuple(checks),
        not_run=not_run,
    )


def skeleton(groups: Sequence[LayerGroup], biased: Collection[str]) -> nn.Module:
    """Return a module tree with a Linear under the name of every layer group, on "meta", and nothing else.

    Args:
        groups: The layer groups.
        biased: Names of those with a bias; the engine wants a bias in the export for these.
    """
    root = nn.Module()
    for group in groups:
        *parents, name = group.name.split(".")
        parent = root
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            child = parent._modules[part]
            assert child is not None
            parent = child
        parent.add_module(
            name,
            nn.Linear(group.in_features, sum(group.out_features), bias=group.name in biased, device="meta"),
        )
    return root


def _has_bias(denoiser: nn.Module, group: LayerGroup) -> bool:
    return float_linear(denoiser, group.modules[0]).bias is not None


def _import_engine() -> ModuleType:
    try:
        return importlib.import_module("mindiesd")
    except Exception as error:  # a missing driver library may raise anything while it is imported
        raise ExportError(
            f"an export is loaded by the engine where mindiesd can be imported, but here it cannot ({error}); install "
            "mindiesd with its torch_npu on this machine, or leave the engine out"
        ) from error


def _version() -> str:
    try:
        return version("mindiesd")
    except PackageNotFoundError:
        return "unknown"


def _options(mindiesd: Any, manifest: ExportManifest) -> dict[str, Any]:
    dtype = _engine_dtype(manifest)
    if manifest.model_quant_type != "W8A8_TIMESTEP" or manifest.static_steps is None:
        return {"dtype": dtype}
    policy = mindiesd.TimestepPolicyConfig()
    policy.register(range(*manifest.static_steps), "static", "w8a8_static_linear")
    return {"dtype": dtype, "timestep_config": policy}


def _engine_dtype(manifest: ExportManifest) -> torch.dtype:
    return torch.float16 if manifest.config.deploy_dtype == "float16" else torch.bfloat16


def _count_problems(replaced: Mapping[str, nn.Module], manifest: ExportManifest) -> list[str]:
    planned = {layer.name for layer in manifest.plan.quantized}
    missing, surplus = sorted(planned - replaced.keys()), sorted(replaced.keys() - planned)
    problems = []
    if missing:
        problems.append(
            f"MindIE-SD must replace the {len(planned)} planned layers, but left {missing[0]} in float "
            f"({len(missing)} in all)"
        )
    if surplus:
        problems.append(
            f"MindIE-SD must replace planned layers only, but replaced {surplus[0]} ({len(surplus)} in all)"
        )
    return problems


def _run(
    replaced: Mapping[str, nn.Module],
    groups: Sequence[LayerGroup],
    denoiser: nn.Module,
    record: Record | None,
    mindiesd: Any,
    manifest: ExportManifest,
) -> tuple[list[LayerCheck], str | None]:
    """Run every replaced layer as the engine does, on the inputs of one float call."""
    device = next(denoiser.parameters()).device
    if record is None or device.type != ENGINE_DEVICE:
        return [], f"the engine's layers run on an NPU, but the float model is on {device.type}"
    folded = {layer.name for layer in manifest.plan.quantized if layer.folded}
    dtype = _engine_dtype(manifest)
    call = rounded(record, manifest.config.deploy_dtype)
    chosen = [group for group in groups if group.name in replaced and group.name not in folded]
    _, inputs = call_with_inputs(denoiser, call, StepClock(), [group.modules[0] for group in chosen])
    mindiesd.TimestepManager.set_timestep_idx(record.step_index)
    checks = []
    for group in chosen:
        x = inputs_of(inputs, group.modules)
        if x is not None:
            floats = [_in_own_dtype(float_linear(denoiser, path)) for path in group.modules]
            module = replaced[group.name].to(device)
            checks.append(compare_layer(group.name, record.step_index, floats, [module], x.to(device, dtype)))
    return checks, None


def _in_own_dtype(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x.to(linear.weight.dtype))
