"""The shipped judge, on clips drawn here: it must tell captions apart, and see motion through the grid."""

import pytest
import torch

from metrics.embedders import find_weights, load_embedder
from metrics.errors import EmbedderMissing

MOTIONS = {"left": (-2, 0), "right": (2, 0), "up": (0, -2), "down": (0, 2)}
INKS = {"red": (0.92, 0.08, 0.08), "blue": (0.10, 0.20, 0.95), "yellow": (0.98, 0.90, 0.08)}


@pytest.fixture(scope="module")
def judge():
    try:
        find_weights("mini")
    except EmbedderMissing as error:
        pytest.skip(f"the mini judge is not in this checkout: {error}")
    return load_embedder("mini", view="grid")


def moving_square(colour: str, motion: str) -> torch.Tensor:
    """Draw a square of 28 pixels that passes the middle of a black 64 x 64 frame at frame 6 of 13."""
    video = torch.full((13, 3, 64, 64), 0.03)
    for t in range(13):
        left, top = (18 + speed * (t - 6) for speed in MOTIONS[motion])
        video[t, :, top : top + 28, left : left + 28] = torch.tensor(INKS[colour])[:, None, None]
    return video


def caption(colour: str, motion: str) -> str:
    return f"a {colour} square moving {motion} on a black background"


def test_embeddings_are_unit_vectors_of_one_space(judge):
    videos = judge.embed_video(moving_square("red", "left"))
    prompts = judge.embed_prompts([caption("red", "left")])

    assert videos.shape == prompts.shape
    assert len(videos) == 1
    torch.testing.assert_close(torch.cat((videos, prompts)).norm(dim=1), torch.ones(2))


def test_the_right_caption_beats_other_motions_and_colours(judge):
    """In at least 10 of 12 clips: the judge itself is right about motion in nine of ten."""
    captions = [caption(colour, motion) for colour in INKS for motion in MOTIONS]
    prompts = judge.embed_prompts(captions)
    videos = torch.cat([judge.embed_video(moving_square(colour, motion)) for colour in INKS for motion in MOTIONS])

    chosen = (videos @ prompts.T).argmax(dim=1)

    assert int((chosen == torch.arange(len(captions))).sum()) >= 10
