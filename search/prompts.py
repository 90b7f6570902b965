"""The prompts of a study: read from files once, checked, and stored with the study.

Calibration must not see what the search is judged on, so the two sets are disjoint; and a certificate is about prompts
that neither of them saw.
"""

from collections import Counter
from pathlib import Path

from hyquant.config import FrozenModel
from hyquant.errors import ConfigError
from hyquant.models.mini import PROMPTS
from hyquant.text_file import read_text
from search.margins import CertificateConfig
from search.study import Workload
from spaces.space import did_you_mean

_SHIPPED = "mini:"
_SHOWN = 60


class StudyPrompts(FrozenModel):
    """What a study calibrates on and what it renders in every trial, disjoint, in file order."""

    calibration: tuple[str, ...]
    search: tuple[str, ...]


def load_prompts(workload: Workload, folder: Path) -> StudyPrompts:
    """Read the prompts of a workload; relative paths are relative to `folder`, where the study file is.

    Raises:
        ConfigError: If a file is missing, holds too few prompts or repeats one, or the two sets overlap.
    """
    calibration = _first(workload.calibration_prompts, workload.num_calibration_prompts, folder)
    search = _first(workload.search_prompts, workload.num_search_prompts, folder)
    if shared := sorted(set(calibration) & set(search)):
        raise ConfigError(
            f"calibration and search prompts must be disjoint, but share {len(shared)}, the first {shared[0]!r}; take "
            f"them out of one file"
        )
    return StudyPrompts(calibration=calibration, search=search)


def load_heldout_prompts(certificate: CertificateConfig, folder: Path, used: StudyPrompts) -> tuple[str, ...]:
    """Read the prompts of a certificate; a relative path is relative to `folder`, where the study file is.

    Two prompts are taken to be one if they differ in case and spaces only.

    Args:
        certificate: Which prompts, and how many.
        folder: Where the study file is.
        used: What calibrated and what was searched with.

    Raises:
        ConfigError: If the file is missing, holds too few prompts or repeats one, or one of them was used before.
    """
    heldout = _first(certificate.prompts, certificate.num_prompts, folder)
    counts = Counter(map(_normal, heldout))
    if repeated := next((prompt for prompt in heldout if counts[_normal(prompt)] > 1), None):
        raise ConfigError(
            f"held-out prompts must differ by more than case and spaces, but {repeated!r} stands there twice; take one "
            "out"
        )
    for purpose, prompts in (("calibration", used.calibration), ("search", used.search)):
        seen = set(map(_normal, prompts))
        if shared := [prompt for prompt in heldout if _normal(prompt) in seen]:
            raise ConfigError(
                f"held-out prompts must be new to the model's quantization, but {len(shared)} of {len(heldout)} served "
                f"for {purpose}, the first {shared[0]!r}; take them out of one file"
            )
    return heldout


def _normal(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def read_prompts(source: str, folder: Path) -> tuple[str, ...]:
    """Return the prompts of a file or of a shipped set ("mini:heldout"), one a line, empty lines left out.

    Raises:
        ConfigError: If there is no such file or set, or a prompt stands there twice.
    """
    path = _shipped(source.removeprefix(_SHIPPED)) if source.startswith(_SHIPPED) else folder / source
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"a prompt file must be readable text, but {path} cannot be read: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if odd := next((prompt for prompt in prompts if "\0" in prompt or prompt.startswith('{"')), None):
        raise ConfigError(
            f"prompt file {path} must hold plain text, a prompt a line, but one is {_shortened(odd)}; take NULs and "
            "JSON out of it"
        )
    if repeated := next((prompt for prompt, count in Counter(prompts).items() if count > 1), None):
        raise ConfigError(
            f"prompt file {path} must not repeat a prompt, but {repeated!r} stands there twice; delete one"
        )
    return prompts


def _shortened(prompt: str) -> str:
    return repr(prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}...")


def _first(source: str, count: int, folder: Path) -> tuple[str, ...]:
    prompts = read_prompts(source, folder)
    if len(prompts) < count:
        raise ConfigError(
            f"{count} prompts are asked of {source}, but it holds {len(prompts)}; ask for fewer or add some"
        )
    return prompts[:count]


def _shipped(name: str) -> Path:
    if name not in PROMPTS:
        known = tuple(PROMPTS)
        raise ConfigError(f"a shipped prompt set is one of {list(known)}, but got {name!r}{did_you_mean(name, known)}")
    return PROMPTS[name]
