"""`DumperManager`: the calls of a denoiser while a pipeline runs, as calibration data in a file."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from hyquant.calibration.calls import SharedCopies
from hyquant.calibration.store import fill_atomically
from hyquant.errors import CalibrationError, ConfigError
from hyquant.file_modes import make_folder
from hyquant.session.timestep import TimestepManager
from hyquant.values import require_plain

CaptureMode = Literal["args", "kwargs", "timestep"]

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class DumperManager:
    """Record every call of a module from now on, until `save` or `stop`.

    Arguments are bound to the signature of the module's `forward`, defaults included, and copied to the CPU before the
    forward runs, so what it changes in place does not reach the records. A tensor that equals the one at the same place
    of the call before is held once, in memory and in the file. Each instance has records of its own.

    Args:
        module: The denoiser.
        capture_mode: What a record is: "args" a list of positional arguments; "kwargs" a dictionary of arguments by
            name; "timestep" a dictionary of "timestep_idx" (by `TimestepManager`), "args" and "kwargs", with "tag" and
            "module_name" beside them.

    Attributes:
        records: What was recorded, in the order of the calls; `SessionConfig(calib_data=...)` takes it as it is.

    Raises:
        ConfigError: If the mode is unknown. In a call: if the mode cannot hold the call's arguments.
        CalibrationError: In a call: if an argument is not made of plain values, or its denoising step is not known.
    """

    def __init__(self, module: nn.Module, capture_mode: CaptureMode = "args") -> None:
        if capture_mode not in get_args(CaptureMode):
            raise ConfigError(
                f"capture_mode must be one of {', '.join(get_args(CaptureMode))}, but got {capture_mode!r}; use "
                "'timestep' for w8a8_timestep."
            )
        self.records: list[Any] = []
        self._mode = capture_mode
        self._signature = inspect.signature(module.forward)
        self._name = module.forward.__qualname__
        self._copies = SharedCopies()
        self._handle = module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def save(self, path: str | Path) -> None:
        """Write the records by torch.save, for `safe_torch_load`, and stop recording.

        The file gets mode 0640 and appears whole or not at all; missing folders are made.

        Raises:
            CalibrationError: If nothing was recorded.
        """
        if not self.records:
            raise CalibrationError(
                f"a dump must hold a call of the model, but nothing was recorded for {path}; run the pipeline before."
            )
        self.stop()
        path = Path(path)
        make_folder(path.parent)
        fill_atomically(path, lambda file: torch.save(self.records, file))

    def reset(self) -> None:
        """Forget what was recorded so far."""
        self.records = []
        self._copies = SharedCopies()

    def stop(self) -> None:
        """Record no more calls; the records stay."""
        self._handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if self._mode == "args":
            self._require(self._named_only(bound), "args", "takes positional arguments")
            self.records.append(list(self._copied(bound.args, {})[0]))
        elif self._mode == "kwargs":
            self.records.append(self._copied((), self._by_name(bound))[1])
        else:
            step_index = TimestepManager.get_timestep_idx()
            if step_index is None:
                raise CalibrationError(
                    "a call recorded with capture_mode 'timestep' must have a denoising step, but none was set; call "
                    "TimestepManager.set_timestep_idx(step) at the start of every step."
                )
            positional, named = self._copied(bound.args, bound.kwargs)
            self.records.append(
                {
                    "tag": "",
                    "timestep_idx": step_index,
                    "module_name": self._name,
                    "args": list(positional),
                    "kwargs": named,
                }
            )

    def _copied(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for index, value in enumerate(args):
            require_plain(value, f"positional argument {index}")
        for name, value in kwargs.items():
            require_plain(value, f"argument {name}")
        return self._copies.take(args, kwargs)

    def _named_only(self, bound: inspect.BoundArguments) -> list[str]:
        """Return the arguments that a call gave by name alone, with other values than their defaults."""
        parameters = self._signature.parameters
        return [
            name
            for name, value in bound.kwargs.items()
            if name not in parameters or value is not parameters[name].default
        ]

    def _by_name(self, bound: inspect.BoundArguments) -> dict[str, Any]:
        """Return a call's arguments by name."""
        positional = [
            name
            for name, parameter in self._signature.parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY
            or (parameter.kind is inspect.Parameter.VAR_POSITIONAL and bound.arguments[name])
        ]
        self._require(positional, "kwargs", "takes arguments that have a name")
        named = {
            name: value
            for name, value in bound.arguments.items()
            if self._signature.parameters[name].kind not in _VARIADIC
        }
        return named | bound.kwargs

    @staticmethod
    def _require(left_out: list[str], mode: str, what: str) -> None:
        if left_out:
            raise ConfigError(
                f"capture_mode {mode!r} {what}, but the call also has {', '.join(left_out)}; use another mode, "
                "'timestep' takes both."
            )
