"""Descriptions of devices on paper, from YAML files."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from hyquant.cost import DeviceProfile
from hyquant.errors import ConfigError


def read_device_profile(path: Path) -> DeviceProfile:
    """Read the description of a device.

    Raises:
        ConfigError: If the file is missing, is not YAML or breaks rules.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return DeviceProfile.model_validate(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"a device profile must be a readable YAML file, but {path} is not: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"device profile {path}: {where or 'content'}: {first['msg']}; see studies/devices"
        ) from error
