"""Which versions of which packages shape what is rendered and exported."""

import platform
from importlib.metadata import PackageNotFoundError, version


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide about the bits of videos and exports."""
    found = {"python": platform.python_version()}
    for package in ("hyq-search", "torch", "safetensors", "diffusers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
