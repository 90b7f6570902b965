from pathlib import Path

import pytest

from search.errors import InstallError
from search.install import PACKAGES, check_installation, check_packages, distribution_of


def make_packages(root: Path, **text: str) -> dict[str, Path | None]:
    inits: dict[str, Path | None] = {}
    for name in PACKAGES:
        folder = root / name
        folder.mkdir(parents=True)
        init = folder / "__init__.py"
        init.write_text(text.get(name, 'DISTRIBUTION = "hyq-search"\n'))
        inits[name] = init
    return inits


def test_this_installation_is_ours():
    assert check_installation() == Path(__file__).resolve().parents[2]


def test_a_stranger_of_the_same_name_is_refused_without_running_it(tmp_path):
    inits = make_packages(tmp_path, spaces="raise RuntimeError('a stranger ran')\n")

    with pytest.raises(InstallError, match=r"package spaces must come from hyq-search.*pip uninstall spaces"):
        check_packages(inits)


def test_packages_in_different_folders_are_refused(tmp_path):
    inits = make_packages(tmp_path / "a") | {"metrics": make_packages(tmp_path / "b")["metrics"]}

    with pytest.raises(InstallError, match="must share one folder"):
        check_packages(inits)


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(InstallError, match="package metrics must be part of hyq-search, but was not found"):
        check_packages(make_packages(tmp_path) | {"metrics": None})


@pytest.mark.parametrize(
    "text", ["", "DISTRIBUTION = 3\n", "def broken(:\n"], ids=["empty", "not text", "syntax error"]
)
def test_a_package_without_the_mark_has_no_distribution(tmp_path, text):
    init = tmp_path / "__init__.py"
    init.write_text(text)

    assert distribution_of(init) is None
