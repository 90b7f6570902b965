"""From a study file to a `StudyConfig`: YAML read once, and every problem of the file in one sentence each.

`space` in the file is the name of a shipped space, the path of a YAML file relative to the study file, or the space
itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hyquant.errors import ConfigError
from hyquant.text_file import read_text
from search.config_file import load_device_profile
from search.metric_names import unknown_metrics
from search.redaction import redacted
from search.rule_sentences import sentences
from search.slot_devices import read_layout
from search.study import StudyConfig
from spaces.space import SearchSpace, load_space
from spaces.yaml_text import parse_yaml, what_it_holds


def load_study(path: Path) -> StudyConfig:
    """Read a study file.

    Raises:
        ConfigError: If the file is missing, is not YAML or breaks rules; the message lists every problem.
    """
    content = _read_mapping(path)
    problems: list[str] = []
    space = _read_space(content.get("space"), path, problems)
    if space is not None:
        content["space"] = space.model_dump()
    _read_device_profile(content.get("latency"), path, problems)
    _read_slots(content, problems)
    try:
        config = StudyConfig.model_validate(content)
    except ValidationError as error:
        problems += [
            line for line in sentences(error, StudyConfig) if space is not None or not line.startswith("space:")
        ]
    else:
        problems += unknown_metrics(config)
        if not problems:
            return config
    listed = "".join(f"\n  - {problem}" for problem in problems)
    raise ConfigError(f"study file {path} breaks {len(problems)} rule{'s' * (len(problems) > 1)}:{listed}")


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(read_text(path))
    except FileNotFoundError as error:
        raise ConfigError(f"a study file must exist, but {path} does not; correct the path") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"study file {path} must be readable text, but cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"study file {path} must be YAML, but cannot be parsed: {redacted(str(error))}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"study file {path} must be a mapping of fields, but {what_it_holds(content)}")
    return content


def _read_space(value: object, path: Path, problems: list[str]) -> SearchSpace | None:
    """Return the space a file names or holds; a broken one is added to `problems`."""
    try:
        if isinstance(value, str):
            is_file = value.endswith((".yaml", ".yml"))
            return load_space(path.parent / value if is_file else value)
        if isinstance(value, Mapping):
            return SearchSpace.model_validate(value)
    except ConfigError as error:
        problems.append(f"space: {error}")
    except ValidationError as error:
        problems += sentences(error, StudyConfig, "space")
    else:
        problems.append(
            "space must be a shipped name, a path to a .yaml file or a mapping; add `space: mini`, for example"
        )
    return None


def _read_device_profile(latency: object, path: Path, problems: list[str]) -> None:
    """Put the device profile that a file names in its place."""
    if not isinstance(latency, dict) or not isinstance(latency.get("device_profile"), str):
        return
    try:
        latency["device_profile"] = load_device_profile(path.parent / latency["device_profile"]).model_dump()
    except ConfigError as error:
        problems.append(f"latency.device_profile: {error}")
        del latency["device_profile"]


def _read_slots(content: dict[str, Any], problems: list[str]) -> None:
    """Put the slots that a layout such as "2 x 4" means in its place."""
    if not isinstance(content.get("slots"), str):
        return
    try:
        content["slots"] = read_layout(content["slots"])
    except ValueError as error:
        problems.append(f"slots: {error}")
        del content["slots"]
