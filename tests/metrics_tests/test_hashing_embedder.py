import torch

from metrics.hashing import HashingEmbedder


def test_videos_and_prompts_become_unit_vectors_of_one_space(draw_video):
    embedder = HashingEmbedder(embedding_dim=24)

    views = embedder.embed_video(draw_video(frames=5))
    prompts = embedder.embed_prompts(["a red square", ""])

    assert views.shape == (5, 24)
    assert prompts.shape == (2, 24)
    torch.testing.assert_close(torch.cat((views, prompts)).norm(dim=1), torch.ones(7))


def test_two_instances_agree_bit_for_bit(draw_video):
    video, prompts = draw_video(), ["a red square moving right"]

    assert torch.equal(HashingEmbedder().embed_video(video), HashingEmbedder().embed_video(video))
    assert torch.equal(HashingEmbedder().embed_prompts(prompts), HashingEmbedder().embed_prompts(prompts))


def test_grid_gives_one_view_that_tells_left_from_right(draw_video):
    embedder = HashingEmbedder(view="grid")
    right = draw_video(frames=13, speed=1)

    there, back = embedder.embed_video(right), embedder.embed_video(right.flip(0))

    assert there.shape[0] == 1
    assert float((there * back).sum()) < 0.99


def test_words_count_and_their_case_does_not():
    red, shouted, blue = HashingEmbedder().embed_prompts(["a red square", "A RED square", "a blue square"])

    assert torch.equal(red, shouted)
    assert 0.2 < float(red @ blue) < 0.99  # two of three words shared


def test_grey_videos_still_have_a_direction():
    grey = torch.full((2, 3, 16, 16), 0.5)

    torch.testing.assert_close(HashingEmbedder().embed_video(grey).norm(dim=1), torch.ones(2))
