import pytest
import torch

from metrics.views import frames_view, grid_view


def numbered_frames(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, 2, 4)


@pytest.mark.parametrize(
    ("count", "chosen"),
    [(13, (0, 4, 8, 12)), (9, (0, 3, 5, 8)), (129, (0, 43, 85, 128)), (4, (0, 1, 2, 3)), (1, (0,) * 4)],
)
def test_grid_tiles_four_even_frames_in_reading_order(count, chosen):
    upper = torch.cat((torch.full((2, 4), float(chosen[0])), torch.full((2, 4), float(chosen[1]))), dim=1)
    lower = torch.cat((torch.full((2, 4), float(chosen[2])), torch.full((2, 4), float(chosen[3]))), dim=1)
    expected = torch.cat((upper, lower))

    view = grid_view(numbered_frames(count))

    assert view.shape == (1, 3, 4, 8)
    assert torch.equal(view[0, 1], expected)


def test_frames_are_their_own_views():
    video = numbered_frames(5)

    assert torch.equal(frames_view(video), video)
