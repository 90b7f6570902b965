import pytest

from hyquant.config import LayerSelection
from hyquant.errors import LayerMatchError
from hyquant.layers import select_layers

NAMES = (
    "double_blocks.0.img_mod.linear",
    "double_blocks.0.img_mlp.fc1",
    "double_blocks.0.img_mlp.fc2",
    "single_blocks.0.linear1",
    "final_layer.linear",
)


def test_exclude_wins_and_order_is_kept():
    selection = LayerSelection(include=("*single_blocks*", "*double_blocks*"), exclude=("*fc2*",))

    chosen = select_layers(NAMES, selection, model="m")

    assert chosen == (NAMES[0], NAMES[1], NAMES[3])


def test_an_unmatched_pattern_is_an_error_with_the_closest_match():
    selection = LayerSelection(exclude=("*img_modd*",))

    with pytest.raises(
        LayerMatchError,
        match=r"exclude pattern '\*img_modd\*' matched no layer of hunyuan_video; did you mean '\*img_mod\*'\?",
    ):
        select_layers(NAMES, selection, model="hunyuan_video")


def test_all_unmatched_patterns_are_reported_at_once():
    selection = LayerSelection(include=("*double_block.*", "*single_blocks*"), exclude=("*to_q*",))

    with pytest.raises(LayerMatchError, match=r"include pattern '\*double_block\.\*'.*exclude pattern '\*to_q\*'"):
        select_layers(NAMES, selection, model="m")


def test_patterns_are_case_sensitive():
    with pytest.raises(LayerMatchError, match="SINGLE"):
        select_layers(NAMES, LayerSelection(include=("*SINGLE*",)), model="m")
