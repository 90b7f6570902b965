"""The errors hyquant raises on purpose.

    HyquantError
    ├── ConfigError        a value breaks a rule (also a ValueError)
    ├── LayerMatchError    a pattern matched nothing, or a layer is unknown
    ├── CalibrationError   records or statistics are missing, stale or not finite
    ├── ExportError        an export cannot be written, read or trusted
    └── DeviceUnavailable  a device or its runtime is not there
    RankLost               another rank of the group is gone (a RuntimeError: nothing can go on without it)

Every message is one sentence with three parts: the rule, the values, the way out.
"""


class HyquantError(Exception):
    """Base of everything hyquant raises on purpose."""


class ConfigError(HyquantError, ValueError):
    """A configuration value breaks a rule."""


class LayerMatchError(HyquantError):
    """A layer pattern matched nothing, or a layer name is unknown."""


class CalibrationError(HyquantError):
    """Calibration records or statistics are missing, stale or not finite."""


class ExportError(HyquantError):
    """An export cannot be written, read or trusted."""


class DeviceUnavailable(HyquantError):
    """A device or its runtime is not available on this machine."""


class RankLost(RuntimeError):
    """Another rank of the group has ended or does not answer; what this one was doing together with it is lost."""
