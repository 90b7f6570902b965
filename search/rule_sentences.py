"""What pydantic says about a file, as sentences: where, the rule, the value, and the closest name of a field."""

import typing
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from search.redaction import redacted
from spaces.space import did_you_mean, plain_location


def sentences(error: ValidationError, model: type[BaseModel], *prefix: str) -> list[str]:
    """Return one sentence per problem; a problem that only follows from one inside it is left out.

    Args:
        error: What pydantic raised.
        model: What a whole file holds.
        prefix: Where in the file the value stands that was validated.
    """
    found = error.errors()
    inner = {problem["loc"][:length] for problem in found for length in range(len(problem["loc"]))}
    return [_sentence((*prefix, *problem["loc"]), problem, model) for problem in found if problem["loc"] not in inner]


def _sentence(location: tuple[int | str, ...], problem: ErrorDetails, model: type[BaseModel]) -> str:
    """Return one problem of pydantic as `where: what`, with the closest known field for an unknown one."""
    where = ".".join(str(part) for part in plain_location(location))
    if problem["type"] == "extra_forbidden":
        known = _fields_at(location[:-1], model)
        return f"{where}: unknown field; known are {', '.join(known)}{did_you_mean(str(location[-1]), known)}"
    if problem["type"] == "missing":
        return f"{where}: required field is missing; add it"
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "value_error":
        text = f"{text[:1].lower()}{text[1:]}, but got {redacted(repr(problem['input']))}"
    return f"{where}: {text}" if where else text


def _fields_at(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, ...]:
    """Return the fields of the model at a place; of several alternatives that of the kind which the place names."""
    alternatives: list[type[BaseModel]] = []
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            alternatives = _models_in(model.model_fields[part].annotation)
            model = alternatives[0] if alternatives else model
        else:
            model = next((one for one in alternatives if _kind_of(one) == (part,)), model)
    return tuple(model.model_fields)


def _kind_of(model: type[BaseModel]) -> tuple[Any, ...]:
    return typing.get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the pydantic models inside an annotation such as `tuple[Slot, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in typing.get_args(annotation) for found in _models_in(inner)]
