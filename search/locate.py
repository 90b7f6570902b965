"""From what a user types as STUDY to a stored study: a study file's path, or the name of a study in a store."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

import optuna
from pydantic import ValidationError

from search.overview import Overview, read_overview
from search.prompts import StudyPrompts, load_prompts
from search.storage import open_study, store_errors, stored_config, stored_prompts
from search.stored import damaged
from search.study import StudyConfig

DEFAULT_STORE = Path("mlruns")
STORAGE_VARIABLE = "HYQ_STORAGE"


@dataclass(frozen=True)
class StudyRef:
    """Where a study is: its name, the folder of its store, and the database if that lies elsewhere.

    `file` and `config` are there if the user gave a study file.
    """

    name: str
    store: Path
    url: str | None = None
    file: Path | None = None
    config: StudyConfig | None = None


def locate_study(text: str, store: Path | None = None, storage: str | None = None) -> StudyRef:
    """Read STUDY: text with a slash or a YAML suffix, or an existing file, is a path; anything else is a name.

    Args:
        text: What the user typed.
        store: Folder that overrides the study file's `store`; names are looked up there, else in ./mlruns.
        storage: Address of the database; else the study file's `storage`, else $HYQ_STORAGE, else SQLite in the store.

    Raises:
        ConfigError: If a study file is missing or breaks rules.
    """
    path, address = Path(text), os.environ.get(STORAGE_VARIABLE)
    if path.suffix not in (".yaml", ".yml") and "/" not in text and not path.is_file():
        return StudyRef(name=text, store=store or DEFAULT_STORE, url=storage or address)
    from search.study_file import load_study  # loads the metrics to check their names

    config = load_study(path)
    if store is not None:
        config = config.model_copy(update={"store": str(store)})
    config = config.model_copy(update={"storage": storage or config.storage or address})
    return StudyRef(name=config.name, store=Path(config.store), url=config.storage, file=path, config=config)


@contextmanager
def opened_study(ref: StudyRef) -> Iterator[optuna.Study]:
    """Open a stored study for reading; databases are not created, and their errors become one sentence.

    Raises:
        StoreError: If the store or the study is not there, or a database does not answer or is damaged.
    """
    quiet_optuna()
    try:
        with store_errors(ref.store):
            yield open_study(ref.store, ref.name, url=ref.url)
    except (ValidationError, JSONDecodeError) as error:
        raise damaged(f"study {ref.name!r} in {ref.store}", error) from error


def overview_of(ref: StudyRef) -> Overview:
    """Read a stored study as one value.

    Raises:
        StoreError: As `opened_study`.
    """
    with opened_study(ref) as study:
        return read_overview(study)


def config_to_run(ref: StudyRef) -> tuple[StudyConfig, Path | None]:
    """Return the config to create or resume a study with, and its study file.

    A study given by name has no file; it is resumed with the config and the prompts that are stored of it.

    Raises:
        StoreError: If a name is not in the store.
    """
    quiet_optuna()
    if ref.config is not None:
        return ref.config, ref.file
    with opened_study(ref) as study:
        config = stored_config(study)
    return config.model_copy(update={"store": str(ref.store), "storage": ref.url}), None


def prompts_to_run(ref: StudyRef) -> StudyPrompts:
    """Return a study's prompts: from the files that its study file names, or as they are stored of it.

    Raises:
        ConfigError: If prompts are missing or overlap.
        StoreError: If a name is not in the store.
    """
    if ref.config is not None and ref.file is not None:
        return load_prompts(ref.config.workload, ref.file.parent)
    with opened_study(ref) as study:
        return stored_prompts(study)


def quiet_optuna() -> None:
    """Keep Optuna's own log and its remarks about experimental features off the user's terminal."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
