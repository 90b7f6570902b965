"""Deciding everything about an export before a weight is read: the plan, what smoothing changes, names and shapes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyquant.calibration.calibrate import Calibrated
from hyquant.calibration.sequential import needs_sequential_stats
from hyquant.checkpoint.build import UnitBuilder
from hyquant.checkpoint.source import FloatCheckpoint
from hyquant.checkpoint.specs import UnitOutput, unit_output
from hyquant.config import QuantConfig, Target
from hyquant.errors import CalibrationError
from hyquant.export.layout import attention_names
from hyquant.export.manifest import Layout
from hyquant.export.order import units
from hyquant.export.tensor_file import spec_of
from hyquant.layer_tensors import attention_tensors_of, input_qparams, stored_ranges
from hyquant.models.attentions import attention_blocks
from hyquant.models.names import layer_groups
from hyquant.needs import needs_attention_stats, needs_search, needs_stats
from hyquant.plan import QuantPlan, build_plan
from hyquant.quantize import multipliers_of
from hyquant.schemes.base import Spec
from hyquant.smoothing.folding import Edit, weight_edits
from hyquant.smoothing.search import column_absmax


@dataclass(frozen=True)
class Recipe:
    """What becomes of a checkpoint.

    Attributes:
        plan: What is done to which layer.
        layout: Whose layer names the export has.
        attentions: What quantized attentions store, by name in the export.
        outputs: What each unit becomes, in the order of the export.
        edits: What smoothing changes in each Linear, by module path.
        multipliers: [K] float32 by smoothed group.
        found: What calibration found.
    """

    plan: QuantPlan
    layout: Layout
    attentions: Mapping[str, Tensor]
    outputs: tuple[UnitOutput, ...]
    edits: Mapping[str, Sequence[Edit]]
    multipliers: Mapping[str, Tensor]
    found: Calibrated

    @property
    def specs(self) -> dict[str, Spec]:
        """Return dtype and shape of every tensor of the export, in its order."""
        specs = {key: spec_of(tensor) for key, tensor in self.attentions.items()}
        for output in self.outputs:
            specs |= output.specs
        return specs

    def builder(self, index: int) -> UnitBuilder:
        """Return what puts the tensors of a unit together.

        Raises:
            CalibrationError: If the unit's input has no usable statistics.
        """
        output, plan = self.outputs[index], self.plan
        layer = output.unit.layer
        if layer is None or layer.scheme is None:
            return UnitBuilder(output, plan, self.edits, None, None)
        mul = self.multipliers.get(layer.name)
        ranges = stored_ranges(layer, plan, self.found.stats, self.found.smoothed_stats, mul)
        qparams = None if ranges is None else input_qparams(ranges, plan, torch.device("cpu"))
        return UnitBuilder(output, plan, self.edits, qparams, mul if layer.has_multiplier else None)


def plan_checkpoint(checkpoint: FloatCheckpoint, config: QuantConfig, *, num_steps: int, target: Target) -> QuantPlan:
    """Decide what a configuration does to every layer of a checkpoint.

    Raises:
        ConfigError, LayerMatchError: As `build_plan`.
    """
    return build_plan(
        layer_groups(checkpoint.denoiser),
        config,
        num_steps=num_steps,
        model="hunyuan_video",
        target=target,
        attentions=attention_blocks(checkpoint.denoiser),
    )


def require_statistics(plan: QuantPlan, found: Calibrated) -> None:
    """Check that there are statistics of everything that needs them, before anything is read.

    Raises:
        CalibrationError: If not.
    """
    if not found.stats and needs_stats(plan):
        raise CalibrationError(
            "ranges and smoothing scales come from statistics, but none were given; write them by hyq-search calibrate "
            "and give the file by --stats, or choose w8a8_dynamic without smoothing"
        )
    if not found.attention_stats and needs_attention_stats(plan):
        raise CalibrationError(
            "int8 attention stores scales that come from statistics of q, k and v, but none were given; write them by "
            "hyq-search calibrate and give the file by --stats"
        )


def build_recipe(checkpoint: FloatCheckpoint, plan: QuantPlan, layout: Layout, found: Calibrated) -> Recipe:
    """Work out an export; of the weights only those that smoothing scales depend on are read.

    Scales that were found for another smoothing than the plan's are not used: the plan's follow from plain statistics.

    Raises:
        CalibrationError: If statistics are missing, or scales must be searched and are not among them.
        ConfigError: If a file became shorter.
    """
    has_own_scales = needs_search(plan) or needs_sequential_stats(plan)  # else a file's are of another configuration
    scales = found.scales if has_own_scales else None
    multipliers = multipliers_of(plan, found.stats, _absmax_in(checkpoint), scales=scales)
    edits = weight_edits(plan, multipliers)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    outputs = tuple(
        unit_output(unit, plan, layout, shapes, checkpoint.dtype, edits) for unit in units(checkpoint.tensors, plan)
    )
    attentions = {
        f"{name}.{kind}": tensor.contiguous()
        for name, block in attention_names(plan, layout).items()
        for kind, tensor in attention_tensors_of(block, plan, found.attention_stats).items()
    }
    return Recipe(plan, layout, attentions, outputs, edits, multipliers, found)


def _absmax_in(checkpoint: FloatCheckpoint) -> Callable[[str], Tensor]:
    def absmax(path: str) -> Tensor:
        tensor = checkpoint.tensors[f"{path}.weight"]
        largest = torch.zeros(tensor.shape[1])
        for _, piece in tensor.pieces():
            largest = torch.maximum(largest, column_absmax(piece))
        return largest

    return absmax
