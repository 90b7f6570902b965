"""A unit's tensors of the export, put together from pieces of its float weights as they are read.

Output channels do not depend on one another, in no scheme and no edit, so a piece of rows becomes the same rows of
whatever is stored. No more than `_CHUNK` elements are in float32 at a time.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hyquant.checkpoint.specs import UnitOutput
from hyquant.errors import CalibrationError, ConfigError
from hyquant.export.layout import stored
from hyquant.layer_tensors import quantized_layer_tensors, rewritten_tensors
from hyquant.numerics.qparams import QParams
from hyquant.plan import LayerPlan, QuantPlan
from hyquant.schemes.contract import ROW_DIMS, LayerTensors
from hyquant.smoothing.folding import Edit, edited, edits_of_rows

_CHUNK = 2**20


class UnitBuilder:
    """The tensors of one unit in the making.

    Args:
        output: What it becomes.
        plan: What is done to which layer.
        edits: What smoothing changes in each Linear, by module path.
        qparams: Scale and zero point of the unit's input, where they are stored.
        mul: [K] float32, what the unit's input is multiplied by; None if it is not.
    """

    def __init__(
        self,
        output: UnitOutput,
        plan: QuantPlan,
        edits: Mapping[str, Sequence[Edit]],
        qparams: QParams | None,
        mul: Tensor | None,
    ) -> None:
        self.tensors = {key: torch.empty(shape, dtype=dtype) for key, (dtype, shape) in output.specs.items()}
        self._output, self._plan, self._edits = output, plan, edits
        self._qparams, self._mul = qparams, mul
        self._biases: dict[str, Tensor] = {}

    def add(self, key: str, first: int, piece: Tensor) -> None:
        """Take rows of a float tensor; a bias must be complete before the weight of its module.

        Args:
            key: `MODULE.KIND` in the denoiser.
            first: The number of the first row.
            piece: The rows, in the denoiser's dtype.

        Raises:
            ConfigError: If values are not finite.
            CalibrationError: If a scale overflows the deployment dtype.
        """
        module, _, kind = key.rpartition(".")
        layer = self._output.unit.layer
        if layer is None or (layer.scheme is None and not self._edits.get(module)):
            _require_finite(key, piece)
            self._place(module, {kind: piece}, first)
        elif kind == "bias":
            _require_finite(key, piece)
            held = self._biases.get(module)
            self._biases[module] = piece if held is None else torch.cat([held, piece])
        else:
            step = max(1, _CHUNK // piece.shape[1])
            for start in range(0, len(piece), step):
                rows = piece[start : start + step]
                self._place(module, self._made(layer, key, first + start, rows), first + start)

    def _made(self, layer: LayerPlan, key: str, first: int, weight: Tensor) -> LayerTensors:
        """Return what becomes of some rows of a Linear's weight and bias."""
        module, stop = key.rpartition(".")[0], first + len(weight)
        bias = self._bias(module, first, stop)
        edits = edits_of_rows(self._edits.get(module, ()), first, stop)
        if layer.scheme is None:
            _require_finite(key, weight)
            return rewritten_tensors(weight, bias, edits)
        try:
            made = quantized_layer_tensors(layer, self._plan, *edited(weight, bias, edits), self._qparams)
        except CalibrationError as error:
            _require_finite(key, weight)
            raise CalibrationError(f"{key}: {error}") from error
        return made if self._mul is None else {**made, "mul_scale": self._mul}

    def _bias(self, module: str, start: int, stop: int) -> Tensor | None:
        """Return some rows of a Linear's bias, of zeros where only an edit gives it one."""
        held = self._biases.get(module)
        if held is not None:
            return held[start:stop]
        return torch.zeros(stop - start) if self._output.key(module, "bias") in self.tensors else None

    def _place(self, module: str, made: LayerTensors, first: int) -> None:
        _, places = self._output.rows[module]
        for kind, tensor in made.items():
            value = stored(kind, tensor, self._plan.config.deploy_dtype)
            whole = self.tensors[self._output.key(module, kind)]
            if kind not in ROW_DIMS:
                whole.copy_(value)
                continue
            own = places[first : first + value.shape[ROW_DIMS[kind]]]
            start, stop = int(own[0]), int(own[-1]) + 1
            if stop - start == len(own) and bool((own.diff() == 1).all()):
                whole.narrow(ROW_DIMS[kind], start, len(own)).copy_(value)
            else:
                whole.index_copy_(ROW_DIMS[kind], own, value)


def _require_finite(key: str, piece: Tensor) -> None:
    if not bool(torch.isfinite(piece).all()):
        raise ConfigError(f"weights must be finite, but {key} holds nan or inf; download the checkpoint again")
