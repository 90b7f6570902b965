"""What a study's own attributes hold, and how a study is opened, created and named; databases are `search.databases`.

The runner alone creates studies. Workers and readers open what exists.

    study.user_attrs    study_config, prompts    what the study is; workers read it from here
                        content_digests          digests of both, so that who joins from elsewhere can check them
                        study_id                 random, tells it from others of its name in MLflow (`search.study_run`)
                        float_scores             metrics of the float videos, by name, once measured
                        noise_floor              how far float itself moves under neutral changes, once measured and
                                                 agreed upon (`search.floor_agreement`)
                        presets_enqueued         True once the space's presets are in the queue
                        model_fingerprint        which model it is about; earlier_presets: what of others was queued
                        confirmed:NUMBER         a member of the front measured again
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import optuna
from optuna.storages import BaseStorage
from pydantic import TypeAdapter

from hyquant.config import digest
from search.databases import open_storage
from search.errors import EmptyStore, StoreError
from search.noise_floor import NoiseFloor
from search.patience import database_errors, first_line
from search.prompts import StudyPrompts
from search.redaction import redacted
from search.result import MetricResult
from search.retry import known_experiments
from search.stored import read_stored
from search.study import StudyConfig
from spaces.space import did_you_mean

FLOOR = "noise_floor"
MIN_FREE_BYTES = 200 * 2**20
_ID = "study_id"
_RESULTS = TypeAdapter(dict[str, MetricResult])


def open_study(
    store: Path, name: str, *, create: bool = False, url: str | None = None, is_known: bool = False
) -> optuna.Study:
    """Open a stored study.

    Args:
        store: The study's folder.
        name: The study's name.
        create: Make the database if it does not exist; the study itself is made by `create_study`.
        url: Address of the database (`search.databases`); None is SQLite in the store.
        is_known: Whether the database answered whoever started this process, so that it is waited for.

    Raises:
        StoreError: If the database or the study does not exist, or the database is locked or cannot be used.
    """
    with store_errors(store):
        storage = open_storage(store, create=create, url=url, is_known=is_known)
        names = _names(storage)
        if name not in names:
            known = ", ".join(names) or "none yet"
            hint = did_you_mean(name, names)
            place = f"store {store}" if url is None else f"storage {redacted(url)}"
            raise StoreError(f"study {name!r} is not in {place}; it holds {known}{hint}")
        return optuna.load_study(study_name=name, storage=storage)


def create_study(
    store: Path, config: StudyConfig, prompts: StudyPrompts, *, url: str | None = None
) -> tuple[optuna.Study, bool]:
    """Open a study, or create it with its config and prompts; return it and whether it is new.

    Raises:
        StoreError: If the database cannot be used, or takes the name for that of another study.
    """
    with store_errors(store):
        storage = open_storage(store, create=True, url=url)
        is_new = config.name not in _names(storage)
        study = optuna.create_study(
            study_name=config.name,
            storage=storage,
            directions=[objective.direction for objective in config.objectives],
            load_if_exists=True,
        )
        if study.study_name != config.name:
            raise StoreError(
                f"a study needs a name of its own, but this database takes {config.name!r} for {study.study_name!r}, "
                f"which it holds (MySQL compares names without case); give another name"
            )
        if "study_config" not in study.user_attrs:
            with known_experiments():
                study.set_metric_names([objective.metric for objective in config.objectives])
            study.set_user_attr("prompts", prompts.model_dump(mode="json"))
            study.set_user_attr(_ID, uuid4().hex)
            store_config(study, config)
        return study, is_new


def store_config(study: optuna.Study, config: StudyConfig) -> None:
    """Write what a study is into it, with digests of that; where it is stored is left out, for it holds passwords."""
    stored = config.stored_form()
    contents = {"study_config": digest(stored), "prompts": digest(study.user_attrs["prompts"])}
    study.set_user_attr("content_digests", contents)
    study.set_user_attr("study_config", stored)


def require_intact(study: optuna.Study) -> None:
    """Refuse a study whose config or prompts are not what was stored; studies made before digests were are believed.

    Raises:
        StoreError: If a digest differs.
    """
    attributes = study.user_attrs
    for key, expected in attributes.get("content_digests", {}).items():
        if (found := digest(attributes.get(key))) != expected:
            raise StoreError(
                f"the {key} of study {study.study_name!r} must have digest {expected}, but has {found}; "
                f"resume the study with `hyq-search run` and its study file"
            )


def study_names(store: Path, *, url: str | None = None) -> tuple[str, ...]:
    """Return the names of the studies in a store, sorted; none if there is no database.

    Args:
        store: The studies' folder.
        url: Address of the database (`search.databases`); None is SQLite in the store.

    Raises:
        StoreError: If a database does not answer.
    """
    try:
        with store_errors(store):
            return _names(open_storage(store, url=url))
    except EmptyStore:
        return ()


def study_id(study: optuna.Study) -> str | None:
    """Return what tells a study from others of its name; None if it was made before there were ids."""
    found = study.user_attrs.get(_ID)
    return None if found is None else str(found)


def stored_config(study: optuna.Study) -> StudyConfig:
    """Return the config a study was created with.

    Raises:
        StoreError: If the study was not made by hyq-search, or not by this version.
    """
    return read_stored(StudyConfig.model_validate, *_attribute(study, "study_config"))


def stored_prompts(study: optuna.Study) -> StudyPrompts:
    """Return the prompts a study was created with."""
    return read_stored(StudyPrompts.model_validate, *_attribute(study, "prompts"))


def float_results(study: optuna.Study) -> dict[str, MetricResult]:
    """Return the metrics of the float videos by name; empty until a worker has measured them."""
    stored = study.user_attrs.get("float_scores", {})
    return read_stored(_RESULTS.validate_python, stored, f"the float_scores of study {study.study_name!r}")


def float_scores(study: optuna.Study) -> dict[str, float]:
    """Return the means of the metrics of the float videos by name; empty until a worker has measured them."""
    return {name: result.mean for name, result in float_results(study).items()}


def stored_floor(study: optuna.Study) -> NoiseFloor | None:
    """Return a study's noise floor; None until a worker has measured it."""
    found = study.user_attrs.get(FLOOR)
    return None if found is None else NoiseFloor.model_validate(found)


