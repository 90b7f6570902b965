"""What this installation has and lacks: one frozen `Check` each, with the way out.

"problem" means that the shipped study would not run, or that a study's parts contradict each other; "missing" that
something optional is not there; "mended" that a problem was there and is gone.
"""

import ctypes.util
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from search.errors import SearchError
from search.install import DISTRIBUTION, check_installation

Verdict = Literal["ok", "missing", "problem", "mended"]

WAY_OUT_OFFLINE = (
    "without a network: in a clone on a machine with one, pip wheel -w wheelhouse -c constraints.txt .; "
    "then here, pip install --no-index --find-links wheelhouse hyq-search; or build containers/Containerfile.x86_64 "
    "(Ascend: containers/Containerfile.ascend-aarch64) there and carry the image over"
)
MIN_FREE_GIB = 2.0
_OPTIONAL = {"npu": "Ascend devices only", "servers": "databases of many hosts only"}
"""What the extras that matter to users are for; the others are for those who work on hyq-search."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what it is, how it is, what was found, and what to do about it."""

    name: str
    verdict: Verdict
    found: str
    way_out: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the check for `hyq-search doctor --json`."""
        return asdict(self)


def examine(
    study: str | None = None,
    store: Path | None = None,
    *,
    storage: str | None = None,
    tracking: str | None = None,
    is_repair: bool = False,
) -> tuple[Check, ...]:
    """Look at the installation, and if a study is named at its databases and its store.

    Args:
        study: A study file or a name, as users give it.
        store: Folder of the store, where it is not the study file's.
        storage: Address of the study's database, where it is not in the store or the study file.
        tracking: Address of its MLflow server, where it is not in the study file.
        is_repair: Whether to mend what can be mended; else nothing is written.
    """
    looks: list[Callable[[], Iterator[Check]]] = [
        _python,
        _names,
        _packages,
        _devices,
        _compiler,
        _weights,
        _codec,
        lambda: _disk(store or Path()),
    ]
    if study is not None:
        looks.append(lambda: _study(study, store, storage, tracking, is_repair=is_repair))
    return tuple(check for look in looks for check in look())


def _python() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _names() -> Iterator[Check]:
    try:
        folder = check_installation()
    except SearchError as error:
        yield Check("package names", "problem", str(error))
    else:
        yield Check("package names", "ok", f"hyquant, metrics, spaces and search are ours, in {folder}")


def _packages() -> Iterator[Check]:
    try:
        lines = requires(DISTRIBUTION) or []
        about = metadata(DISTRIBUTION)
    except PackageNotFoundError:
        yield Check("packages", "problem", f"{DISTRIBUTION} is not installed", f"pip install -e .; {WAY_OUT_OFFLINE}")
        return
    yield Check(DISTRIBUTION, "ok", about["Version"])
    extras = about.get_all("Provides-Extra") or []
    for line in lines:
        requirement = Requirement(line)
        extra = next((name for name in extras if _is_for(requirement, name)), None)
        if extra in (None, *_OPTIONAL):
            yield _package(requirement, extra)


def _is_for(requirement: Requirement, extra: str) -> bool:
    """Say whether a requirement belongs to an extra."""
    marker = requirement.marker
    return marker is not None and not marker.evaluate({"extra": ""}) and marker.evaluate({"extra": extra})


def _package(requirement: Requirement, extra: str | None) -> Check:
    name = requirement.name
    way_out = f"pip install '{requirement.name}{requirement.specifier}'" + ("" if extra else f"; {WAY_OUT_OFFLINE}")
    absent: Verdict = "problem" if extra is None else "missing"
    try:
        found = version(name)
    except PackageNotFoundError:
        where = "" if extra is None else f" ({_OPTIONAL[extra]})"
        return Check(name, absent, f"not installed{where}", way_out)
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(name, absent, f"{found}, but {requirement.specifier} is needed", way_out)
    return Check(name, "ok", found)


def _devices() -> Iterator[Check]:
    try:
        from hyquant.devices import DEVICES, resolve_device
    except ImportError as error:
        yield Check("devices", "problem", f"torch cannot be imported: {error}", WAY_OUT_OFFLINE)
        return
    for name, device in DEVICES.items():
        verdict: Verdict = "ok" if device.is_available() else "missing"
        yield Check(f"device {name}", verdict, "available" if verdict == "ok" else "not available on this machine")
    yield Check("device auto", "ok", f"means {resolve_device('auto').name} here")


def _compiler() -> Iterator[Check]:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        way_out = (
            "install one (Debian, Ubuntu: apt-get install g++), or set `latency: {compile: false}` in the study file"
        )
        yield Check("compiler", "problem", "no C++ compiler, which torch.compile needs on the CPU", way_out)
    elif ctypes.util.find_library("gomp") is None and ctypes.util.find_library("omp") is None:
        yield Check("compiler", "missing", f"{compiler}, without OpenMP", "install libgomp (apt-get install libgomp1)")
    else:
        yield Check("compiler", "ok", compiler)


def _weights() -> Iterator[Check]:
    root = Path(__file__).resolve().parents[1]
    for name, folder in (
        ("mini model", root / "hyquant" / "models" / "mini" / "weights"),
        ("mini judge", root / "metrics" / "mini_judge"),
    ):
        files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
        size_mb = sum(path.stat().st_size for path in files) / 1e6
        if files:
            yield Check(name, "ok", f"{len(files)} weight files, {size_mb:.1f} MB, in {folder}")
        else:
            way_out = "reinstall hyq-search, or train it again: python -m tools.train_mini"
            yield Check(name, "problem", f"no weights in {folder}", way_out)


def _codec() -> Iterator[Check]:
    from hyquant.video.mp4 import CODEC

    try:
        import av
        from PIL import ImageFont

        av.codec.Codec(CODEC, "w")
        ImageFont.load_default(12)
    except ImportError as error:
        yield Check("video", "problem", f"cannot be imported: {error}", WAY_OUT_OFFLINE)
    except ValueError:  # of which PyAV's UnknownCodecError is one
        way_out = "install PyAV's own wheel: pip install --force-reinstall --only-binary :all: av"
        yield Check("video", "problem", f"PyAV has no encoder {CODEC}", way_out)
    else:
        yield Check("video", "ok", f"PyAV {av.__version__} encodes H.264 with {CODEC}; labels use Pillow's own font")


def _disk(folder: Path) -> Iterator[Check]:
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    if free_gib < MIN_FREE_GIB:
        yield Check("disk", "problem", f"{free_gib:.1f} GiB free at {existing}", f"free {MIN_FREE_GIB:.0f} GiB")
    else:
        yield Check("disk", "ok", f"{free_gib:.0f} GiB free at {existing}")


def _study(
    text: str, store: Path | None, storage: str | None, tracking: str | None, *, is_repair: bool
) -> Iterator[Check]:
    from hyquant.errors import HyquantError
    from search.consistency import PARTS, Place, findings, mended
    from search.lease import GRACE_S
    from search.locate import locate_study, opened_study
    from search.trials import count_states

    try:
        ref = locate_study(text, store, storage)
        server = tracking or (None if ref.config is None else ref.config.tracking)
        with opened_study(ref) as study:
            place = Place(ref.store, ref.name, server)
            if is_repair:
                found, left = mended(place, study, grace_s=GRACE_S)
            else:
                found = left = findings(place, study, grace_s=GRACE_S)
            counts = count_states(study)
    except (HyquantError, SearchError) as error:
        yield Check(f"study {text}", "problem", str(error))
        return
    seen = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no trials yet"
    yield Check(f"study {ref.name}", "ok", f"{seen}, in {ref.store}")
    remaining = {finding.sentence for finding in left}
    for finding in found:
        if finding.sentence not in remaining:
            yield Check(finding.part, "mended", finding.what)
    for finding in left:
        yield Check(
            finding.part,
            "problem",
            finding.what,
            finding.way_out if is_repair or finding.mend is None else f"--repair: {finding.way_out}",
        )
    for part in PARTS:
        if part not in {finding.part for finding in (*found, *left)}:
            yield Check(part, "ok", _AGREES.get(part, "nothing to mend"))


_AGREES = {"MLflow and Optuna": "agree trial by trial", "trials": "all that run are in somebody's hands"}
