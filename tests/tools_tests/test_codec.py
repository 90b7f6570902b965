import pytest
import torch

from hyquant.models.pca_codec import PatchPCACodec, join_blocks, split_blocks
from tools.train_mini.codec import fit_codec, psnr_db, to_clips, to_latents
from tools.train_mini.domain import held_out_combinations, render_clips


@pytest.fixture(scope="module")
def codec() -> PatchPCACodec:
    return fit_codec(seed=0)


def test_joining_split_blocks_gives_the_video_back() -> None:
    video = torch.rand(2, 3, 9, 8, 12, generator=torch.Generator().manual_seed(0))

    first, rest = split_blocks(video, size=4, length=4)

    assert first.shape == (2, 1, 2, 3, 48)
    assert rest.shape == (2, 2, 2, 3, 192)
    assert torch.equal(join_blocks(first, rest, size=4, length=4), video)


def test_frames_that_do_not_divide_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"1 \+ a multiple of 4.*got 12 frames"):
        split_blocks(torch.zeros(1, 3, 12, 8, 8), size=4, length=4)


def test_latents_have_unit_variance_and_the_shape_of_a_causal_autoencoder(codec: PatchPCACodec) -> None:
    latents = to_latents(codec, render_clips(held_out_combinations(), torch.Generator().manual_seed(1)))

    assert latents.shape == (48, 8, 4, 16, 16)
    assert abs(float(latents.std()) - 1) < 0.05  # sampling error of 48 clips; whitening was done on others


def test_unseen_clips_survive_the_round_trip(codec: PatchPCACodec) -> None:
    clips = render_clips(held_out_combinations(), torch.Generator().manual_seed(1))

    assert psnr_db(to_clips(codec, to_latents(codec, clips)), clips) > 27  # dB, measured 27.7


def test_first_frame_does_not_depend_on_later_ones(codec: PatchPCACodec) -> None:
    clips = render_clips(held_out_combinations()[:4], torch.Generator().manual_seed(1))
    changed = clips.clone()
    changed[:, 1:] = 0.5

    assert torch.equal(to_latents(codec, clips)[:, :, 0], to_latents(codec, changed)[:, :, 0])


def test_saved_codec_decodes_what_the_first_one_decodes(codec: PatchPCACodec, tmp_path) -> None:
    codec.save_pretrained(tmp_path)
    loaded = PatchPCACodec.from_pretrained(tmp_path)
    latents = torch.randn(1, 8, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    assert loaded.config.scaling_factor == 1
    assert torch.equal(loaded.decode(latents).sample, codec.decode(latents).sample)


def test_weights_are_exact_in_float16(codec: PatchPCACodec) -> None:
    """The shipped file is float16; training used the very same numbers."""
    assert all(torch.equal(p, p.half().float()) for p in codec.parameters())
