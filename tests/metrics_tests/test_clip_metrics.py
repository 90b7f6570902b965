import numpy as np
import pytest
import torch

from metrics.base import Sample
from metrics.clip_prompt import clip_prompt
from metrics.clip_reference import clip_reference


def cosine(a, b):
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


@pytest.fixture
def sample(draw_video):
    return Sample("a red square moving right", video=draw_video(speed=1), reference=draw_video(speed=2))


def test_clip_prompt_is_the_mean_cosine_of_frames_and_prompt(sample, embedder):
    frames = embedder.embed_video(sample.video).double().numpy()
    prompt = embedder.embed_prompts([sample.prompt])[0].double().numpy()
    expected = np.mean([cosine(frame, prompt) for frame in frames])

    assert clip_prompt(sample, embedder) == pytest.approx(expected, abs=1e-6)  # float32 unit vectors


def test_clip_reference_compares_frame_by_frame(sample, embedder):
    frames = embedder.embed_video(sample.video).double().numpy()
    references = embedder.embed_video(sample.reference).double().numpy()
    expected = np.mean([cosine(frame, reference) for frame, reference in zip(frames, references, strict=True)])

    assert clip_reference(sample, embedder) == pytest.approx(expected, abs=1e-6)
    assert expected < 0.999


def test_clip_reference_of_a_video_with_itself_is_one(draw_video, embedder):
    video = draw_video()

    assert clip_reference(Sample("", video, video.clone()), embedder) == pytest.approx(1.0, abs=1e-6)


def test_closed_form_with_known_angles():
    """Frames at 0 and 60 degrees to the prompt average to (1 + 0.5) / 2; references are 90 and 0 degrees away."""

    class Angles:
        def embed_video(self, video):
            degrees = torch.deg2rad(video[:, 0, 0, 0])
            return torch.stack((degrees.cos(), degrees.sin()), dim=1)

        def embed_prompts(self, prompts):
            return torch.tensor([[1.0, 0.0]]).repeat(len(prompts), 1)

    video = torch.tensor([0.0, 60.0])[:, None, None, None].expand(2, 3, 4, 4)
    reference = torch.tensor([90.0, 60.0])[:, None, None, None].expand(2, 3, 4, 4)
    sample = Sample("any", video, reference)

    assert clip_prompt(sample, Angles()) == pytest.approx(0.75, abs=1e-6)
    assert clip_reference(sample, Angles()) == pytest.approx(0.5, abs=1e-6)
