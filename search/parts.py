"""What a study names and its host must have: refused before the study is stored, which would then hold a wrong name."""

from hyquant.devices import resolve_device
from hyquant.models import ENTRY_POINT_GROUP, MODELS
from hyquant.plugins import find_entry
from metrics.embedders import find_weights
from search.study import StudyConfig


def require_parts(config: StudyConfig) -> None:
    """Look for a study's kind of model, device and judge without loading them.

    Raises:
        ConfigError: If nobody offers the model's kind or the device.
        DeviceUnavailable: If the device is not usable on this machine.
        MetricError: If the judge's weights are unknown or not on this machine.
    """
    find_entry(MODELS, ENTRY_POINT_GROUP, config.model.kind)
    resolve_device(config.model.device)
    if config.judge.model != "hashing":
        find_weights(config.judge.model, config.judge.pretrained)
