import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from search.frames import comparison_frames, frame_indices, strip_image, to_pixels
from search.media import frame_rate, write_mp4, write_trial_files, written_trial_files
from search.plain import plain


@dataclass(frozen=True)
class Clip:
    """The fields of metrics.base.Sample."""

    prompt: str
    video: torch.Tensor
    reference: torch.Tensor


def clip(
    colour: tuple[float, float, float], reference: tuple[float, float, float], prompt: str = "a red circle"
) -> Clip:
    def still(rgb: tuple[float, float, float]) -> torch.Tensor:
        return torch.tensor(rgb).reshape(1, 3, 1, 1).expand(5, 3, 32, 32).contiguous()

    return Clip(prompt, still(colour), still(reference))


RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


def test_pixels_round_clamp_and_make_nan_black():
    video = torch.tensor([0.0, 0.5, 1.2, float("nan")]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)

    assert to_pixels(video)[0, :, :, 0].tolist() == [[0, 128], [255, 0]]


def test_float_stands_left_and_quantized_right():
    frames = comparison_frames([clip(colour=BLUE, reference=RED)])
    height, width = frames.shape[1:3]

    assert frames.shape[0] == 5
    assert frames[0, height // 2, width // 4].tolist() == [255, 0, 0]
    assert frames[0, height // 2, 3 * width // 4].tolist() == [0, 0, 255]


@pytest.mark.parametrize("num_clips", [1, 2, 3, 8])
def test_comparison_frames_have_even_sides(num_clips):
    frames = comparison_frames([clip(RED, BLUE)] * num_clips, cell_height=35)

    assert [side % 2 for side in frames.shape[1:3]] == [0, 0]


def test_the_strip_has_the_float_row_above_the_quantized_row():
    picture = strip_image([clip(colour=BLUE, reference=RED)], cell_height=40)
    middle = picture.shape[1] - 20
    column = [tuple(pixel) for pixel in picture[:, middle].tolist()]

    assert column.index((255, 0, 0)) < column.index((0, 0, 255))


@pytest.mark.parametrize("picture_of", [comparison_frames, strip_image])
def test_a_prompt_that_the_font_cannot_write_is_shown_as_its_number(picture_of):
    """Chinese prompts look as their numbers do; what the font has is written as it is."""
    first = clip(RED, BLUE, "a red circle")
    unwritable = picture_of([first, clip(RED, BLUE, "\u4e00\u53ea\u6a58\u732b"), clip(RED, BLUE, "\u72d7")])
    numbered = picture_of([first, clip(RED, BLUE, "prompt 2"), clip(RED, BLUE, "prompt 3")])

    assert np.array_equal(unwritable, numbered)
    assert not np.array_equal(picture_of([first]), picture_of([clip(RED, BLUE, "prompt 1")]))


def shortened(whole: Clip, num_frames: int) -> Clip:
    return Clip(whole.prompt, whole.video[:num_frames], whole.reference)


def test_clips_of_two_lengths_are_compared_as_far_as_the_shorter_one_goes():
    rng = torch.Generator().manual_seed(0)
    whole = Clip("a fox", torch.rand(5, 3, 32, 32, generator=rng), torch.rand(5, 3, 32, 32, generator=rng))
    cut = Clip("a fox", whole.video[:3], whole.reference[:3])
    short = shortened(whole, 3)
    together = comparison_frames([whole, short])
    half = together.shape[1] // 2

    assert np.array_equal(comparison_frames([short]), comparison_frames([cut]))
    assert np.array_equal(strip_image([short]), strip_image([cut]))
    assert len(together) == 5
    assert np.array_equal(together[:3, half:], comparison_frames([cut]))
    assert np.array_equal(together[4, half:], together[2, half:])


@pytest.mark.parametrize(("num_frames", "expected"), [(13, [0, 4, 8, 12]), (3, [0, 1, 2]), (1, [0])])
def test_frames_of_a_strip_span_the_clip(num_frames, expected):
    assert frame_indices(num_frames, 4) == expected


def test_an_mp4_is_h264_in_420_and_shows_what_was_written(tmp_path):
    import av

    frames = np.zeros((4, 32, 48, 3), dtype=np.uint8)
    frames[:, :, :, 1] = 200
    write_mp4(tmp_path / "v.mp4", frames, fps=8)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        codec, pixel_format = stream.codec_context.name, stream.codec_context.pix_fmt

    assert (codec, pixel_format) == ("h264", "yuv420p")
    assert len(shown) / 8 >= 4.0
    # Limited-range 4:2:0 keeps a flat colour to a few of 255 levels.
    assert np.abs(shown[0].astype(int) - frames[0].astype(int)).max() <= 4


def test_trial_files_can_be_read_back(tmp_path, make_result):
    result = make_result("timestep")
    write_trial_files(tmp_path, result, plan=None, report=None, samples=[clip(RED, BLUE)])

    assert type(result).model_validate_json((tmp_path / "result.json").read_text()) == result
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == json.loads((tmp_path / "config.json").read_text())
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.mode == "RGB"
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "config.yaml", "result.json", "strip.png", "videos.mp4",
    }  # fmt: skip


def test_json_has_null_where_a_number_is_not_finite():
    assert plain({"a": (1.0, float("nan")), "b": Clip("p", 1, float("inf"))}) == {
        "a": [1.0, None],
        "b": {"prompt": "p", "video": 1, "reference": None},
    }


@pytest.mark.parametrize(("num_frames", "fps"), [(13, 8), (129, 24)])
def test_short_clips_play_slowly_enough_to_follow(num_frames, fps):
    assert frame_rate(num_frames) == fps


def test_a_full_disk_costs_a_trial_its_files_and_raises_nothing(tmp_path, make_result, caplog):
    (tmp_path / "config.yaml").symlink_to("/dev/full")  # the kernel's own "no space left on device"
    result = make_result("timestep")

    with pytest.raises(OSError, match="No space left"):
        write_trial_files(tmp_path, result, plan=None, report=None, samples=[])
    assert written_trial_files(tmp_path, result, plan=None, report=None, samples=[]) is None

    assert "No space left on device" in caplog.text
