"""Calibration data of the session API as records of the library.

Three forms exist, by `DumperManager`'s capture_mode, and a list holds one of them:

    "args"      [value, ...]                                          the positional arguments of one call
    "kwargs"    {name: value, ...}                                    the arguments of one call by name
    "timestep"  {"timestep_idx": int, "args": [...], "kwargs": {...}} one call and its denoising step; more is ignored

msModelSlim's DumperManager says arguments of a "timestep" call twice: the positional ones in "args", and all by name in
"kwargs". `said_once` leaves the first.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from hyquant.errors import CalibrationError
from hyquant.models.base import Record

_STEP = "timestep_idx"
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Calls(NamedTuple):
    """Calls of a model.

    Attributes:
        records: One per call; all of step 0 if steps are not known.
        have_steps: Whether the calls say their denoising step.
    """

    records: list[Record]
    have_steps: bool

    @property
    def num_steps(self) -> int:
        """Return the number of denoising steps: one more than the last recorded, and at least 1."""
        return 1 + max((record.step_index for record in self.records), default=0)


def read_calls(calib_data: Sequence[Any]) -> Calls:
    """Return calibration data as records; tensors are the same objects.

    Args:
        calib_data: Calls in one of the three forms.

    Raises:
        CalibrationError: If an entry has another form, or another than the first; the message says which.
    """
    forms = [_form(entry, index) for index, entry in enumerate(calib_data)]
    for index, form in enumerate(forms):
        if form != forms[0]:
            raise CalibrationError(
                f"calib_data must have entries of one form, but entry 0 is of form {forms[0]!r} and entry {index} of "
                f"{form!r}; dump all with one capture_mode."
            )
    have_steps = bool(forms) and forms[0] == "timestep"
    return Calls([_record(entry, forms[0]) for entry in calib_data], have_steps)


def said_once(records: Sequence[Record], module: nn.Module) -> list[Record]:
    """Return records without what their keywords say again of positional arguments.

    Args:
        records: Calls of the module.
        module: Its signature names the positional arguments.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    return [_said_once(record, list(parameters)) for record in records]


def _said_once(record: Record, parameters: Sequence[inspect.Parameter]) -> Record:
    given = [parameter.name for parameter in parameters if parameter.kind in _POSITIONAL][: len(record.args)]
    given += [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.VAR_POSITIONAL]
    if not any(name in record.inputs for name in given):
        return record
    named = {name: value for name, value in record.inputs.items() if name not in given}
    for parameter in parameters:  # who names all arguments has those of `**rest` as a dictionary of that name
        rest = named.get(parameter.name)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and isinstance(rest, dict):
            del named[parameter.name]
            named |= rest
    return Record(record.step_index, record.prompt_index, named, record.args)


def _form(entry: Any, index: int) -> str:
    if isinstance(entry, list | tuple):
        return "args"
    if not isinstance(entry, Mapping):
        shown = "a tensor" if isinstance(entry, Tensor) else f"a {type(entry).__name__}"
        raise CalibrationError(
            f"an entry of calib_data must be a list of arguments or a dictionary, but entry {index} is {shown}; wrap "
            "the arguments of each call in a list."
        )
    if _STEP not in entry:
        return "kwargs"
    step, args, kwargs = entry[_STEP], entry.get("args", []), entry.get("kwargs", {})
    is_step = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    if not is_step or not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
        raise CalibrationError(
            f"a call with {_STEP} must have an index of 0 or more, a list 'args' and a dictionary 'kwargs', but entry "
            f"{index} has {step!r}, a {type(args).__name__} and a {type(kwargs).__name__}; dump it with DumperManager."
        )
    return "timestep"


def _record(entry: Any, form: str) -> Record:
    match form:
        case "args":
            return Record(0, 0, {}, tuple(entry))
        case "kwargs":
            return Record(0, 0, dict(entry))
        case _:
            return Record(entry[_STEP], 0, dict(entry.get("kwargs", {})), tuple(entry.get("args", ())))
