"""What is fuzzed: a kind of file, seeds of it, and the public entry that reads it.

A target writes its payload under `folder` and reads it as a command would. Those in `TREES` are mutated as documents
(hypothesis), those in `BYTES` as bytes guided by coverage (atheris).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from hyquant.calibration.file import open_calibrated
from hyquant.calibration.store import Store, write_atomically
from hyquant.checkpoint.files import open_file
from hyquant.checkpoint.source import open_checkpoint
from hyquant.errors import ConfigError
from hyquant.export import read_manifest, verify_export
from hyquant.sensitivity.files import Journal, load_map
from search.certificate import binding_problems, read_certificate
from search.config_file import load_config, load_device_profile
from search.prompts import load_prompts, read_prompts
from search.slot_devices import read_devices, read_layout
from search.study_file import load_study
from spaces.space import load_space
from tools.fuzz import seeds

Reader = Callable[[Path, bytes], object]


@dataclass(frozen=True)
class Target:
    """Seeds, made in the folder that is read later, and a reader."""

    seeds: Callable[[Path], list[bytes]]
    read: Reader


def _study(folder: Path, payload: bytes) -> None:
    path = _written(folder / "study.yaml", payload)
    config = load_study(path)
    load_prompts(config.workload, folder)


def _layout(folder: Path, payload: bytes) -> None:
    text = payload.decode(errors="replace")
    for read in (read_layout, read_devices):
        try:
            read(text)
        except ValueError as error:
            raise ConfigError(str(error)) from error  # as whoever asks tells it


def _certificate(folder: Path, payload: bytes) -> None:
    _written(folder / "export" / "certificate.json", payload)
    found = read_certificate(folder / "export")
    if found is not None:
        list(binding_problems(folder / "export", found))
        found.headline()


def _verify(name: str, folder: Path, payload: bytes) -> None:
    export = folder / ("export" if name == "hyq_manifest.json" else "foreign")
    _written(next(export.glob(name)), payload)
    if name == "hyq_manifest.json":
        read_manifest(export)
    verify_export(export)
    verify_export(export, target="mindie-sd-3.1/910b")


def _index(folder: Path, payload: bytes) -> None:
    parts = folder / "parts"
    _written(parts / "model.safetensors.index.json", payload)
    open_checkpoint(parts)


def _header(folder: Path, payload: bytes) -> None:
    framed = len(payload).to_bytes(8, "little") + payload + bytes(44)  # as many as the first seed says
    open_file(_written(folder / "header.safetensors", framed))
    open_checkpoint(folder / "header.safetensors")


def _checkpoint(name: str, folder: Path, payload: bytes) -> None:
    for tensor in open_file(_written(folder / name, payload)).values():
        if tensor.shape:
            tensor.rows(0, min(tensor.shape[0], 2))
    open_checkpoint(folder / name)


def _statistics(folder: Path, payload: bytes) -> None:
    found = open_calibrated(_written(folder / "stats.safetensors", payload)).found
    for part in (found.stats, found.smoothed_stats, found.scales, found.attention_stats):
        list((part or {}).values())


def _entry(folder: Path, payload: bytes) -> None:
    meta, _, tensors = payload.partition(b"\n")
    _written(folder / "store" / "key.json", meta)
    _written(folder / "store" / "key.safetensors", tensors)
    Store(folder / "store").get("key")


def _map(folder: Path, payload: bytes) -> None:
    load_map(_written(folder / "map.json", payload))
    Journal(_written(folder / "map.jsonl", payload))


def _written(path: Path, payload: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, payload)
    return path


def _file(name: str, read: Callable[[Path], object]) -> Reader:
    return lambda folder, payload: read(_written(folder / name, payload))


def _prompts(folder: Path, payload: bytes) -> object:
    _written(folder / "prompts.txt", payload)
    return read_prompts("prompts.txt", folder)


def _yaml(document: Any) -> bytes:
    return yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()


BYTES: Mapping[str, Target] = {
    "study-bytes": Target(seeds.study_texts, _study),
    "space-bytes": Target(seeds.space_texts, _file("space.yaml", load_space)),
    "prompts-bytes": Target(lambda folder: [b"a cat\na dog\n"], _prompts),
    "layout-bytes": Target(lambda folder: [b"2 x 4", b"0-3,6", b"auto"], _layout),
    "header-bytes": Target(seeds.headers, _header),
    "safetensors-bytes": Target(seeds.checkpoints, partial(_checkpoint, "weights.safetensors")),
    "pt-bytes": Target(seeds.pickles, partial(_checkpoint, "weights.pt")),
    "export-bytes": Target(seeds.export_weights, partial(_verify, "*.safetensors")),
    "statistics-bytes": Target(seeds.statistics, _statistics),
    "cache-bytes": Target(seeds.entries, _entry),
}

TREES: Mapping[str, tuple[Target, Callable[[Any], bytes]]] = {
    "study": (Target(seeds.studies, _study), _yaml),
    "space": (Target(seeds.spaces, _file("space.yaml", load_space)), _yaml),
    "config": (Target(seeds.configs, _file("config.yaml", load_config)), _yaml),
    "device-profile": (Target(seeds.device_profiles, _file("device.yaml", load_device_profile)), _yaml),
    "manifest": (Target(seeds.manifests, partial(_verify, "hyq_manifest.json")), _json),
    "description": (Target(seeds.descriptions, partial(_verify, "quant_model_description*.json")), _json),
    "index": (Target(seeds.indexes, _index), _json),
    "certificate": (Target(seeds.certificates, _certificate), _json),
    "map": (Target(seeds.maps, _map), _json),
}
