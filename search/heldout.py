"""From STUDY to what an export is certified by: the study, its section `certificate`, and its held-out prompts."""

from pathlib import Path

from hyquant.errors import ConfigError
from search.locate import StudyRef, config_to_run, locate_study, opened_study, prompts_to_run
from search.margins import CertificateConfig
from search.prompts import StudyPrompts, load_heldout_prompts
from search.storage import stored_prompts, study_names
from search.study import StudyConfig


def certificate_to_judge(
    study: str, store: Path | None, storage: str | None = None
) -> tuple[StudyConfig, CertificateConfig, tuple[str, ...]]:
    """Return a study with what certifies its exports; held-out prompts are checked against all that were used.

    Args:
        study: Path of a study file, or the name of a stored study.
        store: Folder that overrides the study file's `store`.
        storage: Address of the study's database, as `locate_study` takes it.

    Raises:
        ConfigError: If the study states no margins, or its held-out prompts are missing, too few or not new.
        StoreError: If a name is not in the store.
    """
    ref = locate_study(study, store, storage)
    config, file = config_to_run(ref)
    if config.certificate is None:
        raise ConfigError(
            f"an export is certified by margins, but study {config.name} states none; add a section `certificate` with "
            "`prompts` to its file"
        )
    if file is None and not config.certificate.prompts.startswith("mini:"):
        raise ConfigError(
            f"held-out prompts lie beside the study file, but study {config.name} was given by name; give the path of "
            "its file"
        )
    folder = Path() if file is None else file.parent
    heldout = load_heldout_prompts(config.certificate, folder, prompts_to_run(ref))
    used = _used_in_store(ref)
    if used is not None:
        load_heldout_prompts(config.certificate, folder, used)
    return config, config.certificate, heldout


def _used_in_store(ref: StudyRef) -> StudyPrompts | None:
    """Return the prompts a stored study was run with, None if it was never run."""
    if ref.name not in study_names(ref.store, url=ref.url):
        return None
    with opened_study(ref) as opened:
        return stored_prompts(opened)