@contextmanager
def store_errors(store: Path) -> Iterator[None]:
    """Turn what a database or file system says about a store into one StoreError."""
    try:
        yield
    except database_errors() as error:
        raise StoreError(
            f"the databases of store {store} must be usable, but one answered '{first_line(error)}'; see that no other "
            f"program holds it and that the folder is writable"
        ) from error
    except OSError as error:
        raise StoreError(f"store {store} must be a writable folder, but: {error}; give another --store") from error


def require_space(store: Path) -> None:
    """Refuse a store on a full disk.

    Raises:
        StoreError: If less than `MIN_FREE_BYTES` are free.
    """
    with store_errors(store):
        store.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(store).free
    if free_bytes < MIN_FREE_BYTES:
        raise StoreError(
            f"a store needs {MIN_FREE_BYTES >> 20} MiB of free space, but {store} has {free_bytes >> 20} MiB; "
            f"free some or give another --store"
        )


def _names(storage: BaseStorage) -> tuple[str, ...]:
    return tuple(sorted(summary.study_name for summary in storage.get_all_studies()))


def _attribute(study: optuna.Study, key: str) -> tuple[object, str]:
    """Return an attribute and where it stands."""
    attributes = study.user_attrs  # a copy of all, from the database
    if key not in attributes:
        raise StoreError(f"study {study.study_name!r} was not made by hyq-search (it has no {key}); give another study")
    return attributes[key], f"the {key} of study {study.study_name!r}"
