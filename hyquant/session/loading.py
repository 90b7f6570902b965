"""`safe_torch_load`: files of torch.save whose loading runs no code."""

import pickle
from pathlib import Path
from typing import Any

import torch

from hyquant.errors import ConfigError


def safe_torch_load(path: str | Path, *, map_location: Any = None, **options: Any) -> Any:
    """Load what torch.save wrote, tensors and plain containers only.

    It is `torch.load(weights_only=True)` and nothing else: a file that holds other objects is refused, nobody is asked,
    and nothing in it is executed.

    Args:
        path: The file, such as a dump of `DumperManager` or of msModelSlim's.
        map_location: Where tensors go, as for torch.load.
        options: Others of torch.load, but `pickle_module`.

    Raises:
        ConfigError: If the file is missing, damaged or holds other objects, or `weights_only` is False.
    """
    if not options.pop("weights_only", True) or "pickle_module" in options:
        raise ConfigError(
            f"{path} must be loaded without running code, but other loading was asked for; leave out weights_only and "
            "pickle_module, or load it by torch.load if you trust it."
        )
    try:
        return torch.load(path, map_location=map_location, weights_only=True, **options)
    except FileNotFoundError as error:
        raise ConfigError(
            f"a file to load must be there, but {path} is not; dump the calibration data first."
        ) from error
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} must hold tensors and plain containers only, but it has something else or is damaged; dump it "
            "again, or convert it where you trust it."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path} must be a whole file of torch.save, but it cannot be read ({first}).") from error
