"""The certificate of an export: a frozen value in `certificate.json` beside the weights, bound to their bytes.

It says what was promised, what the held-out clips show, on which software, and the SHA-256 of every file of the
export. It holds the prompts and every score, so that `certify --again` can repeat it without the study.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from hyquant.calibration.store import write_atomically
from hyquant.config import FrozenModel, QuantConfig
from hyquant.errors import ExportError
from hyquant.export import ModelInfo, read_manifest
from hyquant.export.folder import sha256_of
from hyquant.export.names import CERTIFICATE_NAME, MANIFEST_NAME, FileName
from hyquant.models.base import RenderSettings
from metrics.statistics.verdict import Verdict
from search.errors import SearchError
from search.margin_verdicts import MetricVerdict
from search.study import JudgeConfig


class Pair(FrozenModel):
    """One held-out clip: a prompt and the seed of its noise, the same in float and quantized."""

    prompt: str
    seed: int


class Software(FrozenModel):
    """What the clips were rendered and judged with: versions, kind of device and kernels; the driver is not known."""

    packages: dict[str, str]
    device: str
    kernels: tuple[str, ...]


class Certificate(FrozenModel):
    """A verdict over an export, what it rests on, and what it is bound to.

    Attributes:
        verdict: PASS if every metric is shown to keep its margin, FAIL if one is shown not to, else INCONCLUSIVE.
        new_prompts: If inconclusive, how many prompts a certificate on prompts that are all new needs, the most of any
            metric; None if it is not, or if no number would do. Prompts added to these would be a second look, which
            passes more models beyond a margin than alpha.
        metrics: The verdict over each metric.
        alpha: How often a model beyond a margin may pass.
        study: Name of the study that states the margins.
        created: Day and time in UTC.
        pairs: Held-out prompts with their seeds, prompt by prompt.
        prompts_digest: Names the set of prompts.
        settings: Clip and steps.
        judge: The model that judged.
        model: The float model.
        config: The quantization.
        software: Packages, device and kernels.
        files: SHA-256 of every file of the export, by name.
    """

    format_version: Literal[2] = 2
    verdict: Verdict
    new_prompts: int | None
    metrics: tuple[MetricVerdict, ...]
    alpha: float
    study: str
    created: str
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    prompts_digest: str
    settings: RenderSettings
    judge: JudgeConfig
    model: ModelInfo
    config: QuantConfig
    software: Software
    files: dict[FileName, str]

    @property
    def num_prompts(self) -> int:
        """Return how many prompts there are."""
        return len({pair.prompt for pair in self.pairs})

    def headline(self) -> str:
        """Return the verdict in one line."""
        clips = f"{self.num_prompts} held-out prompts, {len(self.pairs)} pairs"
        if self.verdict == "INCONCLUSIVE" and self.new_prompts is not None:
            pairs = self.new_prompts * len(self.pairs) // self.num_prompts
            return f"INCONCLUSIVE on {clips}; a certificate on {self.new_prompts} new prompts ({pairs} pairs) should do"
        return f"{self.verdict} on {clips}"


def export_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of an export, its manifest among them.

    Raises:
        ExportError: If the folder is no export, or a file is missing.
    """
    names = (MANIFEST_NAME, *sorted(read_manifest(folder).files))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ExportError(f"{folder} must hold all files of its manifest, but {missing[0]} is missing; copy it again")
    return {name: sha256_of(folder / name) for name in names}


def write_certificate(folder: Path, certificate: Certificate) -> Path:
    """Write `certificate.json` into an export's folder, whole or not at all, and return its path."""
    path = folder / CERTIFICATE_NAME
    write_atomically(path, (certificate.model_dump_json(indent=1) + "\n").encode())
    return path


def read_certificate(folder: Path) -> Certificate | None:
    """Return the certificate of an export, None if it has none.

    Raises:
        SearchError: If it is damaged or of another version.
    """
    path = folder / CERTIFICATE_NAME
    if not path.is_file():
        return None
    try:
        return Certificate.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise SearchError(
            f"{path} must be a certificate of format 2, but {place} is wrong ({first['msg']}); certify again with "
            "--overwrite"
        ) from error


def binding_problems(folder: Path, certificate: Certificate) -> Iterator[str]:
    """Say of each file that a certificate names whether it has changed, and of each that it does not name."""
    for name, digest in certificate.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{CERTIFICATE_NAME} was given for {name}, but that file is missing; copy it again"
        elif sha256_of(path) != digest:
            yield (
                f"{CERTIFICATE_NAME} was given for other bytes of {name}, so it says nothing about these; certify the "
                "export again"
            )
    listed = set(read_manifest(folder).files) if (folder / MANIFEST_NAME).is_file() else set()
    for name in sorted(listed - set(certificate.files)):
        yield f"{CERTIFICATE_NAME} was not given for {name}, which the manifest lists; certify the export again"
