"""From a YAML file to a `QuantConfig`: one point of the search, written by hand."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from hyquant.config import QuantConfig
from hyquant.errors import ConfigError


def load_config(path: Path) -> QuantConfig:
    """Read a quantization config.

    Raises:
        ConfigError: If the file is missing, is not YAML or breaks rules; the message lists every problem.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"a config file must exist, but {path} does not; correct the path") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} must be readable YAML, but: {error}") from error
    try:
        return QuantConfig.model_validate(content)
    except ValidationError as error:
        listed = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'the file'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise ConfigError(f"config file {path} must describe a quantization, but {listed}") from error
