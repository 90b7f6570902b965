import shutil

import pytest

from tools.export_original_layout import export_original


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The mini model's checkpoints in Tencent's layout, written once; not to be changed."""
    folder = tmp_path_factory.mktemp("original") / "HunyuanVideo"
    export_original("mini", folder)
    return folder


@pytest.fixture
def changed(base, tmp_path):
    """A copy of the checkpoints to be changed."""
    return shutil.copytree(base, tmp_path / "changed")
