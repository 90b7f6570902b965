from collections import Counter

import pytest
import torch

from tools.train_mini.domain import (
    BACKGROUNDS,
    COLOURS,
    FACTORS,
    SIZE,
    SPEED,
    Combination,
    all_combinations,
    held_out_combinations,
    render_clips,
    training_combinations,
)
from tools.train_mini.prompts import choose_prompts, evaluation_combinations
from tools.train_mini.text import END, build_tokenizer, vocabulary


def clip_of(combination: Combination, num_frames: int = 13) -> torch.Tensor:
    return render_clips([combination], torch.Generator().manual_seed(3), num_frames)[0]


def ink_centre(frame_CHW: torch.Tensor) -> torch.Tensor:
    """Return the (x, y) centre of what differs from the picture's corner."""
    ink_HW = (frame_CHW - frame_CHW[:, :1, :1]).abs().sum(dim=0)
    pixel = torch.arange(SIZE, dtype=torch.float32)
    return torch.stack([(ink_HW.sum(0) * pixel).sum(), (ink_HW.sum(1) * pixel).sum()]) / ink_HW.sum()


def test_held_out_and_training_combinations_part_all_of_them() -> None:
    held_out, training = held_out_combinations(), training_combinations()

    assert (len(held_out), len(training)) == (48, 432)
    assert set(held_out) | set(training) == set(all_combinations())


def test_every_pair_of_factor_values_occurs_in_training() -> None:
    """A held-out combination is new, but each two of its words have been seen together."""
    pairs = {(i, j, c.indices[i], c.indices[j]) for c in training_combinations() for i in range(4) for j in range(i)}
    sizes = [len(values) for values in FACTORS.values()]

    assert len(pairs) == sum(sizes[i] * sizes[j] for i in range(4) for j in range(i))


def test_captions_tell_all_combinations_apart() -> None:
    assert len({c.caption for c in all_combinations()}) == 480


def test_a_short_clip_is_the_beginning_of_a_long_one() -> None:
    combination = Combination(shape=1, colour=2, motion=0, background=1)

    assert torch.equal(clip_of(combination, 5), clip_of(combination, 13)[:5])


@pytest.mark.parametrize("motion", range(5), ids=FACTORS["motion"])
def test_the_shape_moves_as_its_caption_says(motion: int) -> None:
    clip = clip_of(Combination(shape=1, colour=0, motion=motion, background=0))

    moved = ink_centre(clip[12]) - ink_centre(clip[0])

    direction = {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1), 4: (0, 0)}[motion]
    expected = 12 * SPEED * torch.tensor(direction, dtype=torch.float32)
    assert torch.allclose(moved, expected, atol=0.5)  # half a pixel: edges fade over more than one


def test_corner_and_centre_have_the_colours_of_the_caption() -> None:
    combination = Combination(shape=0, colour=5, motion=4, background=3)
    frame = clip_of(combination)[0]

    ink, paper = torch.tensor(list(COLOURS.values())[5]), torch.tensor(list(BACKGROUNDS.values())[3])
    assert torch.allclose(frame[:, SIZE // 2, SIZE // 2], ink, atol=0.031)  # shades vary by 0.03
    assert torch.allclose(frame[:, 0, 0], paper, atol=0.031)


def test_prompt_sets_are_disjoint_and_only_heldout_is_unseen() -> None:
    sets = choose_prompts()

    assert {name: len(chosen) for name, chosen in sets.items()} == {"calibration": 16, "search": 24, "heldout": 32}
    assert len(set().union(*sets.values())) == 16 + 24 + 32
    assert set(sets["heldout"]) <= set(held_out_combinations())
    assert set(sets["calibration"]) | set(sets["search"]) <= set(training_combinations())


@pytest.mark.parametrize("name", ["calibration", "search", "heldout"])
def test_prompt_sets_use_every_value_about_equally_often(name: str) -> None:
    chosen = choose_prompts()[name]

    for position, values in enumerate(FACTORS.values()):
        counts = Counter(c.indices[position] for c in chosen)
        assert len(counts) == len(values)
        assert max(counts.values()) - min(counts.values()) <= 2


def test_bars_are_measured_on_as_many_held_out_as_training_combinations() -> None:
    chosen = evaluation_combinations()

    assert len(set(chosen)) == 64
    assert len(set(chosen) & set(held_out_combinations())) == 32


def test_every_caption_tokenizes_without_unknown_words_and_end_is_the_highest_id() -> None:
    """open_clip pools at the highest id of a sequence."""
    tokenizer = build_tokenizer(adds_specials=True, max_length=16)
    ids = tokenizer([c.caption for c in all_combinations()], padding="max_length", max_length=16)["input_ids"]

    assert not any(vocabulary()["<unk>"] in row for row in ids)
    assert vocabulary()[END] == max(vocabulary().values()) == max(max(row) for row in ids)
