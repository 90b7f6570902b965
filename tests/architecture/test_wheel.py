"""What an installation gets: four packages with everything that lies in them, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"hyquant", "metrics", "search", "spaces"}
NOT_SHIPPED = ("__pycache__", ".pyc")


def files_of_packages() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and not any(mark in path.as_posix() for mark in NOT_SHIPPED)
    }


def test_the_build_finds_the_four_packages_and_no_other():
    """With `packages.find` in pyproject.toml, setuptools looks for namespace packages too."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = find_namespace_packages(ROOT, include=settings["tool"]["setuptools"]["packages"]["find"]["include"])

    assert {name.partition(".")[0] for name in found} == PACKAGES


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages_and_the_licence(tmp_path):
    tree = tmp_path / "tree"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]

    subprocess.run([*build, "--no-build-isolation", "--no-index", "-w", tmp_path, tree], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = {name for name in names if ".dist-info/" in name}

    assert names - info == files_of_packages()
    assert {name.rpartition("/")[2] for name in info} >= {"LICENSE", "entry_points.txt", "METADATA"}
