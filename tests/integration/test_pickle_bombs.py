"""A file that would run code when unpickled, given where users give files: the code does not run."""

import os
import pickle

import pytest
import torch

from hyquant.errors import ConfigError
from hyquant.session.loading import safe_torch_load
from search.cli import exit_code_of


class Bomb:
    """Unpickles by making a folder: harmless here, any command elsewhere."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "it-ran"


@pytest.fixture
def bomb(tmp_path, target):
    path = tmp_path / "bomb.pt"
    torch.save({"weight": Bomb(target)}, path)
    return path


def test_the_bomb_works(bomb, target):
    torch.load(bomb, weights_only=False)

    assert target.exists()


def test_a_dump_with_code_is_refused(bomb, target):
    with pytest.raises(ConfigError, match="tensors and plain containers only"):
        safe_torch_load(bomb)

    assert not target.exists()


@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_command_given_a_pickle_refuses_it(tmp_path, target, command):
    path = tmp_path / "study.yaml"
    path.write_bytes(pickle.dumps(Bomb(target), protocol=0))

    assert exit_code_of([command, str(path)]) in {1, 2, 3}
    assert not target.exists()


def test_a_judge_of_open_clip_does_not_run_code_in_its_weights(bomb, target):
    factory = pytest.importorskip("open_clip.factory")

    with pytest.raises(pickle.UnpicklingError):
        factory.load_state_dict(str(bomb))

    assert not target.exists()
