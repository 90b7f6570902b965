"""`load_quantized`: an export back into a denoiser, bit for bit what was saved."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hyquant.clock import StepClock
from hyquant.errors import ExportError
from hyquant.export.checks import read_checked
from hyquant.export.layout import is_renamed, split_attentions, undeployed
from hyquant.export.manifest import ExportManifest, read_manifest
from hyquant.models.fingerprint import denoiser_digest, denoiser_part
from hyquant.modules.swap import install_tensors_, restore_
from hyquant.plan import QuantPlan

logger = logging.getLogger(__name__)


def load_quantized(denoiser: nn.Module, export_dir: str | Path, clock: StepClock) -> QuantPlan:
    """Quantize a float denoiser in place with the tensors of an export.

    `hyquant.quantize.restore_` undoes it. Nothing is changed if an error is raised.

    Args:
        denoiser: The float denoiser that the export was made from; one that is quantized is restored first.
        export_dir: The folder.
        clock: The clock the layers follow.

    Returns:
        The plan the export was made by.

    Raises:
        ExportError: If the folder is no export, is damaged, or was made from another model; the message says which.
    """
    folder = Path(export_dir)
    manifest = read_manifest(folder)
    tensors, problems = read_checked(folder, manifest)
    if problems:
        raise ExportError(f"{folder} must be intact, but {problems[0]} ({len(problems)} problems in all)")
    restore_(denoiser)
    require_same_denoiser(denoiser, manifest)
    device = next(denoiser.parameters()).device
    tensors, stored = split_attentions(tensors, manifest.plan, manifest.layout)
    named = undeployed(tensors, renamed=is_renamed(manifest.plan, manifest.layout))
    layers = _by_module(named, manifest.plan, device)
    attentions = {
        module: {kind: tensor.to(device) for kind, tensor in kinds.items()} for module, kinds in stored.items()
    }
    install_tensors_(denoiser, manifest.plan, layers, clock, attentions=attentions)
    logger.info("loaded export=%s layers=%d attentions=%d", folder, len(manifest.plan.quantized), len(attentions))
    return manifest.plan


def require_same_denoiser(denoiser: nn.Module, manifest: ExportManifest) -> None:
    """Check a float denoiser's weights against the manifest.

    Raises:
        ExportError: If they are not the ones the export was made from.
    """
    expected, found = denoiser_part(manifest.model.fingerprint), denoiser_digest(denoiser)
    if found != expected:
        raise ExportError(
            f"the export was made from {manifest.model.kind} {manifest.model.source} in {manifest.model.dtype} "
            f"(denoiser {expected}), but this denoiser is {found}; load the same weights in the same dtype"
        )


def _by_module(state: Mapping[str, Tensor], plan: QuantPlan, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of every module the plan exchanges, by module path, on a device."""
    exchanged = (*plan.quantized, *plan.rewritten)
    layers: dict[str, dict[str, Tensor]] = {module: {} for layer in exchanged for module in layer.modules}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        if module in layers:
            # A copy, because the alignment of the file's buffer would change how float products are rounded.
            layers[module][kind] = tensor.to(device, copy=True)
    return layers
