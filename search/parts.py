"""What a study names and its host must have: refused before the study is stored, which would then hold a wrong name."""

from pathlib import Path

from hyquant.devices import resolve_device
from hyquant.errors import ConfigError
from hyquant.models import require_frames, require_model
from hyquant.models.base import DeploymentShape, RenderSettings
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
    """Look for a study's kind of model, device and judge without loading them, and at the frames of its clips.

    Raises:
        ConfigError: If nobody offers the model's kind or the device, there are no such weights, or the model renders no
            such clip.
        DeviceUnavailable: If the device is not usable on this machine.
        MetricError: If the judge's weights are unknown or not on this machine.
    """
    require_model(config.model.kind, config.model.source)
    _require_clips(config)
    resolve_device(config.model.device)
    require_judge(config)


def require_judge(config: StudyConfig) -> None:
    """Look for the judge's weights; the hashing judge has none.

    Raises:
        MetricError: If they are unknown or not on this machine.
    """
    if config.judge.model != "hashing":
        find_weights(config.judge.model, config.judge.pretrained)


def _require_clips(config: StudyConfig) -> None:
    clips: dict[str, RenderSettings | DeploymentShape] = {
        "workload.settings": config.workload.settings,
        "deployment": config.deployment,
    }
    if config.certificate is not None and config.certificate.settings is not None:
        clips["certificate.settings"] = config.certificate.settings
    for where, clip in clips.items():
        try:
            require_frames(config.model.kind, clip.num_frames)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
