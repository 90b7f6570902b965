"""The verdict over an exported folder, for people and for programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyquant.calibration.capture import capture_in_memory
from hyquant.config import Target
from hyquant.errors import ConfigError, HyquantError
from hyquant.export import VerifyReport, read_manifest, verify_export
from hyquant.export.compare import badness
from hyquant.export.mindie import EngineReport, load_in_engine
from hyquant.export.names import MANIFEST_NAME
from hyquant.export.verify import PROBE_PROMPT
from hyquant.models import load_model
from hyquant.models.base import RenderSettings, VideoModel
from search.answers import report_json
from search.certificate import Certificate, binding_problems, read_certificate
from search.errors import SearchError
from search.rendering import load_float_model

_SHOWN = 3


@dataclass(frozen=True)
class Verdict:
    """A verdict and how it came about.

    Attributes:
        folder: What was judged.
        report: What this library found.
        compared: Whether the float model took part, or why not.
        engine: What the installed engine found; None if it was not asked.
        certificate: What lies beside the weights, if anything does.
        unbound: Why what lies there is no certificate, or was not given for these files.
    """

    folder: Path
    report: VerifyReport
    compared: str
    engine: EngineReport | None = None
    certificate: Certificate | None = None
    unbound: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Return everything that is wrong."""
        return self.report.problems + (() if self.engine is None else self.engine.problems) + self.unbound

    def json(self) -> dict[str, Any]:
        """Return the answer of `hyq-search verify --json`; documented in docs/cli.md."""
        engine = None if self.engine is None else self.engine.model_dump(mode="json")
        certificate = None
        if self.certificate is not None:
            certificate = self.certificate.model_dump(mode="json", include={"verdict", "study", "created"})
        return {
            **report_json(self.report),
            "ok": self.report.ok and not self.unbound,
            "problems": [*self.report.problems, *self.unbound],
            "compared": self.compared,
            "engine": engine,
            "certificate": certificate,
        }

    def lines(self) -> list[str]:
        """Return what is printed."""
        report = self.report
        state = "PROBLEMS" if self.problems else "ok"
        counts = ", ".join(f"{count} {name}" for name, count in report.layer_counts.items())
        lines = [f"{self.folder}: {state}; layers: {counts or 'unknown'}; {self.compared}"]
        lines.append(f"{report.target} replaces {report.replaced} Linears and ignores {len(report.ignored)} entries")
        for check in report.forward:
            lines.append(f"step {check.step_index}: cosine {check.cosine:.5f}, gain {check.gain:.4f}")
        worst = sorted(report.layer_checks, key=badness, reverse=True)[:_SHOWN]
        for layer in worst:
            lines.append(
                f"among the worst of {len(report.layer_checks)} layer calls: {layer.name}, step {layer.step_index}, "
                f"cosine {layer.cosine:.5f}, gain {layer.gain:.4f}"
            )
        if self.certificate is not None:
            bound = "it was given for other files" if self.unbound else f"margins of study {self.certificate.study}"
            lines.append(f"certificate of {self.certificate.created}: {self.certificate.headline()}; {bound}")
        if self.engine is not None:
            found = ", ".join(f"{count} {kind}" for kind, count in self.engine.replaced.items()) or "nothing"
            lines.append(
                f"mindiesd {self.engine.version} replaced {found} of {self.engine.expected} planned layers; "
                f"{self.engine.not_run or f'{len(self.engine.layer_checks)} layers were run'}"
            )
        return lines


def verify_folder(
    folder: Path, *, source: str | None = None, target: Target | None = None, with_engine: bool = False
) -> Verdict:
    """Judge an exported folder, with its float model if that can be loaded.

    Args:
        folder: What `export` or msModelSlim wrote.
        source: Where the float weights are, if not where the export says.
        target: What will execute it; None for what the export says.
        with_engine: Load it through the installed MindIE-SD too.

    Raises:
        ExportError: If the folder is no export, or the engine was asked for and is not there.
        ConfigError: If the engine was asked for and the float model cannot be loaded.
    """
    model, compared = _float_model(folder, source)
    report = verify_export(folder, model, target=target)
    engine = None
    if with_engine:
        if model is None:
            raise ConfigError(f"the engine is given the model's layers, but it is {compared}; give --model")
        num_steps = read_manifest(folder).num_steps
        clip = RenderSettings(height=64, width=64, num_frames=5, num_steps=num_steps)
        records = capture_in_memory(model, [PROBE_PROMPT], [0], clip)
        engine = load_in_engine(folder, model.denoiser, records[-1])
    certificate, unbound = _certificate_of(folder)
    return Verdict(
        folder=folder, report=report, compared=compared, engine=engine, certificate=certificate, unbound=unbound
    )


def _certificate_of(folder: Path) -> tuple[Certificate | None, tuple[str, ...]]:
    """Return a folder's certificate if it can be read, and what is wrong with it."""
    try:
        certificate = read_certificate(folder)
    except SearchError as error:
        return None, (str(error),)
    return certificate, () if certificate is None else tuple(binding_problems(folder, certificate))


def _float_model(folder: Path, source: str | None) -> tuple[VideoModel | None, str]:
    """Return the float model, and whether it takes part or why it does not."""
    try:
        if (folder / MANIFEST_NAME).is_file():
            return load_float_model(folder, source=source), "compared with the float model"
        if source is None:
            return None, "not compared with the float model: a folder without a manifest does not name it; give --model"
        return load_model("hunyuan_video", source), "compared with the float model"
    except HyquantError as error:
        return None, f"not compared with the float model: {error}"
