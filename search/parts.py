"""What a study names and its host must have: refused before the study is stored, which would then hold a wrong name."""

from pathlib import Path

from hyquant.devices import resolve_device
from hyquant.models import require_model
from metrics.embedders import find_weights
from search.addresses import require_plain_address
from search.errors import SearchError
from search.study import StudyConfig


def require_places(shared: str | Path | None, tracking: str | None) -> None:
    """Check where hosts are to share what was made once, which need not be there yet, and where MLflow is.

    Raises:
        SearchError: If the folder is something else, or the address is none or may be misread.
    """
    if tracking is not None:
        require_plain_address(tracking)
    if tracking is not None and "://" not in tracking and tracking != "databricks":
        raise SearchError(
            f"tracking must be the address of an MLflow server such as http://HOST:PORT, but got {tracking!r}; "
            "correct it"
        )
    if shared is not None and Path(shared).exists() and not Path(shared).is_dir():
        raise SearchError(f"--shared must be a folder, but {shared} is something else; give another path")


def require_parts(config: StudyConfig) -> None:
    """Look for a study's kind of model, device and judge without loading them.

    Raises:
        ConfigError: If nobody offers the model's kind or the device, or there are no such weights.
        DeviceUnavailable: If the device is not usable on this machine.
        MetricError: If the judge's weights are unknown or not on this machine.
    """
    require_model(config.model.kind, config.model.source)
    resolve_device(config.model.device)
    require_judge(config)


def require_judge(config: StudyConfig) -> None:
    """Look for the judge's weights; the hashing judge has none.

    Raises:
        MetricError: If they are unknown or not on this machine.
    """
    if config.judge.model != "hashing":
        find_weights(config.judge.model, config.judge.pretrained)
