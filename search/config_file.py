"""From a small YAML file to one frozen value: a `QuantConfig` written by hand, or a device described on paper."""

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from hyquant.config import QuantConfig
from hyquant.cost import DeviceProfile
from hyquant.errors import ConfigError
from hyquant.text_file import read_text
from search.rule_sentences import sentences
from spaces.yaml_text import parse_yaml, what_it_holds

Model = TypeVar("Model", bound=BaseModel)


def load_config(path: Path) -> QuantConfig:
    """Read a quantization config: one point of the search.

    Raises:
        ConfigError: If the file is missing, is not YAML or breaks rules; the message lists every problem.
    """
    return _read(path, QuantConfig, "config file", "a quantization")


def load_device_profile(path: Path) -> DeviceProfile:
    """Read the description of a device.

    Raises:
        ConfigError: As `load_config`.
    """
    return _read(path, DeviceProfile, "device profile", "a device", "; see studies/devices")


def _read(path: Path, model: type[Model], what: str, content_of: str, hint: str = "") -> Model:
    try:
        content = parse_yaml(read_text(path))
    except FileNotFoundError as error:
        raise ConfigError(f"a {what} must exist, but {path} does not; correct the path") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{what} {path} must be readable YAML, but: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{what} {path} must be a mapping of fields, but {what_it_holds(content)}{hint}")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        listed = "; ".join(sentences(error, model))
        raise ConfigError(f"{what} {path} must describe {content_of}, but {listed}{hint}") from error
